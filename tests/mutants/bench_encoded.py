"""Encoded rows that are broken on purpose, each with the rules that must catch it."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from gallery import Artifact, mutant

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.alignment import Alignment
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.encoded.audit import checks
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target

Data = dict[str, Any]

TOKENIZER = "spm-v3"
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROWS: list[Data] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which colour is the sky?"},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "And the grass?"},
            {"role": "assistant", "content": "Green, mostly."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Is it warm in Rome?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "It is."},
        ],
        "tools": [TOOL],
    },
    {
        "messages": [
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "content": "Perhaps three.", "weight": 0},
            {"role": "user", "content": "Once more?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "  Say [INST] and </s> to me"},
            {"role": "assistant", "content": "\nAs you like: [/INST] </s>"},
        ]
    },
]


@cache
def _target(name: str = TOKENIZER) -> Target:
    return Target(name)


def _oracle(name: str = TOKENIZER) -> Oracle:
    return _target(name).oracle


def encode(row: Data) -> Data:
    """Ids and labels of a row as they should be."""
    return encode_with(TOKENIZER, row)


def encode_with(name: str, row: Data) -> Data:
    """Ids and labels of a row by a tokenizer that mistral-common ships."""
    encoded = _oracle(name).encode({key: row[key] for key in ("messages", "tools") if key in row})
    return {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}


def encode_text(text: str) -> list[int]:
    """Ids of a text."""
    return list(_oracle().encode_text(text))


def render(row: Data) -> str:
    """A row as one text, with its control tokens spelled out."""
    oracle = _oracle()
    return "".join(oracle.control_tokens.get(token, oracle.piece(token)) for token in encode(row)["input_ids"])


def pack(rows: list[Any]) -> Data:
    """One sequence of several rows, or of their messages."""
    conversations = [row if isinstance(row, list) else {key: row[key] for key in row} for row in rows]
    parts = [encode({"messages": row} if isinstance(row, list) else row) for row in conversations]
    return {
        "conversations": conversations,
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in part["labels"]],
        "position_ids": [n for part in parts for n in range(len(part["input_ids"]))],
    }


class _Bench:
    subject = "encoded"

    def make(self, folder: Path) -> Artifact:
        dataset = copy.deepcopy(ROWS)
        return {
            "lines": [{"row": index, **copy.deepcopy(row), **encode(row)} for index, row in enumerate(dataset)],
            "packed": [{"row": 0, **pack(copy.deepcopy(ROWS[:3]))}, {"row": 1, **pack(copy.deepcopy(ROWS[1:]))}],
            "dataset": dataset,
            "folder": folder,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        folder = artifact["folder"]
        dataset = _write(folder / "dataset.jsonl", artifact["dataset"])
        [path] = _write(folder / "lines.jsonl", artifact["lines"])
        plain = EncodedTarget("lines", path, judge=_target(), dataset=dataset)
        packed = EncodedTarget("packed", _write(folder / "packed.jsonl", artifact["packed"])[0], judge=_target())
        return [finding for target in (plain, packed) for finding in _findings(target)]

    def table(self, artifact: Artifact) -> str:
        """Return the tokens around the first difference to the sound lines; empty if there is none."""
        sound = self.make(artifact["folder"])
        for key in ("lines", "packed"):
            by_row = {line["row"]: line for line in sound[key]}
            for line in artifact[key]:
                before = by_row.get(line["row"], line)
                sides = [(one["input_ids"], one["labels"]) for one in (before, line)]
                if all(len(ids) == len(labels) for ids, labels in sides) and sides[0] != sides[1]:
                    return Alignment(*sides, _oracle().piece).table()
        return ""


def _write(path: Path, lines: list[Any]) -> tuple[Path, ...]:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return (path,)


def _findings(target: EncodedTarget) -> list[Finding]:
    settings = Settings(1, None, "cpu", True, (), False, Path())
    return [finding for check in checks(target, settings) for finding in check.run().findings]


BENCH = _Bench()


def _label(artifact: Artifact, row: int, change: Callable[[int, int, int], int]) -> None:
    """Change every label of a row: a function of its place, its id and itself."""
    line = artifact["lines"][row]
    line["labels"] = [change(n, *pair) for n, pair in enumerate(zip(line["input_ids"], line["labels"], strict=True))]


def pad(line: Data, token: int, *, count: int = 3, left: bool = False, label: int = -100, mask: bool = True) -> None:
    """Pad a line, with a mask or without."""
    length = len(line["input_ids"])
    for key, value in (("input_ids", token), ("labels", label)):
        line[key] = [value] * count + line[key] if left else line[key] + [value] * count
    if mask:
        line["attention_mask"] = [0] * count + [1] * length if left else [1] * length + [0] * count


# The mask


@mutant("ML546", "I01", says="the EOS of turn 1 is masked")
def pad_is_eos(artifact: Artifact) -> None:
    """The collator masks the pad id, which is also EOS, so it masks the EOS of each answer."""
    pad(artifact["lines"][0], 2)
    _label(artifact, 0, lambda n, token, label: -100 if token == 2 else label)


@mutant("ML546")
def eos_masked_in_some_rows(artifact: Artifact) -> None:
    """The last token of a row is masked."""
    artifact["lines"][3]["labels"][-1] = -100


@mutant("ML522", "I02", says="a </s> is missing")
def no_eos(artifact: Artifact) -> None:
    """Texts are joined without EOS."""
    line = artifact["lines"][0]
    kept = [n for n, token in enumerate(line["input_ids"]) if token != 2]
    for key in ("input_ids", "labels"):
        line[key] = [line[key][n] for n in kept]


@mutant("ML522", "I02", "I34", says="the EOS at the end is missing")
def last_eos_dropped(artifact: Artifact) -> None:
    """The maximal length cuts the last EOS off."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key].pop()


