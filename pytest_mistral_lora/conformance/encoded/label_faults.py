"""The class of a difference in labels: which tokens are trained on instead of the assistant's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.conformance.encoded.parts import Fault

MAX_SHIFT = 3
"""The furthest that a mask is looked for beside its place, in tokens."""


def label_faults(expected: EncodedRow, ids: Sequence[int], labels: Sequence[int], oracle: Oracle) -> list[Fault]:
    """Return the classes of what is wrong with labels; nothing where they are right.

    Where the ids differ from the expected ones, only the tokens that both begin or end with are judged one by one.

    Args:
        expected: mistral-common's encoding of the row.
        ids: The trainer's ids, without padding.
        labels: The trainer's labels, as many as ids.
        oracle: Mistral's own tokenization.
    """
    if tuple(ids) == expected.input_ids and tuple(labels) == expected.labels:
        return []
    return list(_Labels(_owners(expected, ids), tuple(ids), tuple(labels), oracle, expected.supervised_tokens).faults())


def _owners(expected: EncodedRow, ids: Sequence[int]) -> tuple[Span | None, ...]:
    """Return the span that each token found belongs to; None where the ids are not the expected ones."""
    spans = [span for span in expected.spans for _ in range(span.start, span.end)]
    most = min(len(ids), len(spans))
    head = next((n for n in range(most) if ids[n] != expected.input_ids[n]), most)
    tail = next((n for n in range(most - head) if ids[-1 - n] != expected.input_ids[-1 - n]), most - head)
    unknown: list[Span | None] = [None] * (len(ids) - head - tail)
    return (*spans[:head], *unknown, *spans[len(spans) - tail :])


@dataclass(frozen=True)
class _Labels:
    owners: tuple[Span | None, ...]
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    oracle: Oracle
    supervised: int

    @cached_property
    def trained(self) -> frozenset[int]:
        return frozenset(n for n, label in enumerate(self.labels) if label != IGNORE_INDEX)

    @cached_property
    def wanted(self) -> frozenset[int]:
        return frozenset(n for n, owner in enumerate(self.owners) if owner is not None and owner.supervised)

    @property
    def known(self) -> bool:
        return None not in self.owners

    def faults(self) -> Iterator[Fault]:
        foreign = [n for n in sorted(self.trained) if self.labels[n] != self.ids[n]]
        if foreign and self._values_are_shifted():
            yield Fault("ML541", "each label is the id of a neighbour", "the token's own id: the model shifts")
            return
        if foreign:
            yield Fault("ML542", self._foreign(foreign), "the token's own id, or -100")
        if not self.trained and self.supervised:
            yield Fault("ML544", "no token is trained on", f"{self.supervised} tokens of the assistant")
        elif not self.known or self.trained != self.wanted:
            yield from self._whole() or self._by_turns()

    def _foreign(self, foreign: list[int]) -> str:
        first = foreign[0]
        return f"{len(foreign)} labels are another token's, the first {self.labels[first]} at {self._token(first)}"

    def _token(self, index: int) -> str:
        return f"token {index} ({self.oracle.piece(self.ids[index])!r})"

    def _values_are_shifted(self) -> bool:
        """Return whether every label is the id of the token at one distance."""
        inner = sorted(self.trained)
        for shift in (1, -1, 2, -2):
            pairs = [(self.labels[n], self.ids[n + shift]) for n in inner if 0 <= n + shift < len(self.ids)]
            if len(pairs) > 1 and len(pairs) >= len(inner) - abs(shift) and all(a == b for a, b in pairs):
                return True
        return False

    def _whole(self) -> list[Fault]:
        """Return what is wrong with the mask as a whole, if something is."""
        if len(self.trained - {0}) == len(self.ids) - 1 and self.wanted != self.trained:
            return [Fault("ML543", "every token is trained on", f"{self.supervised} tokens of the assistant")]
        shift = self._mask_shift() if self.known else 0
        if shift:
            return [Fault("ML541", f"the mask is shifted by {shift:+d} tokens")]
        return []

    def _mask_shift(self) -> int:
        """Return by how many tokens the mask is moved; a mask that only lost its ends is not moved."""
        if self.trained <= self.wanted:
            return 0
        places = range(len(self.ids))
        for shift in (n * sign for n in range(1, MAX_SHIFT + 1) for sign in (1, -1)):
            if self.trained == {n + shift for n in self.wanted if n + shift in places}:
                return shift
        return 0

    def _by_turns(self) -> Iterator[Fault]:
        masked, partial, simple = self._answers()
        prompt, ignored = self._prompt(), self._weightless()
        if partial or (prompt and masked):
            yield Fault("ML550", "; ".join([*partial, *masked, *prompt]), "each answer whole, and nothing else")
        else:
            yield from (Fault("ML551", found, "every token of it is trained on") for found in masked[:1])
            yield from (Fault("ML547", found, "-100") for found in prompt)
        yield from (Fault("ML549", found, "-100") for found in ignored)
        yield from simple
        if not self.known and not any(fault.rule == "ML546" for fault in simple):
            yield from self._every_eos()

    def _answers(self) -> tuple[list[str], list[str], list[Fault]]:
        """Return what is masked of the answers: whole ones, parts, and the parts that have a class of their own."""
        masked: list[str] = []
        partial: list[str] = []
        simple: dict[str, Fault] = {}
        for turn, tokens in self._turns():
            hidden = [n for n in tokens if n not in self.trained]
            if len(hidden) == len(tokens):
                masked.append(f"the answer of turn {turn} is masked")
                continue
            faults = [self._edge(n, tokens) for n in hidden]
            if None in faults:
                first = next(n for n, fault in zip(hidden, faults, strict=True) if fault is None)
                partial.append(f"{len(hidden)} tokens of turn {turn} are masked, such as {self._token(first)}")
            else:
                simple.update({fault.rule: fault for fault in faults if fault and fault.rule not in simple})
        return masked, partial, list(simple.values())

    def _turns(self) -> Iterator[tuple[int | None, list[int]]]:
        owned = [(n, owner) for n, owner in enumerate(self.owners) if owner is not None and owner.supervised]
        for turn, group in groupby(owned, lambda pair: pair[1].turn):
            yield turn, [n for n, _ in group]

    def _edge(self, index: int, tokens: list[int]) -> Fault | None:
        """Return the class of one masked token of an answer, if it has one of its own."""
        owner = self.owners[index]
        if owner is not None and owner.kind == "eos":
            return Fault("ML546", f"the EOS of turn {owner.turn} is masked", "it is trained on")
        if self.ids[index] == self.oracle.tool_calls_id:
            return Fault("ML548", f"{self._token(index)} is masked", "it is trained on")
        if index == tokens[0]:
            return Fault("ML545", f"{self._token(index)}, the first of an answer, is masked", "it is trained on")
        return None

    def _prompt(self) -> list[str]:
        """Return which tokens are trained on that are not an assistant's."""
        wrong = [n for n in sorted(self.trained) if (owner := self.owners[n]) and owner.role != "assistant"]
        if not wrong:
            return []
        roles = sorted({owner.role or "BOS" for n in wrong if (owner := self.owners[n])})
        are = "token is" if len(wrong) == 1 else "tokens are"
        return [f"{len(wrong)} {are} trained on of: {', '.join(roles)}; the first is {self._token(wrong[0])}"]

    def _weightless(self) -> list[str]:
        wrong = [
            n
            for n in sorted(self.trained)
            if (owner := self.owners[n]) and owner.role == "assistant" and not owner.supervised
        ]
        return [f"{len(wrong)} tokens of an answer of weight 0 are trained on"] if wrong else []

    def _every_eos(self) -> Iterator[Fault]:
        eos = [n for n, token in enumerate(self.ids) if token == self.oracle.eos_id]
        if eos and self.supervised and not any(n in self.trained for n in eos):
            yield Fault("ML546", f"every EOS is masked ({len(eos)})", "it is trained on")
