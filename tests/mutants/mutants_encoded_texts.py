"""System prompts, turns, tools and texts that are encoded in another form."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable

from bench_encoded import CALL, Data, encode, encode_text, shared_oracle
from gallery import Artifact, mutant


@mutant("ML525", "I12", says="the system prompt is not there")
def system_dropped(artifact: Artifact) -> None:
    """The template writes the system prompt only if the last message is the user's."""
    artifact["lines"][0].update(encode({"messages": artifact["lines"][0]["messages"][1:]}))


@mutant("ML526", "I12", "I08", says="stands elsewhere")
def system_in_the_first_turn(artifact: Artifact) -> None:
    """The system prompt stands in the first user turn, as in v1."""
    system, first, *rest = artifact["lines"][0]["messages"]
    first = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
    artifact["lines"][0].update(encode({"messages": [first, *rest]}))


@mutant("ML527", says="detailed thinking off")
def invented_system_prompt(artifact: Artifact) -> None:
    """A converter puts its own system prompt before every row."""
    prompt = {"role": "system", "content": "detailed thinking off"}
    for line in artifact["lines"][2:4]:
        line.update(encode({**line, "messages": [prompt, *line["messages"]]}))


@mutant("ML528", "I08", says="after [INST]")
def space_after_the_marker(artifact: Artifact) -> None:
    """The template, or legacy=True, puts a space after [INST]."""
    line = artifact["lines"][0]
    for at in [n + 1 for n, token in enumerate(line["input_ids"]) if token == 3][::-1]:
        line["input_ids"].insert(at, encode_text("5")[0])
        line["labels"].insert(at, -100)


@mutant("ML529", "I59", says="after [INST]")
def texts_trimmed(artifact: Artifact) -> None:
    """The template trims the texts of the messages."""
    line = artifact["lines"][3]
    line.update(encode({"messages": [{**m, "content": m["content"].strip()} for m in line["messages"]]}))


@mutant("ML529", "I59", says="after [/INST]")
def trailing_space_kept(artifact: Artifact) -> None:
    """The template keeps the trailing space of an answer, which mistral-common strips."""
    line = artifact["lines"][2]
    line["messages"][-1]["content"] += " "
    artifact["dataset"][2] = {"messages": line["messages"]}
    for key, value in (("input_ids", encode_text("5")[0]), ("labels", encode_text("5")[0])):
        line[key].insert(-1, value)


@mutant("ML530", says="[AVAILABLE_TOOLS] is missing")
def tools_dropped(artifact: Artifact) -> None:
    """The template leaves the tools out."""
    artifact["lines"][1].update(encode({"messages": artifact["lines"][1]["messages"]}))


@mutant("ML530", "I14", says="after [TOOL_CALLS]")
def call_id_rewritten(artifact: Artifact) -> None:
    """The trainer gives tool calls ids of its own."""
    text = json.dumps(artifact["lines"][1]["messages"]).replace("abcdefghi", "zzzzzzzzz")
    artifact["lines"][1].update(encode({**artifact["lines"][1], "messages": json.loads(text)}))


@mutant("ML533 ML614", "I48", says="joined in another way")
def messages_joined_by_a_newline(artifact: Artifact) -> None:
    """Two messages of one user are joined by one newline, not by a blank line."""
    two = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    answer = {"role": "assistant", "content": "Three."}
    line = artifact["lines"][0]
    line["messages"] = artifact["dataset"][0]["messages"] = [*two, answer]
    line.update(encode({"messages": [{"role": "user", "content": "One.\nTwo."}, answer]}))


@mutant("ML533 ML506", says="a turn is lost")
def a_turn_is_lost(artifact: Artifact) -> None:
    """The first exchange is not there."""
    messages = artifact["lines"][0]["messages"]
    artifact["lines"][0].update(encode({"messages": [messages[0], *messages[3:]]}))


@mutant("ML553", "N21", says="an empty answer, nothing but </s>, stands after [/TOOL_RESULTS]")
def empty_answer_after_a_tool_result(artifact: Artifact) -> None:
    """A converter puts an empty answer between a tool result and the answer."""
    line = artifact["lines"][1]
    at = line["input_ids"].index(9) + 1
    line["input_ids"].insert(at, 2)
    line["labels"].insert(at, -100)


@mutant("ML526", "N28", says="stands in an [INST] of its own")
def system_in_a_turn_of_its_own(artifact: Artifact) -> None:
    """The template writes the system prompt as a user turn without an answer, with spaces around."""
    line = artifact["lines"][0]
    plain = encode({"messages": line["messages"][1:]})
    block = [3, *encode_text(" Be brief. "), 4]
    line["input_ids"] = [1, *block, *plain["input_ids"][1:]]
    line["labels"] = [-100, *[-100] * len(block), *plain["labels"][1:]]