@mutant("ML544 ML506", "I04", says="no token is trained on")
def mask_of_zeros(artifact: Artifact) -> None:
    """The assistant mask of a template without generation blocks is zero everywhere."""
    for row in range(len(artifact["lines"])):
        _label(artifact, row, lambda n, token, label: -100)


@mutant("ML544 ML506", "I05")
def response_marker_not_found(artifact: Artifact) -> None:
    """The collator searches for the ids of `[/INST]` and a space, finds none, and masks the row."""
    marker = [*encode_text("5")[:1], 4]
    ids = artifact["lines"][0]["input_ids"]
    assert not any(ids[n : n + 2] == marker for n in range(len(ids)))
    _label(artifact, 0, lambda n, token, label: -100)


@mutant("ML531 ML544 ML506", "I06", says="cut at the end")
def cut_before_the_answer(artifact: Artifact) -> None:
    """The maximal length ends before the first answer."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key] = artifact["lines"][0][key][:8]


@mutant("ML531 ML506", "I34", "I06", says="cut at the end")
def cut_inside_an_answer(artifact: Artifact) -> None:
    """The maximal length ends inside the last answer: no EOS."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key] = artifact["lines"][0][key][:-2]


@mutant("ML531 ML506", "I34", says="EOS put there")
def cut_and_closed(artifact: Artifact) -> None:
    """A row is cut inside its last answer, and EOS is put there."""
    line = artifact["lines"][3]
    line["input_ids"] = [*line["input_ids"][:-4], 2]
    line["labels"] = [*line["labels"][:-4], 2]


@mutant("ML531 ML506", says="cut at the start")
def cut_at_the_left(artifact: Artifact) -> None:
    """What is too long is cut at the start: half an answer is trained on."""
    line = artifact["lines"][0]
    start = next(n for n, label in enumerate(line["labels"]) if label != -100) + 1
    for key in ("input_ids", "labels"):
        line[key] = line[key][start:]


@mutant("ML547", "I13", says="of: user")
def prefix_difference(artifact: Artifact) -> None:
    """Every token after the encoding of system and first user message is trained on: v3 moves the system prompt."""
    line = artifact["lines"][0]
    prefix = len(encode({"messages": [*line["messages"][:3]]})["input_ids"]) - 3
    user = range(prefix, line["input_ids"].index(4, prefix) + 1)
    _label(artifact, 0, lambda n, token, label: token if n in user else label)


@mutant("ML550", "I13", says="is masked")
def span_beside_the_answer(artifact: Artifact) -> None:
    """A span of a prefix encoding lies on the system prompt; the answer that it was meant for is masked."""
    line = artifact["lines"][0]
    first = [n for n, label in enumerate(line["labels"]) if label != -100][:3]
    _label(artifact, 0, lambda n, token, label: token if 14 <= n < 17 else -100 if n in first else label)


@mutant("ML550", says="are masked")
def half_an_answer(artifact: Artifact) -> None:
    """Part of an answer is masked."""
    trained = [n for n, label in enumerate(artifact["lines"][3]["labels"]) if label != -100]
    _label(artifact, 3, lambda n, token, label: -100 if n in trained[2:4] else label)


