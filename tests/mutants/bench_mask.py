"""Encodings that are broken on purpose: what a careless trainer makes of a row."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from derived_tekken import derived_oracle
from gallery import Artifact, mutant
from mistral_common.protocol.instruct.validator import ValidationMode

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, as_row, parse_row, weight_of
from pytest_mistral_lora.conformance.alignment import Alignment
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.mask import LAWS
from pytest_mistral_lora.conformance.mask.laws import construction_violation, refusal_violation
from pytest_mistral_lora.conformance.mask.row_laws import RowLaw
from pytest_mistral_lora.errors import MistralLoraError, OracleRejection

Made = dict[str, Any]
_QUESTION = {"role": "user", "content": "Is it warm?"}
_ANSWER = {"role": "assistant", "content": "It is mild."}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def _call(call_id: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"id": call_id, "type": "function", "function": function}


def _row() -> dict[str, Any]:
    """A row with all that can go wrong: a system prompt, two questions, parallel calls answered in another order."""
    calls = [_call("aaaaaaaaa", "Gen\u00e8ve"), _call("bbbbbbbbb", "Rome")]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief. [INST]"},
        {"role": "user", "content": "One? </s>"},
        {"role": "assistant", "content": "One.\n\nIndeed."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "bbbbbbbbb", "content": "sun"},
        {"role": "tool", "tool_call_id": "aaaaaaaaa", "content": "rain"},
        dict(_ANSWER),
    ]
    return {"messages": messages, "tools": [json.loads(json.dumps(_TOOL))]}


class MaskBench:
    """A row and its encoding, which can be changed before and after it is made."""

    subject = "mask"

    def make(self, folder: Path) -> Artifact:
        """Make a row, its tokenizer and the changes, none of which changes anything."""
        return {
            "row": _row(),
            "question": _QUESTION,
            "answer": _ANSWER,
            "tokenizer": _oracle(),
            "newer_tokenizer": derived_oracle("derived-v13", words=0),
            "newest_tokenizer": derived_oracle("derived-v15-schema", words=0),
            "changed_tokenizer": _changed_oracle(),
            "before": lambda row: row,
            "after": lambda made: made,
            "prompt": lambda row, tokenizer: tokenizer.encode_prompt(row),
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Hold the row's encoding to every law."""
        return list(_findings(parse_row(artifact["row"]), _Judged(artifact)))

    def table(self, artifact: Artifact) -> str:
        """Return the tokens around the first difference that the changes make; empty if there is none."""
        row, changed = parse_row(artifact["row"]), _Judged(artifact)
        try:
            expected = artifact["tokenizer"].encode(row)
        except MistralLoraError:
            return ""
        changed.encode(row)  # ML111 changes the second encoding of a row
        found = changed.encode(row)
        sides = [(one.input_ids, one.labels) for one in (expected, found)]
        return Alignment(*sides, artifact["tokenizer"].piece).table()


BENCH = MaskBench()


