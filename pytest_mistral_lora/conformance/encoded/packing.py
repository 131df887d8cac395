"""Packed sequences: their conversations, found again, and whether mask and positions keep these apart."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import OPENING
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG, TokenizerFiles
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.errors import and_more

Stretch = tuple[int, int]
"""First token of a conversation in a packed sequence, and the token after its last."""


@dataclass(frozen=True, slots=True)
class ConversationMatch:
    """A listed conversation and its stretch of a packed sequence.

    Attributes:
        listed: Its number in the line's conversations; None for a stretch of no listed conversation.
        stretch: Its tokens; None if the sequence lacks it.
    """

    listed: int | None
    stretch: Stretch | None


def split_conversations(ids: Ids, expected: Sequence[Ids], positions: Ids | None, oracle: Oracle) -> list[Stretch]:
    """Return the stretches of a packed sequence: one for each conversation if the sequence is sound.

    A sequence with faults is cut at each BOS, or at each position 0 if these are as many as the conversations and the
    BOS tokens are not.

    Args:
        ids: The packed ids, without padding.
        expected: mistral-common's ids of each conversation, in order.
        positions: Position ids, or None.
        oracle: Mistral's own tokenization.
    """
    ends = [0]
    for conversation in expected:
        rest = ids[ends[-1] : ends[-1] + len(conversation)]
        # it may lack its BOS
        part = next((part for part in (conversation, conversation[1:]) if rest[: len(part)] == part), ())
        if not part:
            break
        ends.append(ends[-1] + len(part))
    if len(ends) == len(expected) + 1 and ends[-1] == len(ids):
        return list(pairwise(ends))
    bos = [n for n, token in enumerate(ids) if token == oracle.bos_id and (n == 0 or ids[n - 1] != oracle.bos_id)]
    resets = [n for n, value in enumerate(positions or ()) if value == 0]
    starts = resets if len(bos) != len(expected) == len(resets) else bos
    return list(pairwise(sorted({0, *starts, len(ids)})))


def cut_at_starts(ids: Ids, positions: Ids | None, oracle: Oracle) -> list[Stretch]:
    """Return the stretches of the conversations of a sequence whose conversations are not known.

    A BOS opens a conversation if a turn ends before it or begins behind it. Any other BOS is a fault within a
    conversation: text became a control token. Without any BOS, each position 0 opens a conversation.

    Args:
        ids: The ids, without padding.
        positions: Position ids, or None.
        oracle: Mistral's own tokenization.
    """
    bos = oracle.bos_id
    opening = {oracle.control_ids.get(literal) for literal in OPENING}
    starts = [
        n
        for n in _indices_of(bos, ids)
        if (n == 0 or ids[n - 1] != bos)
        and (n == 0 or ids[n - 1] == oracle.eos_id or (n + 1 < len(ids) and ids[n + 1] in opening))
    ]
    if bos not in ids:
        starts = [n for n, position in enumerate(positions or ()) if position == 0]
    return list(pairwise(sorted({0, *starts, len(ids)})))


def _indices_of(token: int, ids: Ids) -> Iterator[int]:
    at = -1
    with suppress(ValueError):
        while True:
            at = ids.index(token, at + 1)
            yield at


def match_conversations(ids: Ids, stretches: Sequence[Stretch], expected: Sequence[Ids]) -> list[ConversationMatch]:
    """Match stretches and conversations: equal ones first, in order and out of order, then the most similar ones.

    The work grows with the number of tokens, and not with the square of the number of conversations.
    """
    found = [ids[start:end] for start, end in stretches]
    pairs = _equal_pairs(expected, found)
    taken = set(pairs.values())
    free = [n for n in range(len(found)) if n not in taken]
    if free and len(pairs) < len(expected):
        similar = _SimilarStretches(found, free)
        for listed, wanted in enumerate(expected):
            if listed not in pairs and similar.left:
                pairs[listed] = similar.take(wanted)
        taken = set(pairs.values())
    return [
        *(ConversationMatch(listed, stretches[n]) for listed, n in sorted(pairs.items())),
        *(ConversationMatch(listed, None) for listed in range(len(expected)) if listed not in pairs),
        *(ConversationMatch(None, stretches[n]) for n in free if n not in taken),
    ]


_NEAR = 4
"""How many neighbours a conversation is compared with on each side, where there are more of them."""


def _equal_pairs(expected: Sequence[Ids], found: Sequence[Ids]) -> dict[int, int]:
    """Return the stretch of each conversation that has an equal one: as many as possible in order, then the others.

    In order first, so that a lost conversation does not shift equal ones behind it.
    """
    places: dict[Ids, list[int]] = defaultdict(list)
    for n, stretch in enumerate(found):
        places[stretch].append(n)
    times = Counter(expected)
    nth: Counter[Ids] = Counter()
    candidates: list[tuple[int, int]] = []
    for listed, wanted in enumerate(expected):
        where = places.get(wanted, [])
        # the nth of equal conversations is about the nth of equal stretches, counted from the front or from the end
        middles = {nth[wanted], nth[wanted] + len(where) - times[wanted]}
        nth[wanted] += 1
        near = {n for middle in middles for n in range(max(0, middle - _NEAR), min(len(where), middle + _NEAR + 1))}
        candidates += ((listed, where[n]) for n in sorted(near, reverse=True))
    pairs = dict(_longest_in_order(candidates))
    taken = set(pairs.values())
    rest = {wanted: iter([n for n in where if n not in taken]) for wanted, where in places.items()}
    for listed, wanted in enumerate(expected):
        if listed not in pairs and (same := next(rest.get(wanted, iter(())), None)) is not None:
            pairs[listed] = same
    return pairs


def _longest_in_order(candidates: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest selection of pairs in which both numbers go up.

    Args:
        candidates: Pairs by their first number; of pairs with the same one, those with the larger second number first.
    """
    ends: list[int] = []
    chosen: list[int] = []
    before: list[int] = []
    for number, (_, second) in enumerate(candidates):
        length = bisect_left(ends, second)
        ends[length : length + 1] = [second]
        chosen[length : length + 1] = [number]
        before.append(chosen[length - 1] if length else -1)
    pairs = []
    number = chosen[-1] if chosen else -1
    while number >= 0:
        pairs.append(candidates[number])
        number = before[number]
    return pairs[::-1]