@mutant("ML541", "I31", says="shifted by -2 tokens")
def mask_shifted_by_two(artifact: Artifact) -> None:
    """The prompt's length is short by two: every span begins and ends too early."""
    labels = artifact["lines"][0]["labels"]
    _label(artifact, 0, lambda n, token, label: token if n + 2 < len(labels) and labels[n + 2] != -100 else -100)


@mutant("ML547", "I31", says="of: user")
def prompt_of_length_two(artifact: Artifact) -> None:
    """The length of a BatchEncoding, which is 2, was taken for the prompt's."""
    _label(artifact, 3, lambda n, token, label: token if n >= 2 else -100)


@mutant("ML541", says="the id of a neighbour")
def shifted_already(artifact: Artifact) -> None:
    """Labels are shifted before the model shifts them again."""
    for line in artifact["lines"]:
        line["labels"] = [*line["labels"][1:], -100]


@mutant("ML542", says="another token's")
def foreign_label(artifact: Artifact) -> None:
    """One label is the id of another token."""
    artifact["lines"][3]["labels"][-2] = 17


@mutant("ML543", "I33", says="every token is trained on")
def assistant_only_loss_ignored(artifact: Artifact) -> None:
    """The loss is over the whole sequence."""
    for row in range(len(artifact["lines"])):
        _label(artifact, row, lambda n, token, label: token)


@mutant("ML545", says="the first of an answer")
def first_token_masked(artifact: Artifact) -> None:
    """Spans of characters leave out the space before an answer that does not fuse with it."""
    last = max(n for n, label in enumerate(artifact["lines"][2]["labels"]) if label == -100)
    assert artifact["lines"][2]["input_ids"][last + 1] == encode_text("5")[0]
    artifact["lines"][2]["labels"][last + 1] = -100


@mutant("ML548", says="[TOOL_CALLS]")
def call_without_its_marker(artifact: Artifact) -> None:
    """The marker of a tool call is taken for structure and masked."""
    _label(artifact, 1, lambda n, token, label: -100 if token == 5 else label)


@mutant("ML547", says="of: tool")
def tool_result_trained(artifact: Artifact) -> None:
    """A tool's result is trained on as if the assistant said it."""
    ids = artifact["lines"][1]["input_ids"]
    result = range(ids.index(8), ids.index(9))
    _label(artifact, 1, lambda n, token, label: token if n in result else label)


@mutant("ML549", says="of weight 0")
def weight_ignored(artifact: Artifact) -> None:
    """An answer of weight 0 is trained on."""
    row = {"messages": [{**m, "weight": 1} if "weight" in m else m for m in ROWS[2]["messages"]]}
    artifact["lines"][2]["labels"] = encode(row)["labels"]


@mutant("ML551 ML506", says="the answer of turn 1 is masked")
def last_turn_alone(artifact: Artifact) -> None:
    """The last answer alone is trained on."""
    last = max(n for n, label in enumerate(artifact["lines"][0]["labels"]) if label == -100)
    _label(artifact, 0, lambda n, token, label: -100 if n <= last else label)


@mutant("ML540")
def labels_of_another_length(artifact: Artifact) -> None:
    """Ids were padded and labels were not."""
    artifact["lines"][0]["input_ids"] += [0, 0]


# Ids


@mutant("ML521", "I03", says="BOS is there 2 times")
def double_bos(artifact: Artifact) -> None:
    """The template writes BOS, and the tokenizer adds one."""
    for line in artifact["lines"]:
        line["input_ids"].insert(0, 1)
        line["labels"].insert(0, -100)


@mutant("ML521 ML522", "I03", says="BOS is missing")
def neither_bos_nor_eos(artifact: Artifact) -> None:
    """The template's bos_token and eos_token are not set, and render as nothing."""
    line = artifact["lines"][3]
    for key in ("input_ids", "labels"):
        line[key] = line[key][1:-1]


@mutant("ML523", "I22", says="text became the control token </s>, [INST]")
def injection_in_the_user_text(artifact: Artifact) -> None:
    """A fast tokenizer finds control tokens in the text of a user."""
    line = artifact["lines"][3]
    marker, end = encode_text("[INST]"), encode_text("</s>")
    for literal, token in ((marker, 3), (end, 2)):
        at = next(n for n in range(len(line["input_ids"])) if line["input_ids"][n : n + len(literal)] == literal)
        line["input_ids"][at : at + len(literal)] = [token]
        line["labels"][at : at + len(literal)] = [-100]