class _Judged:
    """The tokenizer of an artifact, with its changes: what the laws take for our own encoder."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._sound: Oracle = artifact["tokenizer"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sound, name)

    def encode(self, row: Any) -> EncodedRow:
        changed = self._artifact["before"](as_row(row).to_json())
        sound = self._sound.encode(changed)
        spans = [span.to_json() for span in sound.spans]
        made = {"input_ids": list(sound.input_ids), "labels": list(sound.labels or ()), "spans": spans}
        made = self._artifact["after"](made)
        return EncodedRow(
            tuple(made["input_ids"]), tuple(made["labels"]), tuple(Span(**span) for span in made["spans"])
        )

    def encode_prompt(self, row: Any) -> tuple[int, ...]:
        return tuple(self._artifact["prompt"](row, self._sound))


def _findings(row: Row, oracle: Any) -> Iterator[Finding]:
    for rule, violation in (
        ("ML121", construction_violation(row, oracle)),
        ("ML120", "" if construction_violation(row, oracle) else refusal_violation(row, oracle)),
    ):
        if violation:
            yield Finding(rule, violation, row=row.to_jsonl())
    try:
        encoded = oracle.encode(row)
        oracle.reference(row)
    except Exception:  # a row that is refused has no encoding to hold to a law
        return
    for law in LAWS:
        violation = law.violation(row, encoded, oracle) if _speaks_of(law, row, oracle) else ""
        if violation:
            yield Finding(law.rule, violation, row=row.to_jsonl())


def _speaks_of(law: RowLaw, row: Row, oracle: Any) -> bool:
    roles = [message["role"] for message in row.messages]
    alternate = all(pair != ("assistant", "assistant") for pair in itertools.pairwise(roles))
    weights = {weight_of(message) for message in row.messages if message["role"] == "assistant"}
    if law.unfit(oracle):
        return False
    return (law.rule != "ML107" or weights == {1}) and (law.rule != "ML108" or alternate)


@functools.cache
def _oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@functools.cache
def _changed_oracle() -> Oracle:
    """A tokenizer whose messages are encoded by another method than the one that is listened to."""
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    unheard = type(oracle._instruct).encode_assistant_message.__get__(oracle._instruct)
    oracle._instruct.encode_assistant_message = unheard
    return oracle


def supervised(made: Made, choose: Callable[[Made], bool]) -> Made:
    """Label an encoding by the spans that are chosen."""
    spans = [span | {"supervised": bool(choose(span))} for span in made["spans"]]
    return made | {"spans": spans, "labels": _labels(made["input_ids"], spans)}


def with_ids(made: Made, at: int, ids: Any) -> Made:
    """Put other ids in the place of one, and move what follows."""
    moved = len(ids) - 1
    changed = [*made["input_ids"][:at], *ids, *made["input_ids"][at + 1 :]]
    spans = [
        span | {"start": span["start"] + moved * (span["start"] > at), "end": span["end"] + moved * (span["end"] > at)}
        for span in made["spans"]
    ]
    return made | {"input_ids": changed, "spans": spans, "labels": _labels(changed, spans)}


def _labels(ids: list[int], spans: list[Made]) -> list[int]:
    return [
        token if span["supervised"] else IGNORE_INDEX for span in spans for token in ids[span["start"] : span["end"]]
    ]


def marker_apart(made: Made) -> Made:
    """Take the marker of each tool call out of the loss."""
    spans: list[Made] = []
    for span in made["spans"]:
        if span["kind"] == "tool_call":
            spans.append(span | {"end": span["start"] + 1, "kind": "control", "supervised": False})
            span = span | {"start": span["start"] + 1}
        spans.append(span)
    return made | {"spans": spans, "labels": _labels(made["input_ids"], spans)}


def said(row: Made, change: Callable[[str], str]) -> Made:
    """Change each text of a row."""
    messages = [
        message | {"content": change(message["content"])} if message.get("content") else message
        for message in row["messages"]
    ]
    return row | {"messages": messages}


def told(tool: Made, description: str) -> Made:
    """Describe a tool."""
    return tool | {"function": tool["function"] | {"description": description}}


def pasted(row: Made) -> Made:
    """Give arguments that are a string as a string within JSON, so that they are encoded as they are written."""
    messages = json.loads(json.dumps(row["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return row | {"messages": messages}


def renamed(row: Made) -> Made:
    """Give the calls of a row the ids of the results, in order, as a trainer does that pairs them by place."""
    messages = json.loads(json.dumps(row["messages"]))
    results = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for call, call_id in zip(calls, results, strict=False):
        call["id"] = call_id
    return row | {"messages": messages}


@mutant("ML101 ML104 ML107")
def _labels_shifted(artifact: Artifact) -> None:
    """The labels are shifted by one."""
    artifact["after"] = lambda made: made | {"labels": [IGNORE_INDEX, *made["labels"][:-1]]}


@mutant("ML101 ML107")
def _labels_of_other_ids(artifact: Artifact) -> None:
    """The labels are the ids of other tokens."""
    artifact["after"] = lambda made: made | {"labels": [label + (label > 2) for label in made["labels"]]}


@mutant("ML101 ML104 ML107")
def _labels_too_few(artifact: Artifact) -> None:
    """There are fewer labels than ids."""
    artifact["after"] = lambda made: made | {"labels": made["labels"][:-1]}


@mutant("ML101 ML104")
def _a_hole_in_the_spans(artifact: Artifact) -> None:
    """A span is missing, so that some tokens have no owner."""
    artifact["after"] = lambda made: made | {"spans": [span for span in made["spans"] if span["kind"] != "eos"]}


@mutant("ML102 ML107")
def _the_user_is_supervised(artifact: Artifact) -> None:
    """The user's tokens are supervised too."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] in ("user", "assistant"))