class _SimilarStretches:
    """The stretches that equal no conversation, of which the most similar one is taken for each conversation.

    A conversation with a fault still has its own beginning or end. The longest common beginning of a text with others
    is the one with a neighbour in their sorted order, so each is compared with a few others alone.
    """

    def __init__(self, found: Sequence[Ids], free: Sequence[int]) -> None:
        self._found = found
        self.left: list[int] = list(free)
        self._by_beginning = sorted((found[n], n) for n in free)
        self._by_end = sorted((found[n][::-1], n) for n in free)

    def take(self, wanted: Ids) -> int:
        """Remove the stretch that is the most similar to a conversation, and return its number.

        Args:
            wanted: The ids of the conversation.
        """
        near = set(self.left[: 2 * _NEAR])
        for order, ids in ((self._by_beginning, wanted), (self._by_end, wanted[::-1])):
            at = bisect_left(order, (ids, 0))
            near.update(n for _, n in order[max(0, at - _NEAR) : at + _NEAR])
        ends = wanted[::-1]
        shared = {
            n: equal_beginning(wanted, self._found[n]) + equal_beginning(ends, self._found[n][::-1]) for n in near
        }
        best = max(near, key=lambda n: (shared[n], -n))
        del self.left[bisect_left(self.left, best)]
        for order, ids in ((self._by_beginning, self._found[best]), (self._by_end, self._found[best][::-1])):
            del order[bisect_left(order, (ids, best))]
        return best


_SHOWN = 20
"""Most numbers of conversations in a finding."""