@mutant("ML524 ML544 ML506", says="is there as text")
def rendered_and_encoded_again(artifact: Artifact) -> None:
    """A rendered text is encoded by a tokenizer that takes control tokens for letters."""
    line = artifact["lines"][0]
    line["input_ids"] = encode_text(render(line))
    line["labels"] = [-100] * len(line["input_ids"])


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
    for line in artifact["lines"][1:3]:
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


@mutant("ML507", "I14", says="call_1")
def call_id_of_another_vendor(artifact: Artifact) -> None:
    """Tool calls have ids that Mistral's own validation refuses."""
    text = json.dumps(artifact["lines"][1]["messages"]).replace("abcdefghi", "call_1")
    artifact["lines"][1]["messages"] = artifact["dataset"][1]["messages"] = json.loads(text)


@mutant("ML532", "I51", says="these are the ids of spm-v1")
def stale_cache(artifact: Artifact) -> None:
    """The rows were encoded with the tokenizer of another base, and kept."""
    for line in artifact["lines"]:
        if "tools" not in line:
            line.update(encode_with("spm-v1", line))


@mutant("ML532", "I51", says="these are the ids of spm-v7")
def stale_template(artifact: Artifact) -> None:
    """The rows were encoded with the template of a newer version, and kept."""
    artifact["lines"][0].update(encode_with("spm-v7", artifact["lines"][0]))


@mutant("ML532", says="its ids are others")
def other_merges(artifact: Artifact) -> None:
    """The tokenizer cuts a word in another way."""
    line = artifact["lines"][0]
    at = line["input_ids"].index(encode_text("Which")[0])
    line["input_ids"][at : at + 1] = [*encode_text("Wh"), encode_text("aich")[-1]]
    line["labels"].insert(at, -100)


@mutant("ML533", "I48", says="joined in another way")
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


@mutant("ML534", says="Red.")
def another_answer(artifact: Artifact) -> None:
    """An answer is another one."""
    messages = [*artifact["lines"][0]["messages"][:-1], {"role": "assistant", "content": "Red."}]
    artifact["lines"][0].update(encode({"messages": messages}))


@mutant("ML535", "I51", says="no text of the row")
def encodings_mixed_up(artifact: Artifact) -> None:
    """Two rows have the encodings of one another."""
    for one, other in ((0, 2), (2, 0)):
        artifact["lines"][one].update(encode(artifact["dataset"][other]))


@mutant("ML520", says="id 40000")
def added_token(artifact: Artifact) -> None:
    """A token was added to the vocabulary."""
    artifact["lines"][0]["input_ids"][3] = 40000


# The file


@mutant("ML501 ML506")
def unreadable_line(artifact: Artifact) -> None:
    """A line is cut off in the middle."""
    artifact["lines"][0] = json.dumps(artifact["lines"][0])[:100]


@mutant("ML502 ML506", says="rows are not there: 1")
def dropped_row(artifact: Artifact) -> None:
    """A row was filtered."""
    del artifact["lines"][1]


@mutant("ML502 ML506", "I58", says="was dropped: TypeError")
def refused_row(artifact: Artifact) -> None:
    """The trainer reported an error for a row."""
    artifact["lines"][1] = {"row": 1, "error": "TypeError: encode_assistant_message() missing 2 arguments"}


@mutant("ML503 ML506", says="comes again")
def doubled_row(artifact: Artifact) -> None:
    """A sampler fills the last batch with the first rows."""
    artifact["lines"].append(artifact["lines"][0])


@mutant("ML504")
def shuffled(artifact: Artifact) -> None:
    """The rows were shuffled before they were written."""
    artifact["lines"][:2] = artifact["lines"][1::-1]


@mutant("ML505", says="but of row 2")
def wrong_numbers(artifact: Artifact) -> None:
    """The rows have one another's numbers."""
    lines = artifact["lines"]
    lines[1]["row"], lines[2]["row"] = 2, 1
    lines[1:3] = lines[2:0:-1]


