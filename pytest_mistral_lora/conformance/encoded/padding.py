"""Padding of an encoded row: where it is, and whether anything is trained on there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.fault_classes import Fault
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine

_PADS = ("<pad>", "[PAD]", "<unk>")


@dataclass(frozen=True, slots=True)
class Padding:
    """Which tokens of a line are padding.

    Attributes:
        real: Indices of the tokens that are not, in order.
        padded: Indices of those that are.
    """

    real: tuple[int, ...]
    padded: tuple[int, ...] = ()

    def faults(self, line: EncodedLine) -> Iterator[Fault]:
        """Yield what is wrong with the padding of the line."""
        inside = [n for n in self.padded if self.real and self.real[0] < n < self.real[-1]]
        if inside:
            found = f"{len(inside)} padding tokens stand between others, the first at token {inside[0]}"
            yield Fault("ML511", found, "padding at one end")
        trained = [n for n in self.padded if n < len(line.labels) and line.labels[n] != IGNORE_INDEX]
        if trained:
            found = f"{len(trained)} of {len(self.padded)} padding tokens are trained on, the first at {trained[0]}"
            yield Fault("ML510", found, "-100")


def padding_of(line: EncodedLine, expected: tuple[int, ...], oracle: Oracle) -> Padding:
    """Return what is padding: by the attention mask where it has zeros, else by what stands around the row.

    Args:
        line: The line.
        expected: The ids that the line should have without padding.
        oracle: Mistral's own tokenization.
    """
    ids, mask = line.input_ids, line.attention_mask
    everything = range(len(ids))
    if mask is not None and 0 in mask:
        return _apart(ids, [n for n in everything if mask[n] == 0])
    if ids == expected:
        return Padding(tuple(everything))
    exact = _around(line, expected, oracle)
    return _apart(ids, exact if exact is not None else _runs(line, oracle))


def _apart(ids: tuple[int, ...], padded: list[int]) -> Padding:
    pads = set(padded)
    return Padding(tuple(n for n in range(len(ids)) if n not in pads), tuple(padded))


def _around(line: EncodedLine, expected: tuple[int, ...], oracle: Oracle) -> list[int] | None:
    """Return the padding where without it the ids are the expected ones; None where they are not."""
    ids = line.input_ids
    extra = len(ids) - len(expected)
    if extra <= 0 or not expected:
        return None
    for padded in (range(len(expected), len(ids)), range(extra)):
        tokens = {ids[n] for n in padded}
        rest = ids[: len(expected)] if padded.start else ids[extra:]
        if rest == expected and len(tokens) == 1 and _can_pad(tokens.pop(), padded, line, oracle):
            return list(padded)
    pads = _pad_ids(oracle)
    inside = [n for n, token in enumerate(ids) if token in pads]
    return inside if tuple(token for token in ids if token not in pads) == expected else None


def _can_pad(token: int, padded: range, line: EncodedLine, oracle: Oracle) -> bool:
    """Return whether a run of a token beside a whole row is padding, not a second BOS or a second EOS."""
    if token == oracle.bos_id or (token not in oracle.control_tokens and token != oracle.unk_id):
        return False
    quiet = all(line.labels[n] == IGNORE_INDEX for n in padded if n < len(line.labels))
    return quiet or token in _pad_ids(oracle) or len(padded) > 1


def _runs(line: EncodedLine, oracle: Oracle) -> list[int]:
    """Return the padding of a row that is not what it should be: runs of a pad token, or of EOS, at its ends."""
    ids = line.input_ids
    pads = _pad_ids(oracle) | {oracle.eos_id}
    left = next((n for n, token in enumerate(ids) if token not in pads or token != ids[0]), len(ids))
    right = next((n for n, token in enumerate(reversed(ids)) if token not in pads or token != ids[-1]), len(ids))
    if right and ids[-1] == oracle.eos_id:
        right -= 1  # the last answer's own
    if left and ids[0] == oracle.eos_id and (left == len(ids) or ids[left] != oracle.bos_id):
        left = 0  # a row that was cut at the start may begin with EOS
    return [*range(min(left, len(ids) - right)), *range(len(ids) - right, len(ids))]


def _pad_ids(oracle: Oracle) -> set[int]:
    return {token for token, literal in oracle.control_tokens.items() if literal in _PADS} | {oracle.unk_id}