def order_faults(matches: Sequence[ConversationMatch], count: int) -> Iterator[EncodingFault]:
    """Yield lost and surplus conversations of a packed sequence, and a wrong order."""
    lost = [match.listed for match in matches if match.stretch is None]
    extra = [match.stretch for match in matches if match.listed is None and match.stretch is not None]
    if lost:
        named = f"[{', '.join(map(str, lost[:_SHOWN]))}{and_more(_SHOWN, len(lost))}]"
        yield EncodingFault("ML515", f"conversations {named} of {count} are not there")
    if extra:
        start, end = extra[0]
        yield EncodingFault("ML515", f"tokens {start} to {end} are none of its conversations")
    starts = [match.stretch[0] for match in matches if match.listed is not None and match.stretch is not None]
    if starts != sorted(starts):
        yield EncodingFault("ML516", "the conversations stand in another order than they are listed")


_BY_LENGTH = ("dynamic", "longrope")
"""RoPE types whose frequencies change if a position reaches the original length."""


@dataclass(frozen=True, slots=True)
class PositionScaling:
    """Whether a model's result changes if all positions move by the same number.

    Plain RoPE only sees differences of positions. A model that scales attention or frequencies by the position itself
    also sees the position.

    Attributes:
        source: The configuration that states it, or the reason for an assumption, for reports.
        key: The configuration key that scales; empty for plain RoPE.
        limit: The first position at which it scales.
    """

    source: str
    key: str = ""
    limit: int = 0

    @classmethod
    def of_files(cls, files: TokenizerFiles) -> PositionScaling:
        """Read it from the configuration of a model; without one, assume plain RoPE.

        Args:
            files: The files of the checkpoint's folder, or a tokenizer file in it.
        """
        files = files.of_folder
        if MODEL_CONFIG not in files.names:
            return PLAIN_ROPE
        if fault := files.fault_of(MODEL_CONFIG):
            return cls(f"plain RoPE is assumed: {MODEL_CONFIG} cannot be read: {fault.found}")
        facts, source = ModelFacts(files.json(MODEL_CONFIG)), str(files.place(MODEL_CONFIG))
        model = TEXT_MODELS.get(str(facts.text.get("model_type")))
        default = model.scales_from if model is not None else 0
        if not facts.ropes and default:
            return cls(source, "llama_4_scaling_beta", default)
        for rope in facts.ropes:
            limit = rope.get("original_max_position_embeddings") or facts.context
            limit = limit if type(limit) is int and limit > 0 else default or 1
            if rope.get("llama_4_scaling_beta"):
                return cls(source, "llama_4_scaling_beta", limit)
            if (kind := rope.get("rope_type", rope.get("type"))) in _BY_LENGTH:
                return cls(source, f"rope_type {kind}", limit)
        return cls(source)

    def matters(self, positions: Sequence[int]) -> bool:
        """Return whether these positions reach the limit."""
        return bool(self.key) and max(positions, default=0) >= self.limit


MOST_POSITIONS = 2**24
"""The first position whose neighbours are one number in float32, in which rotary embeddings are computed."""

PLAIN_ROPE = PositionScaling("plain RoPE is assumed: there is no config.json beside the tokenizer")


def number_faults(
    stretches: Sequence[Stretch], numbers: Sequence[int], *, key: str = "", none: int = 0
) -> Iterator[EncodingFault]:
    """Yield the faults of a column that numbers the conversations of a sequence.

    Args:
        stretches: The stretch of each conversation, in real tokens.
        numbers: The number of each real token.
        key: The key of the column; empty for an attention mask, whose numbers go up.
        none: The number of a token of no conversation.
    """
    named = f"{key}: " if key else ""
    expected = "one number for each conversation" + (": 0 0 0 1 1 2 2 2" if key else ", going up: 1 1 1 2 2 3 3 3")
    seen: dict[int, int] = {}
    last = none
    for conversation, (start, end) in enumerate(stretches):
        own = list(dict.fromkeys(number for number in numbers[start:end] if number != none))
        shared = next((number for number in own if number in seen), None)
        if len(own) > 1:
            at = next(n for n in range(start, end) if numbers[n] == own[1])
            found = f"{named}conversation {conversation} has the numbers {own[0]} and {own[1]}, cut at token {at}"
            yield EncodingFault("ML517", found, expected)
        elif shared is not None:
            sides = f"conversations {seen[shared]} and {conversation}"
            found = f"{named}{sides} share the number {shared}: they see each other"
            yield EncodingFault("ML517", found, expected)
        elif own and own[0] < last and not key:
            found = f"conversation {conversation} has the number {own[0]}, after {last}"
            yield EncodingFault("ML517", found, expected)
        seen.update(dict.fromkeys(own, conversation))
        last = max([last, *own])


