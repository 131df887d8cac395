"""Golden transcripts: a prompt and the greedy answer of a model, token by token, one case a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.completions import FormatCheck, schema_violation
from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.records import prompt_kind
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import RecordKind, Row, compact_json
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import Written, put_text, require_folder, write_text
from pytest_mistral_lora.records.goldens import golden_paths
from pytest_mistral_lora.records.schema import RECORD, RecordSchema, Violation, require_valid

TRANSCRIPTS = "transcripts"
"""Folder of a finished run that holds its transcripts."""

SCHEMA_VERSION = 2
"""Version 1 sorted the keys of tools and arguments, and so lost their order in the prompt."""
_IDS = ("prompt_ids", "completion_ids", "runner_up_ids")
SCHEMA = RecordSchema(Path(__file__).with_name("transcript.schema.json"))


@dataclass(frozen=True, slots=True)
class Transcript:
    """One prompt with its greedy completion.

    Attributes:
        case: Name of the case, and of its file.
        row: The conversation, or the fill-in-the-middle row, with its own answer.
        prompt_ids: Ids that the answer follows, as training would encode them.
        completion_ids: Generated ids, a closing EOS included.
        text: The completion as text, without control tokens.
        stop: `eos`, or `length` if `max_new_tokens` was reached.
        max_new_tokens: Longest completion, in tokens.
        logprobs: Log-probability of each completion token given all before it, in nats, from one forward pass.
        margins: The lead of each over the best other token, in nats; negative if generation, which sums in another
            order, chose a token that the forward pass ranks second.
        runner_up_ids: The best other token at each place.
        checks: Format checks as plain data, each with `passed` and `reason`.
        model: Identity of the model: `kind`, `tensors_sha256`, `base`, `revision`, `base_weights_sha256`.
        tokenizer: `backend`, `version`, `file` and `sha256`.
        recorded_with: Versions of the libraries that decide ids and logits.
        device: `cpu` or `cuda`.
        precision: dtype of the weights, `fp32`, `bf16` or `fp16`.
    """

    case: str
    row: Row
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    text: str
    stop: Literal["eos", "length"]
    max_new_tokens: int
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    runner_up_ids: tuple[int, ...]
    checks: tuple[Mapping[str, Any], ...]
    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    recorded_with: Mapping[str, str]
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16", "fp16"]

    @property
    def format_checks(self) -> tuple[FormatCheck, ...]:
        """The checks that the completion was judged by."""
        return tuple(FormatCheck.from_json(check) for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the transcript as plain JSON data, in the order of its file."""
        # the last turn of the row is the expected answer, not a part of the prompt
        start = self.row.assistant_groups()[-1][0]
        return {
            "schema_version": SCHEMA_VERSION,
            "case": self.case,
            "row": self.row.prompt_json(),
            "answer": [dict(message) for message in self.row.messages[start:]],
            "prompt_ids": list(self.prompt_ids),
            "completion_ids": list(self.completion_ids),
            "text": self.text,
            "stop": self.stop,
            "max_new_tokens": self.max_new_tokens,
            "logprobs": list(self.logprobs),
            "margins": list(self.margins),
            "runner_up_ids": list(self.runner_up_ids),
            "checks": [dict(check) for check in self.checks],
            "model": dict(self.model),
            "tokenizer": dict(self.tokenizer),
            "recorded_with": dict(self.recorded_with),
            "device": self.device,
            "precision": self.precision,
        }

    def to_text(self) -> str:
        """Return the file's text: a line of JSON without spaces for each field, so that a diff shows the change."""
        # keys unsorted: a tokenizer encodes tools and arguments in the order of the row
        lines = (f"{json.dumps(key)}: {compact_json(value)}" for key, value in self.to_json().items())
        return "{\n  " + ",\n  ".join(lines) + "\n}\n"

    def require_ids_below(self, vocab_size: int) -> None:
        """Refuse a transcript with ids that a model does not have: torch would read beyond its tables.

        Args:
            vocab_size: Rows of the model's embeddings.

        Raises:
            InputError: With the first such id.
        """
        for name in _IDS:
            ids: tuple[int, ...] = getattr(self, name)
            place = next((index for index, token in enumerate(ids) if token >= vocab_size), None)
            if place is not None:
                raise InputError(
                    f"the id {ids[place]}, which the model does not have",
                    place=Place.of(f"transcript {self.case}").within(name, place),
                    expected=f"ids below {vocab_size}",
                    next_step="Record it again with this model: mistral-lora smoke DIR --rows ROWS --record FOLDER",
                )

    def write(self, folder: Path) -> Path:
        """Write the transcript into a folder, atomically, and return its file."""
        file = folder / f"{self.case}.json"
        write_text(file, self.to_text())
        return file

    def put(self, file: Path, before: Transcript | None) -> Written:
        """Write the transcript to a file, unless the file differs from it only in library versions.

        Args:
            file: The file, `<case>.json`.
            before: The transcript in the file; None if there is no file.

        Raises:
            InputError: If it cannot be written.
        """
        # an upgrade that changes no result should change no file
        same = before is not None and replace(before, recorded_with=self.recorded_with) == self
        return put_text(file, self.to_text(), keep=same)


