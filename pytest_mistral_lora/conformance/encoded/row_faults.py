"""The classes of one row: a trainer's ids and labels, compared with mistral-common's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from pytest_mistral_lora.chat.chunks.registry import blocks_in
from pytest_mistral_lora.chat.diff import common_ends, decode_text, split_at_markers
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle
from pytest_mistral_lora.chat.rows import Row, imported
from pytest_mistral_lora.checkpoint.recognition import shipped_oracle
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.text_faults import TextComparison
from pytest_mistral_lora.conformance.encoded.text_reasons import spells_row
from pytest_mistral_lora.errors import MistralLoraError, and_more, counted


def id_faults(row: Row, expected: Ids, ids: Sequence[int], oracle: Oracle) -> list[EncodingFault]:
    """Return the classes of the difference between ids and mistral-common's; empty if they are equal.

    Args:
        row: The chat row.
        expected: mistral-common's ids of the row.
        ids: The trainer's, without padding.
        oracle: Mistral's own tokenization.
    """
    ids = tuple(ids)
    if ids == expected:
        return []
    if outside := outside_fault(ids, oracle):
        return [_other_tokenizer(row, ids, oracle) or outside]
    marker = row.kind.answer_marker
    cut = cut_fault(expected, ids, oracle, marker) or _copy_fault(expected, ids, oracle)
    if cut:
        return [cut]
    if ids and ids[0] not in oracle.control_tokens and decode_text(ids[:20], oracle).lstrip().startswith("<s>"):
        return [EncodingFault("ML524", "<s> is there as text, not as control token")]
    count = next((n for n, token in enumerate(ids) if token != oracle.bos_id), len(ids))
    bos = []
    with_bos = ids
    if count != 1:
        found = f"BOS is there {count} times" if count else "BOS is missing"
        bos = [EncodingFault("ML521", found, "BOS once, in front")]
        with_bos = (oracle.bos_id, *ids[count:])
    cut = cut_fault(expected, with_bos, oracle, marker)
    if cut or with_bos == expected:
        return [*bos, cut] if cut else bos
    if fault := _block_fault(row, expected, with_bos, oracle):
        return [*bos, fault]
    # A row with far too many ids has its class within the first of them; decoding and comparing them all is slow.
    rest = _content_faults(row, expected, with_bos[: 4 * len(expected) + 1000], oracle)
    # Ids of another vocabulary look like other texts or turns.
    looks_like_another = {fault.rule for fault in rest} & {"ML533", "ML534", "ML535", "ML555", "ML577"}
    other = _other_tokenizer(row, ids, oracle) if looks_like_another else None
    return [other] if other else [*bos, *rest]


def _block_fault(row: Row, expected: Ids, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids that differ from mistral-common's in blocks alone, such as those of images, else None."""
    inputs, sizes = oracle.block_ids, oracle.image_sizes
    texts = [[token for token in side if token not in inputs] for side in (expected, ids)]
    if sizes is None or texts[0] != texts[1]:
        return None
    chunks = blocks_in(message.get("content") for message in row.messages)
    rest = [oracle.control_tokens[token] for token in ids if token in inputs]
    title = " and ".join(dict.fromkeys(kind.title for _, kind in chunks)) or "block"
    for number, (chunk, kind) in enumerate(chunks):
        block = kind.literals_of(chunk, sizes)
        if rest[: len(block)] == block:
            rest = rest[len(block) :]
            continue
        if not rest:
            return EncodingFault("ML562", f"{counted(len(chunks) - number, kind.title)} of {len(chunks)} lost")
        return EncodingFault("ML562", kind.difference(chunk, rest, sizes), kind.shown(chunk))
    if rest:
        return EncodingFault("ML562", f"{counted(len(rest), 'token')} of {rest[0]} that no message has")
    return EncodingFault("ML562", f"the {title} stands at another place than mistral-common puts it")


