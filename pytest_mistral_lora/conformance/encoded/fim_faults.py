"""The classes of a fill-in-the-middle row whose ids are not mistral-common's: another layout, or another cut of texts.

A trainer makes such ids from a text with the markers in it, or from parts that it encodes by itself. So the ids are
compared with those of the layouts and cuts that trainers use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_mistral_lora.chat.diff import decode_text
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.fim import FimRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault

_SUFFIX, _PREFIX, _MIDDLE = "[SUFFIX]", "[PREFIX]", "[MIDDLE]"
_LAYOUT = f"{_SUFFIX}, the suffix, {_PREFIX}, the prompt and the completion"


def fim_fault(row: FimRow, ids: Sequence[int], oracle: Oracle) -> EncodingFault | None:
    """Return the class of ids that is known for fill-in-the-middle alone; None for ids of no such class."""
    return fim_layout_fault(row, ids, oracle) or fim_cut_fault(row, oracle.encode(row), ids, oracle)


def fim_layout_fault(row: FimRow, ids: Sequence[int], oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids that are laid out otherwise than mistral-common's, or None.

    Args:
        row: The row.
        ids: The trainer's ids, with one BOS, unequal to mistral-common's.
        oracle: Mistral's own tokenization.
    """
    markers = [oracle.control_tokens[token] for token in ids if token in oracle.control_tokens]
    if not {_SUFFIX, _PREFIX} <= set(markers):
        return _without_markers(row, ids, markers, oracle)
    if _MIDDLE in markers:
        return EncodingFault("ML575", f"{_MIDDLE} stands before the completion, and no server writes it", _LAYOUT)
    if markers.index(_PREFIX) < markers.index(_SUFFIX):
        return EncodingFault("ML575", f"{_PREFIX} comes before {_SUFFIX}", _LAYOUT)
    if oracle.encode(FimRow.of(row.suffix, row.prompt, row.completion)).input_ids == tuple(ids):
        return EncodingFault("ML576", f"the prompt follows {_SUFFIX}, and the suffix {_PREFIX}", _LAYOUT)
    return None


def _without_markers(row: FimRow, ids: Sequence[int], markers: Sequence[str], oracle: Oracle) -> EncodingFault:
    """Return the fault of ids without both markers of a gap.

    Args:
        row: The row.
        ids: The trainer's ids.
        markers: Their control tokens.
        oracle: Mistral's own tokenization.
    """
    text = decode_text([token for token in ids if token not in oracle.markers], oracle)
    of_row = row.prompt + row.suffix + row.completion
    spelled = [marker for marker in (_SUFFIX, _PREFIX) if marker in text and marker not in of_row]
    if spelled:
        return EncodingFault("ML524", f"{', '.join(spelled)} is there as text, not as control token")
    others = [marker for marker in dict.fromkeys(markers) if marker not in ("<s>", "</s>")]
    layout = f"laid out by {', '.join(others)}" if others else "a text without markers"
    return EncodingFault("ML577", f"it is {layout}: the model does not see where the gap is", _LAYOUT)


def fim_cut_fault(row: FimRow, expected: EncodedRow, ids: Sequence[int], oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids with mistral-common's layout and texts that are cut into other tokens, or None.

    Args:
        row: The row.
        expected: mistral-common's encoding.
        ids: The trainer's ids, with one BOS, unequal to mistral-common's.
        oracle: Mistral's own tokenization.
    """
    found = tuple(ids)
    joined = _joined_ids(row, expected, oracle)
    if found in joined:
        return EncodingFault(
            "ML579",
            "prompt and completion are encoded as one text: the prompt ends with other ids than at a server",
            "the ids of the prompt alone, then those of the completion",
        )
    for names, variant in _spaced_ids(row, expected, oracle):
        if found == variant:
            has = "has" if len(names) == 1 else "have"
            spaced = f"{' and '.join(names)} {has} the space that SentencePiece puts before a text of its own"
            return EncodingFault("ML578", spaced, "no space: the texts go on in a line")
    return None


def _joined_ids(row: FimRow, expected: EncodedRow, oracle: Oracle) -> list[tuple[int, ...]]:
    """Return the ids of a row whose prompt and completion are encoded as one text, with and without a spaced suffix."""
    prefix = oracle.control_ids[_PREFIX]
    start = expected.input_ids.index(prefix)
    tail = (prefix, *oracle.encode_text(row.prompt + row.completion), oracle.eos_id)
    return [(*expected.input_ids[:start], *tail), (*expected.input_ids[:2], *oracle.encode_text(row.suffix), *tail)]


def _spaced_ids(row: FimRow, expected: EncodedRow, oracle: Oracle) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yield the names of texts that are encoded as texts of their own, and the ids of the row."""
    texts = {span.role: expected.input_ids[span.start : span.end] for span in expected.spans if span.kind == "text"}
    opening = expected.input_ids[:2]
    for names in (("completion",), ("suffix",), ("suffix", "completion")):
        spaced = {name: oracle.encode_text(getattr(row, name)) for name in names}
        suffix, prompt, completion = (
            spaced.get(name, texts.get(name, ())) for name in ("suffix", "prompt", "completion")
        )
        yield names, (*opening, *suffix, oracle.control_ids[_PREFIX], *prompt, *completion, oracle.eos_id)
