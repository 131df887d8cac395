"""Lines without messages: their conversations, read back from the ids."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_mistral_lora.chat.diff import decode_text
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, Ids, likely_tokens
from pytest_mistral_lora.conformance.encoded.packing import cut_at_starts
from pytest_mistral_lora.conformance.encoded.row_faults import other_oracles
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import OracleRejection


@dataclass(frozen=True, slots=True)
class ReadLine:
    """A line whose conversations were read back.

    Attributes:
        line: The line with its conversations.
        expected: mistral-common's encoding of each; of a conversation that cannot be read, the line's own ids, so that
            the others can be judged. Empty if no conversation can be read.
        findings: A finding for each conversation that cannot be read.
        without_labels: Number of answers that were read with the weight 0.
    """

    line: EncodedLine
    expected: tuple[EncodedRow, ...]
    findings: tuple[Finding, ...]
    without_labels: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The ids of one conversation.

    Attributes:
        place: The place of the conversation.
        tokens: The index of each token in the line.
        ids: Its ids.
        labels: Its labels; fewer than ids if the line has fewer.
    """

    place: str
    tokens: Ids
    ids: Ids
    labels: Ids


def read_line(line: EncodedLine, oracle: Oracle, path: Path) -> ReadLine:
    """Read the conversations of a line back from its ids.

    Args:
        line: A line with ids alone.
        oracle: Mistral's own tokenization.
        path: The file or folder, for the next step.
    """
    rows: list[Row] = []
    expected: list[EncodedRow] = []
    findings: list[Finding] = []
    stretches = list(_stretches_of(line, oracle))
    for stretch in stretches:
        try:
            row = read_back(stretch.ids, oracle, stretch.labels, place=stretch.place)
            encoded = oracle.encode(row)
        except UnreadableIdsError as error:
            findings.append(_unreadable(stretch, error, oracle, path))
        except OracleRejection as error:
            findings.append(Finding("ML507", error.found, error.place, error.expected, row=row.to_jsonl()))
        else:
            rows.append(row)
            expected.append(encoded)
            continue
        rows.append(Row(()))
        expected.append(EncodedRow(stretch.ids, stretch.labels, ()))
    if len(findings) == len(stretches):
        return ReadLine(line, (), tuple(findings), 0)
    answers = [message for row in rows for message in row.messages if message["role"] == "assistant"]
    weightless = sum(not weight_of(message) for message in answers)
    line = replace(line, rows=tuple(rows), packed=len(rows) > 1)
    return ReadLine(line, tuple(expected), tuple(findings), weightless)


def _stretches_of(line: EncodedLine, oracle: Oracle) -> Iterator[_Stretch]:
    real = likely_tokens(line, oracle)
    ids = tuple(line.input_ids[n] for n in real)
    positions = None if line.position_ids is None else tuple(line.position_ids[n] for n in real)
    cuts = cut_at_starts(ids, positions, oracle)
    for number, (start, end) in enumerate(cuts or [(0, 0)]):
        place = f"{line.place}, conversations[{number}]" if len(cuts) > 1 else line.place
        labels = tuple(line.labels[n] for n in real[start:end] if n < len(line.labels))
        yield _Stretch(place, real[start:end], ids[start:end], labels)


def _unreadable(stretch: _Stretch, error: UnreadableIdsError, oracle: Oracle, path: Path) -> Finding:
    """Return the finding of ids that cannot be read: by their tokenizer if another one reads them."""
    for name, other in other_oracles(oracle):
        if _reads(stretch.ids, other):
            found = f"these are the ids of {name} ({SHIPPED[name]})"
            return Finding("ML532", found, stretch.place, f"those of {oracle.path.name}")
    starts_with_text = stretch.ids and stretch.ids[0] not in oracle.control_tokens
    if starts_with_text and decode_text(stretch.ids[:20], oracle).lstrip().startswith("<s>"):
        return Finding("ML524", "<s> is there as text, not as control token", stretch.place)
    token = stretch.tokens[error.token] if error.token < len(stretch.tokens) else _end(stretch.tokens)
    step = f"mistral-lora audit {shlex.quote(str(path))} --tokenizer PATH --dataset rows.jsonl"
    return Finding(
        "ML560",
        f"token {token}: {error.found}",
        stretch.place,
        error.expected,
        f"If the rows that the ids were made of are at hand, judge the ids by them: {step}",
    )


def _reads(ids: Ids, oracle: Oracle) -> bool:
    """Return whether a tokenizer encodes some conversation to these ids."""
    try:
        return oracle.encode(read_back(ids, oracle)).input_ids == ids
    except (UnreadableIdsError, OracleRejection):
        return False


def _end(tokens: Sequence[int]) -> int:
    return tokens[-1] + 1 if tokens else 0