@mutant("ML102 ML105 ML107")
def _bos_is_supervised(artifact: Artifact) -> None:
    """BOS is supervised."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] in (None, "assistant"))


@mutant("ML103 ML107", "I04")
def _a_mask_of_zeros(artifact: Artifact) -> None:
    """The template marks no answer, and the mask is all zeros."""
    artifact["after"] = lambda made: supervised(made, lambda span: False)


@mutant("ML103 ML107", "I05")
def _the_marker_is_searched_for(artifact: Artifact) -> None:
    """The collator searches for the ids of the marker alone; inside a row they differ, so it finds nothing."""
    marker = list(artifact["tokenizer"].encode_text("[/INST]"))

    def after(made: Made) -> Made:
        ids = made["input_ids"]
        found = [n for n in range(len(ids)) if ids[n : n + len(marker)] == marker]
        return supervised(made, lambda span: bool(found) and span["start"] >= found[0])

    artifact["after"] = after


@mutant("ML101 ML104 ML107", "I13")
def _a_mask_from_prefixes(artifact: Artifact) -> None:
    """Each answer is the difference of the prefix that ends with it and the prefix before it."""
    tokenizer, rows = artifact["tokenizer"], []
    artifact["before"] = lambda row: rows.append(row) or row

    def after(made: Made) -> Made:
        labels = [IGNORE_INDEX] * len(made["input_ids"])
        messages = rows[-1]["messages"]
        for index in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
            prefix = rows[-1] | {"messages": messages[: index + 1]}
            place = slice(len(tokenizer.encode_prompt(prefix)), len(tokenizer.encode(prefix).input_ids))
            labels[place] = made["input_ids"][place]
        return made | {"labels": labels}

    artifact["after"] = after


@mutant("ML103")
def _weights_are_ignored(artifact: Artifact) -> None:
    """An answer of weight 0 is trained on."""
    artifact["row"]["messages"][2]["weight"] = 0
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] == "assistant")


@mutant("ML103 ML107 ML117")
def _only_the_last_answer(artifact: Artifact) -> None:
    """Only the last answer is supervised, though every one has weight 1."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["turn"] == made["spans"][-1]["turn"])


@mutant("ML103 ML104 ML107", "I01")
def _eos_is_masked(artifact: Artifact) -> None:
    """The pad id is masked, and pad is EOS."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["supervised"] and span["kind"] != "eos")


@mutant("ML104 ML117 ML119", "I02")
def _eos_is_missing(artifact: Artifact) -> None:
    """The row ends without EOS."""

    def after(made: Made) -> Made:
        return {name: values[:-1] for name, values in made.items()}

    artifact["after"] = after


@mutant("ML105 ML112 ML119", "I03")
def _bos_twice(artifact: Artifact) -> None:
    """The template writes BOS, and the tokenizer adds another."""
    bos = artifact["tokenizer"].bos_id
    artifact["after"] = lambda made: with_ids(made, 0, [bos, bos])


@mutant("ML105 ML107 ML112 ML119")
def _no_bos(artifact: Artifact) -> None:
    """BOS is left out: a space stands in its place."""
    space = artifact["tokenizer"].encode_text(" ")
    artifact["after"] = lambda made: with_ids(made, 0, space)


@mutant("ML106 ML112 ML119", "I22")
def _a_user_forges_eos(artifact: Artifact) -> None:
    """The text </s> of a user becomes EOS."""
    eos = artifact["tokenizer"].eos_id

    def after(made: Made) -> Made:
        text = next(span for span in made["spans"] if span["role"] == "user" and span["kind"] == "text")
        return with_ids(made, text["end"] - 1, [eos])

    artifact["after"] = after


@mutant("ML103 ML104 ML107 ML109")
def _a_turn_is_taken_for_another(artifact: Artifact) -> None:
    """A tool's turn is taken for the assistant's, by its spans too."""

    def after(made: Made) -> Made:
        spans = [span | {"role": "assistant"} if span["role"] == "tool" else span for span in made["spans"]]
        return supervised(made | {"spans": spans}, lambda span: span["role"] == "assistant")

    artifact["after"] = after


@mutant("ML108 ML109 ML112 ML116 ML119")
def _weights_in_the_text(artifact: Artifact) -> None:
    """The weight of an answer is written into the prompt."""
    question, answer = artifact["question"], artifact["answer"]
    artifact["row"] = {"messages": [question, answer | {"weight": 0}, question, answer]}
    artifact["before"] = lambda row: (
        row | {"messages": [m | {"content": f"{m['content']} {m.get('weight', '')}"} for m in row["messages"]]}
    )


@mutant("ML109 ML117 ML119")
def _another_answer(artifact: Artifact) -> None:
    """Another word is supervised than the assistant's text has."""
    never = artifact["tokenizer"].encode_text("Never")[:1]
    artifact["after"] = lambda made: with_ids(made, made["spans"][-2]["start"], never)


