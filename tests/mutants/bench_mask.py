"""The bench of the subject `mask`: a row and its encoding, each of which a careless trainer changes."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from derived_tekken import derived_oracle
from gallery import Artifact

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.mask.checks import ENCODING, LABELS, LAWS
from pytest_mistral_lora.conformance.mask.laws import construction_violation, refusal_violation
from pytest_mistral_lora.conformance.mask.row_laws import RowLaw
from pytest_mistral_lora.errors import MistralLoraError

Made = dict[str, Any]
QUESTION = {"role": "user", "content": "Is it warm?"}
_ANSWER = {"role": "assistant", "content": "It is mild."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def weather_call(call_id: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"id": call_id, "type": "function", "function": function}


def _row() -> dict[str, Any]:
    """A row with all that can go wrong: a system prompt, two questions, parallel calls answered in another order."""
    calls = [weather_call("aaaaaaaaa", "Gen\u00e8ve"), weather_call("bbbbbbbbb", "Rome")]
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
    return {"messages": messages, "tools": [json.loads(json.dumps(TOOL))]}


class MaskBench:
    """A row and its encoding, which can be changed before and after it is made."""

    subject = "mask"

    def make(self, folder: Path) -> Artifact:
        """Make a row, its tokenizer and the changes, none of which changes anything."""
        return {
            "row": _row(),
            "question": QUESTION,
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
        found = changed.encode(row)
        sides = [(one.input_ids, one.labels) for one in (expected, found)]
        return TokenDiff.of(*sides, artifact["tokenizer"].piece).table()


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
    if violation := construction_violation(row, oracle) or refusal_violation(row, oracle):
        yield Finding("ML107", violation, row=row.to_jsonl())
    try:
        encoded = oracle.encode(row)
        oracle.reference(row)
    except Exception:  # a row that is refused has no encoding to hold to a law
        return
    for law in (*LAWS, ENCODING):
        violation = law.violation(row, encoded, oracle) if _speaks_of(law, row, oracle) else ""
        if violation:
            yield Finding(law.rule, violation, row=row.to_jsonl())


def _speaks_of(law: RowLaw, row: Row, oracle: Any) -> bool:
    roles = [message["role"] for message in row.messages]
    alternate = all(pair != ("assistant", "assistant") for pair in itertools.pairwise(roles))
    weights = {weight_of(message) for message in row.messages if message["role"] == "assistant"}
    if law.unfit(oracle):
        return False
    return (law is not LABELS or weights == {1}) and (law.rule != "ML108" or alternate)


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