@mutant("ML505", says="of a dataset of 4 rows")
def foreign_row(artifact: Artifact) -> None:
    """There is a row that is not in the dataset."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    artifact["lines"].append({"row": 4, **row, **encode(row)})


# Padding and packing


@mutant("ML510", "I01")
def padding_trained(artifact: Artifact) -> None:
    """The labels are a copy of the padded ids."""
    pad(artifact["lines"][0], 2, label=2)


@mutant("ML510 ML519")
def padding_trained_without_a_mask(artifact: Artifact) -> None:
    """As before at the left, and no attention mask says which tokens are padding."""
    pad(artifact["lines"][0], 0, left=True, label=0, mask=False)


@mutant("ML511")
def padding_between_turns(artifact: Artifact) -> None:
    """Each turn was padded for itself."""
    line = artifact["lines"][0]
    line["attention_mask"] = [1] * len(line["input_ids"])
    for key, value in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
        line[key].insert(9, value)


@mutant("ML512", "I20", says="no position_ids")
def packed_without_positions(artifact: Artifact) -> None:
    """Conversations are put one after the other, and nothing keeps them apart."""
    del artifact["packed"][0]["position_ids"]


@mutant("ML512", "I20", says="expected: 0")
def positions_that_run_on(artifact: Artifact) -> None:
    """Positions do not start again."""
    artifact["packed"][0]["position_ids"] = list(range(len(artifact["packed"][0]["input_ids"])))


@mutant("ML513", "I21")
def packed_with_a_mask_of_ones(artifact: Artifact) -> None:
    """The collator adds an attention mask, so the restarting positions are ignored."""
    artifact["packed"][0]["attention_mask"] = [1] * len(artifact["packed"][0]["input_ids"])


@mutant("ML514")
def first_label_of_a_conversation(artifact: Artifact) -> None:
    """A conversation's BOS is trained on."""
    line = artifact["packed"][0]
    line["labels"][line["position_ids"].index(0, 1)] = 1


@mutant("ML531 ML506", "I53", "I34", says="conversations[2]: cut at the end")
def packed_tail_is_cut(artifact: Artifact) -> None:
    """The part of a conversation that does not fit into a sequence is thrown away."""
    for key in ("input_ids", "labels", "position_ids"):
        artifact["packed"][0][key] = artifact["packed"][0][key][:-2]


@mutant("ML515 ML506", "I53", says="conversations [2] of 3 are not there")
def packed_conversation_is_lost(artifact: Artifact) -> None:
    """A conversation did not fit and is missing."""
    artifact["packed"][0].update({**pack(ROWS[:2]), "conversations": artifact["packed"][0]["conversations"]})


@mutant("ML515 ML506", says="none of its conversations")
def packed_conversation_is_doubled(artifact: Artifact) -> None:
    """A conversation is in a sequence twice."""
    artifact["packed"][0].update(
        {**pack([*ROWS[:3], ROWS[0]]), "conversations": artifact["packed"][0]["conversations"]}
    )


@mutant("ML516")
def packed_in_another_order(artifact: Artifact) -> None:
    """The conversations are listed in another order than they stand in."""
    artifact["packed"][0].update({**pack(ROWS[2::-1]), "conversations": artifact["packed"][0]["conversations"]})


@mutant("ML546", "I01", says="conversations[0]")
def packed_eos_masked(artifact: Artifact) -> None:
    """The EOS of each answer in a sequence is masked."""
    line = artifact["packed"][0]
    line["labels"] = [-100 if label == 2 else label for label in line["labels"]]


def number_conversations(artifact: Artifact) -> list[int]:
    """Give the first packed sequence a mask with a number for each conversation, and return it."""
    line = artifact["packed"][0]
    starts = [n for n, position in enumerate(line["position_ids"]) if position == 0]
    line["attention_mask"] = [sum(start <= n for start in starts) for n in range(len(line["input_ids"]))]
    mask: list[int] = line["attention_mask"]
    return mask


@mutant("ML517", "N06", says="has the numbers 1 and 2, cut at token")
def numbers_change_a_token_too_early(artifact: Artifact) -> None:
    """The lengths of the conversations were counted before BOS was added."""
    mask = number_conversations(artifact)
    mask[:] = [*mask[1:], mask[-1]]


@mutant("ML517", "N06", says="conversation 1 has the numbers 1 and 2")
def numbers_change_a_token_too_late(artifact: Artifact) -> None:
    """The lengths of the conversations are one too long."""
    mask = number_conversations(artifact)
    mask[:] = [mask[0], *mask[:-1]]


@mutant("ML517", "N06", says="conversations 1 and 2 share the number 2")
def two_conversations_share_a_number(artifact: Artifact) -> None:
    """The last two conversations have one number, and see each other."""
    mask = number_conversations(artifact)
    mask[:] = [min(number, 2) for number in mask]