@mutant("ML109 ML116 ML119", "I59")
def _answers_are_stripped(artifact: Artifact) -> None:
    """White space around an answer is stripped; Mistral strips spaces at its end only."""
    artifact["row"]["messages"][-1]["content"] = "\n  It is mild.\n"
    artifact["before"] = lambda row: said(row, str.strip)


@mutant("ML103 ML104 ML107 ML110")
def _a_call_without_its_marker(artifact: Artifact) -> None:
    """The marker of a tool call carries no loss."""
    artifact["after"] = marker_apart


@mutant("ML111 ML116 ML117")
def _another_encoding_each_time(artifact: Artifact) -> None:
    """Every second encoding is another one."""
    seen: list[Made] = []
    artifact["after"] = lambda made: (
        seen.append(made) or (supervised(made, lambda span: False) if len(seen) % 2 else made)
    )


@mutant("ML112")
def _another_prompt(artifact: Artifact) -> None:
    """The prompt at inference lacks BOS."""
    artifact["prompt"] = lambda row, tokenizer: tokenizer.encode_prompt(row)[1:]


@mutant("ML110 ML112 ML113 ML119")
def _arguments_are_pasted(artifact: Artifact) -> None:
    """Arguments that are a string are encoded as the text that they are."""
    artifact["before"] = pasted


@mutant("ML112 ML114 ML119")
def _strict_is_shown(artifact: Artifact) -> None:
    """The model is shown whether a tool is strict."""
    artifact["before"] = lambda row: (
        row | {"tools": [told(tool, str(tool["function"].get("strict"))) for tool in row["tools"]]}
    )


@mutant("ML112 ML115 ML119")
def _results_are_paired_by_place(artifact: Artifact) -> None:
    """Results are paired with calls by their place instead of their id."""
    artifact["tokenizer"] = artifact["newer_tokenizer"]
    artifact["before"] = renamed


@mutant("ML116", "I48")
def _neighbours_are_joined_by_a_line(artifact: Artifact) -> None:
    """Neighbouring messages are joined by one line break instead of two."""
    artifact["before"] = lambda row: row | {"messages": list(_joined(row["messages"], "\n"))}


def _joined(messages: list[Made], joint: str) -> Iterator[Made]:
    for role, run in itertools.groupby(messages, key=lambda message: message["role"]):
        group = list(run)
        if role in ("user", "assistant") and len(group) > 1:
            yield group[0] | {"content": joint.join(message["content"] for message in group)}
        else:
            yield from group


@mutant("ML120", "I48", says="mistral-common raises nothing")
def _neighbours_are_refused(artifact: Artifact) -> None:
    """A second question straight after the first is refused."""
    artifact["row"] = {"messages": [artifact["question"], artifact["question"], artifact["answer"]]}

    def before(row: Made) -> Made:
        roles = [message["role"] for message in row["messages"]]
        if any(pair == ("user", "user") for pair in itertools.pairwise(roles)):
            raise OracleRejection("Conversation roles must alternate user/assistant/user/assistant/...")
        return row

    artifact["before"] = before


@mutant("ML112 ML118 ML119", "I12")
def _no_system_prompt(artifact: Artifact) -> None:
    """The system prompt is dropped."""
    artifact["before"] = lambda row: row | {"messages": [m for m in row["messages"] if m["role"] != "system"]}


@mutant("ML112 ML119", "I12")
def _the_system_prompt_in_the_first_question(artifact: Artifact) -> None:
    """The system prompt is put into the first question; version 3 has it beside the last."""

    def before(row: Made) -> Made:
        first, *rest = row["messages"]
        if first["role"] != "system":
            return row
        question = rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}
        return row | {"messages": [question, *rest[1:]]}

    artifact["before"] = before


@mutant("ML120", "I14", says="InvalidFunctionCallException")
def _any_call_id_is_accepted(artifact: Artifact) -> None:
    """Ids of another form are rewritten into the accepted form, so you train on a row that no server takes."""
    messages = artifact["row"]["messages"]
    messages[4]["tool_calls"][0]["id"] = messages[6]["tool_call_id"] = "call_1"

    def before(row: Made) -> Made:
        return json.loads(json.dumps(row).replace('"call_1"', '"callcall1"'))

    artifact["before"] = before