def load(file: Path) -> Transcript:
    """Read a transcript.

    Raises:
        InputError: If it cannot be read, or is not a transcript; every violation is named with its JSON path.
    """
    data = read_json(file)
    require_valid(violations(data, file.stem), "golden transcript", file)
    values = {name: data[name] for name in Transcript.__slots__ if name not in ("row", "checks")}
    # in JSON, 2.0 is an integer and 0 a number; torch tells them apart
    values |= {name: tuple(map(int, data[name])) for name in _IDS}
    values |= {name: tuple(map(float, data[name])) for name in ("logprobs", "margins")}
    values["max_new_tokens"] = int(data["max_new_tokens"])
    return Transcript(row=_whole_row(data), checks=tuple(data["checks"]), **values)


def load_folder(folder: Path) -> list[Transcript]:
    """Read every transcript of a folder, by name; or a single file.

    Raises:
        InputError: If the folder has no transcript, or a file is not one.
    """
    if folder.name == TRANSCRIPTS:
        require_folder(folder.parent)
    found = [folder] if folder.is_file() else golden_paths(folder)
    if not found:
        missing = "no transcripts" if folder.is_dir() else "no such folder"
        raise InputError(
            missing,
            place=str(folder),
            next_step="Record some: mistral-lora smoke DIR --record FOLDER --rows ROWS.jsonl, or train with "
            "evaluation.generations.",
        )
    return [load(file) for file in found]


def violations(data: Any, case: str) -> list[Violation]:
    """Return the violations of a transcript: of its schema, or else its contradictions; empty for a valid one."""
    found = SCHEMA.violations(data)
    if found:
        return found
    if data["case"] != case:
        found.append(Violation(RECORD / "case", f"{data['case']!r}, but the file is {case}.json"))
    tokens = len(data["completion_ids"])
    for name in ("logprobs", "margins", "runner_up_ids"):
        if len(data[name]) != tokens:
            found.append(Violation(RECORD / name, f"{len(data[name])} values for {tokens} tokens"))
    if tokens > data["max_new_tokens"] or (data["stop"] == "length" and tokens < data["max_new_tokens"]):
        length = f"{tokens} tokens, stopped by {data['stop']}, of at most {data['max_new_tokens']}"
        found.append(Violation(RECORD / "completion_ids", length))
    for index, check in enumerate(data["checks"]):
        if check["passed"] == bool(check["reason"]):
            reason = f"passed is {check['passed']}, and the reason {check['reason']!r}"
            found.append(Violation(RECORD.within("checks", index), reason))
        wrong = schema_violation(check["value"]) if check["kind"] == "json_schema" else ""
        if wrong:
            found.append(Violation(RECORD.within("checks", index, "value"), f"not a JSON Schema: {wrong}"))
    # other keys are the user's own in a dataset; in a transcript, a misspelt one would ask in another way
    known = _kind_of(data).keys
    found += (
        Violation(RECORD.within("row", key), f"{value!r:.80}", "no such key")
        for key, value in data["row"].items()
        if key not in known
    )
    if prompt_kind(data["row"]) is None and "messages" not in data["row"]:
        return [*found, Violation(RECORD.within("row", "messages"), "", "Messages in order.")]
    try:
        row = _whole_row(data)
    except RowError as error:
        return [*found, Violation(RECORD / "row", str(error))]
    if len(row.messages) - row.assistant_groups()[-1][0] != len(data["answer"]):
        found.append(Violation(RECORD / "answer", "it is not the last assistant turn of the conversation"))
    return found


def _whole_row(data: Mapping[str, Any]) -> Row:
    return _kind_of(data).answered(data["row"], data["answer"])


def _kind_of(data: Mapping[str, Any]) -> RecordKind:
    return prompt_kind(data["row"]) or CONVERSATION
