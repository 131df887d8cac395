"""Attention mask and positions of a sequence: whether its conversations see each other, and whether that matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.conformance.encoded import EncodingFault
from pytest_mistral_lora.conformance.encoded.lines import Ids
from pytest_mistral_lora.errors import InputError

Stretch = tuple[int, int]
"""First token of a conversation in a packed sequence, and one past its last."""

_SCALED = {"ministral3": 16384, "mistral4": 8192}
"""Model types whose own default scales attention by the position, and the position from which it does."""
_BY_LENGTH = ("dynamic", "longrope")
"""RoPE types whose frequencies change if a position reaches the original length."""


@dataclass(frozen=True, slots=True)
class PositionScaling:
    """Whether a model computes something else if all positions are moved by the same number.

    Plain RoPE sees differences of positions alone. A model that scales attention, or its frequencies, by the position
    itself does not.

    Attributes:
        source: The configuration that tells it, or the reason for an assumption, for reports.
        key: The configuration key that scales; empty for plain RoPE.
        limit: The first position at which it scales.
    """

    source: str
    key: str = ""
    limit: int = 0

    @classmethod
    def of_folder(cls, folder: Path) -> PositionScaling:
        """Read it from the `config.json` of a checkpoint folder; plain RoPE is assumed if there is none."""
        file = (folder if folder.is_dir() else folder.parent) / "config.json"
        if not file.is_file():
            return PLAIN_ROPE
        try:
            data = read_json(file)
        except InputError as error:
            return cls(f"plain RoPE is assumed: config.json cannot be read: {error.found}")
        config = data.get("text_config", data) if isinstance(data, Mapping) else {}
        config = config if isinstance(config, Mapping) else {}
        default = _SCALED.get(str(config.get("model_type")))
        given = next((config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)), None)
        if given is None and default is not None:
            return cls(str(file), "llama_4_scaling_beta", default)
        # one for all layers, or one for each type of layer
        given = given if isinstance(given, Mapping) else {}
        for rope in (given, *(part for part in given.values() if isinstance(part, Mapping))):
            limit = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
            limit = limit if type(limit) is int and limit > 0 else default or 1
            if rope.get("llama_4_scaling_beta"):
                return cls(str(file), "llama_4_scaling_beta", limit)
            if (kind := rope.get("rope_type", rope.get("type"))) in _BY_LENGTH:
                return cls(str(file), f"rope_type {kind}", limit)
        return cls(str(file))

    def matters(self, positions: Sequence[int]) -> bool:
        """Return whether these positions reach the limit."""
        return bool(self.key) and max(positions, default=0) >= self.limit


PLAIN_ROPE = PositionScaling("plain RoPE is assumed: there is no config.json beside the tokenizer")


def number_faults(stretches: Sequence[Stretch], mask: Sequence[int]) -> Iterator[EncodingFault]:
    """Yield the faults of an attention mask that numbers the conversations of a sequence.

    Args:
        stretches: The stretch of each conversation, in real tokens.
        mask: The mask of the real tokens. It is held to the conversations if a number is above 1.
    """
    if max(mask, default=0) < 2:
        return
    expected = "one number for each conversation, going up: 1 1 1 2 2 3 3 3"
    seen: dict[int, int] = {}
    last = 0
    for conversation, (start, end) in enumerate(stretches):
        numbers = list(dict.fromkeys(number for number in mask[start:end] if number))
        if len(numbers) > 1:
            at = next(n for n in range(start, end) if mask[n] == numbers[1])
            found = f"conversation {conversation} has the numbers {numbers[0]} and {numbers[1]}, cut at token {at}"
            yield EncodingFault("ML517", found, expected)
        shared = next((number for number in numbers if number in seen), None)
        if shared is not None:
            found = f"conversations {seen[shared]} and {conversation} share the number {shared}: they see each other"
            yield EncodingFault("ML517", found, expected)
        elif numbers and numbers[0] < last:
            found = f"conversation {conversation} has the number {numbers[0]}, after {last}"
            yield EncodingFault("ML517", found, expected)
        seen.update(dict.fromkeys(numbers, conversation))
        last = max([last, *numbers])


def isolation_faults(
    stretches: Sequence[Stretch], positions: Ids | None, mask: Ids | None, scaling: PositionScaling
) -> Iterator[EncodingFault]:
    """Yield the reasons why the conversations of a packed sequence see each other, or are computed otherwise.

    Args:
        stretches: The stretch of each conversation, in real tokens.
        positions: Position ids of the real tokens, or None.
        mask: Attention mask of the real tokens, or None; a number for each conversation keeps them apart.
        scaling: The model's use of positions.
    """
    numbered = mask is not None and max(mask, default=0) > 1
    if mask is not None:
        yield from number_faults(stretches, mask)
    # transformers looks at position_ids that restart only if it is given no mask (huggingface/trl#3526)
    if len(stretches) > 1 and mask is not None and not numbered:
        expected = "none, so that position_ids keep them apart"
        yield EncodingFault("ML513", "an attention mask of ones is given", expected)
    wanted = [n - start for start, end in stretches for n in range(start, end)]
    # without any, a model counts through
    counted = tuple(range(len(wanted))) if positions is None else positions
    wrong = next((n for n, (a, b) in enumerate(zip(counted, wanted, strict=True)) if a != b), None)
    if wrong is None:
        return
    runs_on = all(after == before + 1 for before, after in pairwise(counted))
    found = "no position_ids" if positions is None else f"position {counted[wrong]} at token {wrong}"
    expected = "position_ids that start at 0 for each conversation" if positions is None else str(wanted[wrong])
    if numbered and runs_on and not scaling.matters(counted):
        found += f", under a mask that keeps the conversations apart; {scaling.source}"
        yield EncodingFault("ML518", found, expected)
    else:
        why = f"; the model scales by the position ({scaling.key})" if numbered and scaling.matters(counted) else ""
        yield EncodingFault("ML512", found + why, expected)