def outside_fault(ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids that the vocabulary does not have, else None."""
    outside = [token for token in ids if not 0 <= token < oracle.vocab_size]
    if not outside:
        return None
    found = f"id {str(outside[0])[:24]}{and_more(1, len(outside))}"
    return EncodingFault("ML520", found, f"ids from 0 to {oracle.vocab_size - 1}")


def _copy_fault(expected: Ids, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return the fault of a row behind a copy of its own beginning, with or without a BOS between them, else None."""
    for own in (expected, expected[1:]):
        size = len(ids) - len(own)
        # one token more is a second BOS
        if 1 < size <= len(expected) and ids[:size] == expected[:size] and ids[size:] == own:
            what = "row" if size == len(expected) else "prompt"
            if expected[size - 1] in oracle.control_tokens:
                found = f"the {what} is there twice: the first {size} tokens of the row stand before it again"
                fix = f"Look for a {what} that is put in front of messages which have it already: give one of them."
                return EncodingFault("ML533", found, fix=fix)
    return None


def cut_fault(expected: Ids, ids: Ids, oracle: Oracle, marker: str = "") -> EncodingFault | None:
    """Return the fault of ids that are a beginning or an end of the expected ids, else None.

    Args:
        expected: mistral-common's ids.
        ids: The trainer's.
        oracle: Mistral's own tokenization.
        marker: The `answer_marker` of the row's kind: without it, its end alone behind BOS is a bare text, not a cut.
    """
    lost = len(expected) - len(ids)
    if lost <= 0:
        return None
    if ids == expected[: len(ids)]:
        if lost == 1:
            return EncodingFault("ML522", "the EOS at the end is missing")
        return EncodingFault("ML531", f"cut at the end: the last {lost} of {len(expected)} tokens are missing")
    if ids == expected[lost:] and lost > 1:
        return EncodingFault("ML531", f"cut at the start: the first {lost} of {len(expected)} tokens are missing")
    in_text = len(ids) > 1 and ids[1] not in oracle.control_tokens
    if marker and oracle.control_ids[marker] not in ids:
        in_text = False
    if in_text and ids[0] == oracle.bos_id and ids[1:] == expected[lost + 1 :]:
        return EncodingFault("ML531", f"cut after BOS: {lost} of {len(expected)} tokens are missing")
    ends = len(ids) > 1 and ids[-1] == oracle.eos_id and ids[:-1] == expected[: len(ids) - 1]
    # an answer of nothing but EOS is empty, not cut
    is_empty = ends and oracle.piece(ids[-2]) in ("[/INST]", "[/TOOL_RESULTS]")
    # trailing spaces that a template drops before EOS are not a cut
    if ends and not is_empty and decode_text(expected[len(ids) - 1 : -1], oracle).strip():
        found = f"cut at the end, and EOS put there: {lost + 1} of {len(expected)} tokens are missing"
        return EncodingFault("ML531", found)
    return _middle_cut(expected, ids, oracle)


def _middle_cut(expected: Ids, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return the fault of ids without some that begin within one text and end within another, else None.

    No filter of texts and no template leaves such ids.
    """
    lost = len(expected) - len(ids)
    at, tail = common_ends(ids, expected)
    gap = expected[at : at + lost]
    if at + tail < len(ids) or oracle.control_tokens.keys().isdisjoint(gap) or not oracle.facts.control_tokens:
        return None
    found = f"cut in the middle: {lost} of {len(expected)} tokens are missing, from token {at} on"
    while at and at + lost < len(expected):
        if any(expected[n] in oracle.control_tokens for n in (at - 1, at, at + lost - 1, at + lost)):
            return None
        if expected[at - 1] != expected[at + lost - 1]:
            return EncodingFault("ML531", found)
        at -= 1  # the same ids are left if what is missing begins a token earlier
    return None


def _content_faults(row: Row, expected: Ids, ids: Ids, oracle: Oracle) -> list[EncodingFault]:
    """Return the classes of ids that begin with one BOS and are not a cut row; at least one."""
    fault: EncodingFault | None = imported(row.kind.id_fault)(row, ids, oracle) if row.kind.id_fault else None
    if fault:
        return [fault]
    rest = tuple(message for message in row.messages if message["role"] != "system")
    if len(rest) < len(row.messages) and ids_of(replace(row, messages=rest), oracle) == ids:
        return [EncodingFault("ML525", "the system prompt is not there")]
    found, wanted = split_at_markers(ids, oracle), split_at_markers(expected, oracle)
    if not spells_row(row, found):
        text = decode_text(ids, oracle).strip()
        excerpt = repr(text[:60] + ("…" if len(text) > 60 else ""))
        return [EncodingFault("ML535", f"it says {excerpt}, and no text of the row")]
    if wanted == found:
        return [EncodingFault("ML532", "same text, different ids")]
    first: dict[str, EncodingFault] = {}
    for fault in TextComparison(row, wanted, found).faults():
        first.setdefault(fault.rule, fault)
    return list(first.values()) or [EncodingFault("ML534", "the row is encoded in another way")]


def ids_of(row: Row, oracle: Oracle) -> Ids | None:
    """Return the ids of a row, or of a prompt if no answer ends it; None if the tokenizer refuses it."""
    try:
        if row.messages[-1]["role"] not in row.kind.answer_roles:
            # the prompt of a server, which is not a training row
            answer = {"role": "assistant", "content": "x"}
            return oracle.encode_prompt(replace(row, messages=(*row.messages, answer)))
        return oracle.encode(row).input_ids
    except MistralLoraError:
        return None


def _other_tokenizer(row: Row, ids: Ids, oracle: Oracle) -> EncodingFault | None:
    """Return a fault that names the shipped tokenizer with exactly these ids, if there is one."""
    for name, other in other_oracles(oracle):
        if ids_of(row, other) == ids:
            found = f"these are the ids of {name} ({SHIPPED[name]})"
            return EncodingFault("ML532", found, f"those of {oracle.path.name}")
    return None


def other_oracles(oracle: Oracle) -> Iterator[tuple[str, Oracle]]:
    """Yield every shipped tokenizer but the given one, with its name."""
    for name in SHIPPED:
        other = _shipped(name)
        if other is not None and other.sha256 != oracle.sha256:
            yield name, other


def _shipped(name: str) -> Oracle | None:
    # an older mistral-common ships fewer tokenizers
    try:
        return shipped_oracle(name)
    except MistralLoraError:
        return None


MAX_SHIFT = 3
"""Most tokens by which a mask counts as shifted: `len(BatchEncoding)` in place of a length gives 2."""


def label_faults(
    expected: EncodedRow,
    ids: Sequence[int],
    labels: Sequence[int],
    oracle: Oracle,
    objective: Objective = ANSWERS,
) -> list[EncodingFault]:
    """Return the classes of the difference between labels and mistral-common's; empty if they are equal.

    If the ids differ from the expected ones, only their common beginning and end are judged token by token.

    Args:
        expected: mistral-common's encoding of the row.
        ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids.
        oracle: Mistral's own tokenization.
        objective: The objective by which `expected` has its labels.
    """
    if objective.turns == "everything" and len(labels) and expected.labels:
        # the loss of the first token of a conversation is never read
        labels = (expected.labels[0], *labels[1:])
    if tuple(ids) == expected.input_ids and tuple(labels) == expected.labels:
        return []
    # With other ids in the middle, the owners of the first and last tokens are still known.
    spans = [span for span in expected.spans for _ in range(span.start, span.end)]
    head, tail = common_ends(ids, expected.input_ids)
    unknown: list[Span | None] = [None] * (len(ids) - head - tail)
    owners = (*spans[:head], *unknown, *spans[len(spans) - tail :])
    trained = expected.supervised_tokens
    return list(LabelComparison(owners, tuple(ids), tuple(labels), oracle, trained, objective).faults())


@dataclass(frozen=True)
class LabelComparison:
    """The labels of a row with the spans of its tokens.

    Attributes:
        owners: The expected span of each token; None for an unexpected token.
        ids: The trainer's ids.
        labels: The trainer's labels.
        oracle: Mistral's own tokenization.
        supervised: The number of tokens that should be trained on.
        objective: The objective that says which.
    """

    owners: tuple[Span | None, ...]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    oracle: Oracle
    supervised: int
    objective: Objective = ANSWERS

    @cached_property
    def trained(self) -> frozenset[int]:
        """Indices of the tokens that are trained on."""
        return frozenset(n for n, label in enumerate(self.labels) if label != IGNORE_INDEX)

    @cached_property
    def wanted(self) -> frozenset[int]:
        """Indices of the tokens that should be trained on."""
        return frozenset(n for n, owner in enumerate(self.owners) if owner is not None and owner.supervised)

    def faults(self) -> Iterator[EncodingFault]:
        """Yield each class of the difference; a difference of the whole mask hides those of its turns."""
        foreign = [n for n in sorted(self.trained) if self.labels[n] != self.ids[n]]
        if foreign:
            # all labels are the ids at one distance: the trainer has shifted them, and the model shifts them again
            inner = sorted(self.trained)
            for shift in (1, -1, 2, -2):
                pairs = [(self.labels[n], self.ids[n + shift]) for n in inner if 0 <= n + shift < len(self.ids)]
                if len(pairs) > 1 and len(pairs) >= len(inner) - abs(shift) and all(a == b for a, b in pairs):
                    expected = "the token's own id: the model shifts"
                    yield EncodingFault("ML541", "each label is the id of a neighbour", expected)
                    return
            first = self.labels[foreign[0]]
            found = f"{len(foreign)} labels are another token's, the first {first} at {self._token(foreign[0])}"
            yield EncodingFault("ML542", found, "the token's own id, or -100")
        if not self.trained and self.supervised:
            yield EncodingFault("ML544", "no token is trained on", self._expected)
        elif None in self.owners or self.trained != self.wanted:
            # BOS may be masked although everything else is trained on
            is_whole = len(self.trained - {0}) == len(self.ids) - 1 and self.wanted != self.trained
            if is_whole and self.objective.turns != "everything":
                yield EncodingFault("ML543", "every token is trained on", self._expected)
            elif shift := self._mask_shift():
                yield EncodingFault("ML541", f"the mask is shifted by {shift:+d} tokens")
            else:
                yield from self._turn_faults()

    @property
    def _expected(self) -> str:
        if self.objective.is_default:
            return f"{self.supervised} tokens of the assistant"
        return f"{self.supervised} tokens, by the objective {self.objective}"

    def _token(self, index: int) -> str:
        return f"token {index} ({self.oracle.piece(self.ids[index])!r})"

    def _mask_shift(self) -> int:
        """Return the tokens by which the mask is shifted; 0 if not, if only its ends are lost, or if unclear."""
        if None in self.owners or self.trained <= self.wanted:
            return 0
        places = range(len(self.ids))
        # the smallest shift first: a mask of equal answers at equal distances has several
        for shift in (n * sign for n in range(1, MAX_SHIFT + 1) for sign in (1, -1)):
            if self.trained == {n + shift for n in self.wanted if n + shift in places}:
                return shift
        return 0

    def _turn_faults(self) -> Iterator[EncodingFault]:
        """Yield the faults of each answer and of the prompt around them.

        A masked EOS, tool-call marker or first token has its own class. Any other part of an answer that is
        masked, or a masked answer beside a prompt that is trained on, is a wrong span (ML550).
        """
        masked, partial, by_rule = self._masked_answers()
        trained = [(n, owner) for n in sorted(self.trained) if (owner := self.owners[n]) is not None]
        prompt = []
        outside = [(n, owner.role or "BOS") for n, owner in trained if not (owner.is_answer or owner.supervised)]
        if outside:
            are = "token is" if len(outside) == 1 else "tokens are"
            roles = ", ".join(sorted({role for _, role in outside}))
            first = self._token(outside[0][0])
            prompt = [f"{len(outside)} {are} trained on of: {roles}; the first is {first}"]
        if partial or (prompt and masked):
            expected = "each answer whole, and nothing else"
            if not self.objective.is_default:
                expected = f"the objective {self.objective}: {self.objective.meaning}"
            yield EncodingFault("ML550", "; ".join([*partial, *masked, *prompt]), expected)
        else:
            yield from (EncodingFault("ML551", found, "every token of it is trained on") for found in masked[:1])
            yield from (EncodingFault("ML547", found, "-100") for found in prompt)
        weightless = sum(owner.is_answer and not owner.supervised for _, owner in trained)
        if weightless:
            of = "of weight 0" if self.objective.is_default else f"outside the objective {self.objective}"
            yield EncodingFault("ML549", f"{weightless} tokens of an answer {of} are trained on", "-100")
        yield from by_rule.values()
        if None in self.owners and "ML546" not in by_rule:
            # these turns are not the row's: only the id identifies their EOS tokens
            eos = [n for n, token in enumerate(self.ids) if token == self.oracle.eos_id]
            if eos and self.supervised and not self.trained.intersection(eos):
                yield EncodingFault("ML546", f"every EOS is masked ({len(eos)})", "it is trained on")

    def _masked_answers(self) -> tuple[list[str], list[str], dict[str, EncodingFault]]:
        """Return the answers that are masked: whole answers, parts, and the tokens that have their own class."""
        masked: list[str] = []
        partial: list[str] = []
        by_rule: dict[str, EncodingFault] = {}
        owned = [(n, owner) for n, owner in enumerate(self.owners) if owner is not None and owner.supervised]
        for turn, group in groupby(owned, lambda pair: pair[1].turn):
            tokens = list(group)
            hidden = [(n, owner) for n, owner in tokens if n not in self.trained]
            if len(hidden) == len(tokens):
                owner = tokens[0][1]
                what = "the answer" if owner.is_answer else f"the {owner.role or 'beginning'}"
                masked.append(f"{what} of turn {turn} is masked")
                continue
            faults: dict[str, EncodingFault] = {}
            others = []
            for n, owner in hidden:
                if owner.kind == "eos":
                    rule, found = "ML546", f"the EOS of turn {owner.turn} is masked"
                elif self.ids[n] == self.oracle.tool_calls_id:
                    rule, found = "ML548", f"{self._token(n)} is masked"
                elif n == tokens[0][0] and owner.is_answer:
                    rule, found = "ML545", f"{self._token(n)}, the first of an answer, is masked"
                else:
                    others.append(n)
                    continue
                faults[rule] = EncodingFault(rule, found, "it is trained on")
            if others:
                partial.append(f"{len(hidden)} tokens of turn {turn} are masked, such as {self._token(others[0])}")
            else:
                by_rule.update({rule: fault for rule, fault in faults.items() if rule not in by_rule})
        return masked, partial, by_rule