@mutant("ML120", "I47", says="InvalidMessageStructureException is raised; mistral-common raises nothing")
def _validated_for_serving(artifact: Artifact) -> None:
    """Rows are validated for serving, and there no row ends with an answer."""
    tokenizer = artifact["tokenizer"]
    artifact["before"] = lambda row: tokenizer._run(as_row(row), ValidationMode.test) and row


@mutant("ML121", "I58", says="builds a conversation in a way that this package does not know")
def _the_encoders_have_moved(artifact: Artifact) -> None:
    """mistral-common encodes messages with a method of an unknown name."""
    artifact["tokenizer"] = artifact["changed_tokenizer"]


def thinking_row() -> Made:
    """A row with all that only the newest tokenizers encode: thinking, an effort, a schema, a result in chunks."""
    thought, text = {"type": "thinking", "thinking": "Rome is one."}, {"type": "text", "text": "It is mild."}
    result = [{"type": "text", "text": "12"}, {"type": "text", "text": " degrees"}]
    schema = {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"type": "string"}}}
    messages = [
        _QUESTION,
        {"role": "assistant", "tool_calls": [_call("call_1", "Rome")]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
        {"role": "assistant", "content": [thought, text]},
    ]
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    return {"messages": messages, "tools": [_TOOL], "reasoning_effort": "high", "response_format": asked}


def of_newest(artifact: Artifact, before: Callable[[Made], Made]) -> None:
    """Encode a row with thinking and settings by the newest version, after a change."""
    artifact["tokenizer"], artifact["row"] = artifact["newest_tokenizer"], thinking_row()
    artifact["before"] = before


def with_ids_in_names(row: Made) -> Made:
    """Write the id of each call behind its name."""
    row = json.loads(json.dumps(row))
    for call in (call for message in row["messages"] for call in message.get("tool_calls", ())):
        call["function"]["name"] += f"-{call['id']}"
    return row


def first_chunks(row: Made) -> Made:
    """Keep the first chunk of each tool result."""
    messages = [
        message | {"content": message["content"][:1]} if message["role"] == "tool" else message
        for message in row["messages"]
    ]
    return row | {"messages": messages}


def thinking_as_text(row: Made) -> Made:
    """Encode each thought as a text of the answer."""
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for chunk in message["content"] if isinstance(message.get("content"), list) else ():
            if chunk["type"] == "thinking":
                chunk.update(type="text", text=chunk.pop("thinking"))
    return row


def left_open(row: Made) -> Made:
    """Leave each thought open."""
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for chunk in message["content"] if isinstance(message.get("content"), list) else ():
            if chunk["type"] == "thinking":
                chunk["closed"] = False
    return row


def without(row: Made, key: str) -> Made:
    """Leave out a key of a row."""
    return {name: value for name, value in row.items() if name != key}


@mutant("ML112 ML119 ML122", says="the tool calls have other ids")
def _ids_of_calls_are_written(artifact: Artifact) -> None:
    """The id of each call is written behind its name, as version 11 has it in a place of its own."""
    of_newest(artifact, with_ids_in_names)


@mutant("ML112 ML119 ML123", says="'12 degrees' is in no turn of a tool")
def _the_first_chunk_of_a_result(artifact: Artifact) -> None:
    """Of a result in chunks, the first is encoded."""
    of_newest(artifact, first_chunks)


@mutant("ML112 ML119 ML124", says="the settings show reasoning_effort 'none'; the row has 'high'")
def _the_effort_is_left_out(artifact: Artifact) -> None:
    """A trainer knows messages and tools, and leaves the other keys of a row out."""
    of_newest(artifact, lambda row: without(row, "reasoning_effort"))


@mutant("ML112 ML119 ML124", says="the settings show json_schema None")
def _the_schema_is_left_out(artifact: Artifact) -> None:
    """The response format of a row is left out."""
    of_newest(artifact, lambda row: without(row, "response_format"))


@mutant("ML116 ML119 ML125", says="has the markers none")
def _thinking_is_text(artifact: Artifact) -> None:
    """Thinking is encoded as the beginning of the answer."""
    of_newest(artifact, thinking_as_text)


@mutant("ML119 ML125", says="has the markers [THINK]; its thoughts have [THINK] [/THINK]")
def _thinking_never_ends(artifact: Artifact) -> None:
    """The end of each thought is left out."""
    of_newest(artifact, left_open)