COUNT_THROUGH = "Let positions go up by one through the row: leave `position_ids` out if rows are not packed."
"""The fix of positions that are wrong within one conversation."""


def jump_fault(ids: Ids, positions: Sequence[int], at: int, expected: str, oracle: Oracle) -> EncodingFault:
    """Return the fault of positions that jump within one conversation.

    Args:
        ids: The ids, without padding.
        positions: Their positions.
        at: The first token whose position is not the one after that of the token before it.
        expected: The position that it should have.
        oracle: Mistral's own tokenization.
    """
    found, fix = f"position {positions[at]} at token {at}, within a conversation", COUNT_THROUGH
    if positions[at] == 0 and ids[at - 1] == oracle.eos_id != ids[at] != oracle.bos_id:
        found += f", or <s> is missing at token {at}"
        fix += f" If another conversation begins at token {at}, put <s> in front of it."
    return EncodingFault("ML512", found, expected, fix=fix)


def _is_numbered(mask: Ids | None) -> bool:
    """Return whether an attention mask has a number for each conversation, which keeps them apart."""
    return mask is not None and max(mask, default=0) > 1


def runs_on_apart(positions: Sequence[int], mask: Ids | None, scaling: PositionScaling) -> bool:
    """Return whether positions run on through conversations that are kept apart: plain RoPE sees no difference.

    Args:
        positions: Position ids of the real tokens.
        mask: Attention mask of the real tokens, or None.
        scaling: The model's use of positions.
    """
    is_apart = _is_numbered(mask) and not scaling.matters(positions)
    return is_apart and all(after == before + 1 for before, after in pairwise(positions))


def isolation_faults(
    stretches: Sequence[Stretch],
    ids: Ids,
    positions: Ids | None,
    mask: Ids | None,
    scaling: PositionScaling,
    oracle: Oracle,
) -> Iterator[EncodingFault]:
    """Yield the reasons why the conversations of a packed sequence see each other, or are computed differently.

    Args:
        stretches: The stretch of each conversation, in real tokens.
        ids: The real tokens.
        positions: Position ids of the real tokens, or None.
        mask: Attention mask of the real tokens, or None; a number for each conversation keeps them apart.
        scaling: The model's use of positions.
        oracle: Mistral's own tokenization.
    """
    numbered = _is_numbered(mask)
    if mask is not None and numbered:
        yield from number_faults(stretches, mask)
    # transformers looks at position_ids that restart only if it is given no mask (huggingface/trl#3526)
    if len(stretches) > 1 and mask is not None and not numbered:
        expected = "none, so that position_ids keep them apart"
        yield EncodingFault("ML513", "an attention mask of ones is given", expected)
    wanted = [n - start for start, end in stretches for n in range(start, end)]
    # without position ids, a model counts through
    counted = tuple(range(len(wanted))) if positions is None else positions
    wrong = next((n for n, (a, b) in enumerate(zip(counted, wanted, strict=True)) if a != b), None)
    if wrong is None or runs_on_apart(counted, mask, scaling):
        return
    found = "no position_ids" if positions is None else f"position {counted[wrong]} at token {wrong}"
    expected = "position_ids that start at 0 for each conversation" if positions is None else str(wanted[wrong])
    if positions is not None and wrong not in {start for start, _ in stretches}:
        yield jump_fault(ids, positions, wrong, expected, oracle)
    else:
        why = f"; the model scales by the position ({scaling.key})" if numbered and scaling.matters(counted) else ""
        yield EncodingFault("ML512", found + why, expected)