@mutant("ML517", "N06", says="has the number 2, after 3")
def numbers_go_down(artifact: Artifact) -> None:
    """The numbers go down, and kernels count the lengths of the conversations by going up."""
    mask = number_conversations(artifact)
    mask[:] = [4 - number for number in mask]


@mutant("ML517", "N06", says="conversation 0 has the numbers 1 and 2")
def numbers_cut_a_single_row(artifact: Artifact) -> None:
    """A row that is not packed is cut in two by its mask."""
    line = artifact["lines"][0]
    line["attention_mask"] = [1] * 10 + [2] * (len(line["input_ids"]) - 10)


@mutant("ML518", "N04", says="plain RoPE is assumed")
def positions_run_on_under_numbers(artifact: Artifact) -> None:
    """The mask keeps the conversations apart, and positions run on."""
    line = artifact["packed"][0]
    number_conversations(artifact)
    line["position_ids"] = list(range(len(line["input_ids"])))


@mutant("ML518", "N04", says="no position_ids, under a mask")
def no_positions_under_numbers(artifact: Artifact) -> None:
    """The mask keeps the conversations apart, and there are no positions: the model counts through."""
    number_conversations(artifact)
    del artifact["packed"][0]["position_ids"]


@mutant("ML512", says="position 0 at token 5")
def position_jumps_under_numbers(artifact: Artifact) -> None:
    """The mask keeps the conversations apart, and positions start anew within one."""
    line = artifact["packed"][0]
    number_conversations(artifact)
    line["position_ids"] = [n if n < 5 else n - 5 for n in range(len(line["input_ids"]))]


@mutant("ML519", "N07", says="the attention mask does not hide them")
def left_padding_under_a_mask_of_ones(artifact: Artifact) -> None:
    """Padding stands on the left, and the mask is 1 everywhere."""
    line = artifact["lines"][0]
    pad(line, 0, left=True, mask=False)
    line["attention_mask"] = [1] * len(line["input_ids"])


@mutant("ML519", "N07", says="no attention mask hides them")
def left_padding_without_a_mask(artifact: Artifact) -> None:
    """Padding stands on the left, and there is no mask."""
    pad(artifact["lines"][0], 2, left=True, mask=False)


@mutant("ML552", "N27", says="with the id 2, the first at")
def mask_of_ids_hides_eos(artifact: Artifact) -> None:
    """Pad is EOS, and the mask is made of the ids: it hides each EOS."""
    line = artifact["lines"][0]
    pad(line, 2)
    line["attention_mask"] = [int(token != 2) for token in line["input_ids"]]


@mutant("ML552 ML546", "N27", says="the attention mask hides 2 tokens of the row")
def mask_and_labels_of_ids_hide_eos(artifact: Artifact) -> None:
    """As before without padding, and the labels are made of the mask."""
    line = artifact["lines"][0]
    line["attention_mask"] = [int(token != 2) for token in line["input_ids"]]
    _label(artifact, 0, lambda n, token, label: -100 if token == 2 else label)


@mutant("ML552", "N27", says="the attention mask hides 1 tokens of the row with the id 1")
def mask_hides_bos(artifact: Artifact) -> None:
    """The mask is one to the right, and hides BOS."""
    artifact["lines"][0]["attention_mask"] = [0] + [1] * (len(artifact["lines"][0]["input_ids"]) - 1)


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def closed_twice(artifact: Artifact) -> None:
    """The template closes the conversation with EOS, and the trainer adds one."""
    for key in ("input_ids", "labels"):
        artifact["lines"][0][key].append(2)


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def closed_three_times(artifact: Artifact) -> None:
    """Template, tokenizer and trainer each wrote an EOS behind the last answer."""
    for line in artifact["lines"]:
        line["input_ids"] += [2, 2]
        line["labels"] += [2, 2]


@mutant("ML553", "N20", says="a second </s> stands behind an answer's own")
def each_answer_closed_twice(artifact: Artifact) -> None:
    """Each answer has one EOS more, which is not trained on."""
    line = artifact["lines"][0]
    for at in [n + 1 for n, token in enumerate(line["input_ids"]) if token == 2][::-1]:
        line["input_ids"].insert(at, 2)
        line["labels"].insert(at, -100)


@mutant("ML553", "N21", says="an answer of nothing but </s> stands after [/TOOL_RESULTS]")
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
    text = encode_text(change(_oracle().decode(ids[start:end])))
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


@mutant("ML558", "N13", says="null at $.day, which the tool does not take")
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


@mutant("ML554", "N73", says="U+0007")
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