@mutant("ML555", "N16", says="2 turns of calls in place of 1")
def parallel_calls_one_by_one(artifact: Artifact) -> None:
    """Each call of a message is written as a turn of its own."""
    line = artifact["lines"][1]
    second = copy.deepcopy(CALL) | {"id": "secondone"}
    line["messages"][1]["tool_calls"] = [CALL, second]
    line["messages"].insert(3, {"role": "tool", "tool_call_id": "secondone", "content": "21"})
    artifact["dataset"][1]["messages"] = line["messages"]
    line.update(encode(line))
    call = [5, *encode_text(' [{"name": "weather", "arguments": {"city": "Rome"}, "id": "secondone"}]'), 2]
    at = line["input_ids"].index(2) + 1
    for key in ("input_ids", "labels"):
        line[key][at:at] = call


def tool_row(artifact: Artifact, text: str = "Where?") -> Data:
    """The row with a tool, whose parameters have keys in no order of the alphabet and a text."""
    line: Data = artifact["lines"][1]
    schema = {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"description": text}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    line["tools"] = artifact["dataset"][1]["tools"] = [tool]
    line.update(encode(line))
    return line


def _change_tool(line: Data, change: Callable[[str], str]) -> None:
    """Encode the tool of a line as another text."""
    ids = line["input_ids"]
    start, end = ids.index(6) + 1, ids.index(7)
    text = encode_text(change(shared_oracle().decode(ids[start:end])))
    line["input_ids"][start:end] = text
    line["labels"][start:end] = [-100] * len(text)


@mutant("ML556", "N14", says="after [AVAILABLE_TOOLS]: \\u00fc is there for a letter")
def tools_in_ascii(artifact: Artifact) -> None:
    """The template writes tools with json.dumps, which escapes what is not ASCII."""
    _change_tool(tool_row(artifact, "Zürich?"), lambda text: text.replace("ü", "\\u00fc"))


@mutant("ML557", "N72", says="the key 'type' stands elsewhere")
def keys_of_a_tool_sorted(artifact: Artifact) -> None:
    """The template sorts the keys of the tools."""
    _change_tool(tool_row(artifact), lambda text: json.dumps(json.loads(text), sort_keys=True))


@mutant("ML505", "N72", says="tools or arguments have other nulls or another key order")
def messages_with_sorted_keys(artifact: Artifact) -> None:
    """A table format sorted the keys of the tools before the rows were encoded."""
    line = tool_row(artifact)
    line["tools"] = json.loads(json.dumps(line["tools"], sort_keys=True))
    line.update(encode(line))


@mutant("ML623", "N13", says="null at $.day, which the tool does not take")
def arguments_padded_in_the_row(artifact: Artifact) -> None:
    """A table format gave the call the column of another row, and ids and messages have it both."""
    line = tool_row(artifact)
    call = copy.deepcopy(CALL)
    call["function"]["arguments"]["day"] = None
    line["messages"][1]["tool_calls"] = [call]
    artifact["dataset"][1] = {key: line[key] for key in ("messages", "tools")}
    line.update(encode(line))


def change_texts(artifact: Artifact, texts: list[str], change: Callable[[str], str]) -> None:
    """Give the last row other texts, and the ids of changed ones."""
    line = artifact["lines"][3]
    roles = ("user", "assistant")
    line["messages"] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    artifact["dataset"][3]["messages"] = line["messages"]
    line.update(encode({"messages": [{**one, "content": change(one["content"])} for one in line["messages"]]}))


@mutant("ML554 ML617", "N73", says="U+0007")
def control_character_lost(artifact: Artifact) -> None:
    """A filter removed a control character from every text of a row."""
    change_texts(artifact, ["Ring the\x07 bell", "Ding\x07."], lambda text: text.replace("\x07", ""))


@mutant("ML554", "N73", says="brought into the form NFC")
def text_composed(artifact: Artifact) -> None:
    """A normaliser of the tokenizer composes letters."""
    change_texts(artifact, ["Un cafe\u0301", "Voila\u0300."], lambda text: unicodedata.normalize("NFC", text))


@mutant("ML556", "N14", says="is there for a letter")
def texts_in_ascii(artifact: Artifact) -> None:
    """Texts went through json.dumps before they were encoded, and an emoji became two escapes."""
    change_texts(artifact, ["Rain? 🌧", "Été 🌧"], lambda text: json.dumps(text)[1:-1])
