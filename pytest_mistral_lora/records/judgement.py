"""Judge an answer by a golden transcript, in three tiers: exact, equivalent, different. No model is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal

from pytest_mistral_lora.chat.completions import AnswerToCheck, FormatVerdict, verdicts
from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.gate import RATE
from pytest_mistral_lora.records.transcripts import Transcript

Tier = Literal["exact", "equivalent", "different"]


@dataclass(frozen=True, slots=True)
class TierTolerance:
    """Largest differences from a transcript that other hardware or library versions explain.

    Attributes:
        margin: The model may choose another token if the recorded margin is below this, in nats.
        logprob: Largest mean difference of the golden completion's log-probabilities, in nats a token.
        most_moved: Largest difference of one log-probability of a token that is answered as recorded, in nats.
        mean_moved: Largest mean of these differences over the answers of a server, in nats.
    """

    margin: float
    logprob: float
    most_moved: float
    mean_moved: float


# bf16 has 8 significant bits: a logit near 30 is rounded by up to 0.06, the difference of two by up to twice that.
# The quantised ones were measured with GGUF files of SmolLM2-135M, 24 answers of 32 tokens; what moves, with those of
# tiny models, by scripts/measure_moves.py.
TOLERANCES: Mapping[str, TierTolerance] = {
    "fp32": TierTolerance(0.01, 0.005, 0.1, 0.01),
    "fp16": TierTolerance(0.05, 0.01, 0.15, 0.02),
    "bf16": TierTolerance(0.25, 0.05, 0.7, 0.08),
    "q8_0": TierTolerance(0.3, 0.15, 1.5, 0.2),
    "q5": TierTolerance(2.0, 0.6, 4.0, 0.9),
    "q4": TierTolerance(2.5, 0.6, 5.0, 2.0),
}
"""By the dtype of the base's weights, or their quantisation in a GGUF file. If recording and model differ in it, the
wider one applies."""


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A token that could have come next.

    Attributes:
        id: The token's id; None at the end of an answer.
        piece: Its text in the vocabulary.
        probability: Its probability under the judged model, from 0 to 1; None if it is not known.
    """

    id: int | None
    piece: str
    probability: float | None

    def text(self) -> str:
        """Return the candidate for a terminal, without its probability."""
        return self.piece if self.id is None else f"{self.id} {self.piece!r}"


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first token at which a completion differs from its transcript.

    Attributes:
        token: Index into the completion.
        golden: The token of the transcript.
        found: The generated token.
        margin: Recorded log-probability of the golden token minus that of the runner-up, in nats.
    """

    token: int
    golden: TokenCandidate
    found: TokenCandidate
    margin: float


@dataclass(frozen=True, slots=True)
class AnswerJudgement:
    """The comparison of a model's answer with one transcript.

    Attributes:
        case: Name of the transcript.
        tier: `exact`: the same ids; `equivalent`: the ids first differ where the recorded margin is below the
            tolerance, and the golden completion is as likely as before; `different`: anything else.
        text: The text that was generated now.
        golden_text: The text of the transcript.
        logprob_difference: Mean difference of the golden completion's log-probabilities, in nats a token; None if they
            are not known.
        difference: The first token that differs; None if the ids are equal.
        checks: The completion's result of each format check of the transcript; empty if its ids are not known.
        broken_checks: Those that the transcript passed and the completion now fails.
    """

    case: str
    tier: Tier
    text: str
    golden_text: str
    logprob_difference: float | None
    difference: FirstDifference | None
    checks: tuple[FormatVerdict, ...]
    broken_checks: tuple[FormatVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether the model answers as recorded."""
        return self.tier != "different" and not self.broken_checks

    def to_json(self) -> dict[str, Any]:
        """Return the judgement as plain JSON data, with `passed`."""
        return {**asdict(self), "passed": self.passed}


def difference_text(judgement: AnswerJudgement) -> list[str]:
    """Return the first difference for a terminal: both candidates, and how close they were; empty for equal ids."""
    if judgement.difference is None:
        return []
    golden, found = judgement.difference.golden, judgement.difference.found
    apart = judgement.logprob_difference
    moved = "" if apart is None else f"; the recorded answer's log-probability moved by {apart:.4g} nats a token"
    known = f" (probability {golden.probability:.4f})" if golden.probability is not None else ""
    other = f" ({found.probability:.4f})" if found.probability is not None else ""
    return [
        f"token {judgement.difference.token}: recorded {golden.text()}{known}, found {found.text()}{other}",
        f"margin when recorded: {judgement.difference.margin:.4g} nats{moved}",
    ]


def answer_tier(difference: FirstDifference | None, apart: float | None, tolerance: TierTolerance) -> Tier:
    """Return the tier of an answer whose golden log-probabilities moved by `apart` nats a token; None if not known."""
    if difference is None:
        return "exact"
    return "equivalent" if difference.margin < tolerance.margin and (apart or 0.0) <= tolerance.logprob else "different"


def widest_tolerance(*precisions: str) -> TierTolerance:
    """Return the wider of the tolerances of some precisions."""
    return max((TOLERANCES[precision] for precision in precisions), key=lambda tolerance: tolerance.margin)


def first_difference(
    transcript: Transcript,
    ids: Sequence[int],
    piece: Callable[[int], str],
    probability: Callable[[int, int], float | None] = lambda index, token: None,
) -> FirstDifference | None:
    """Return the first token where an answer differs from a transcript; None if they are equal.

    Args:
        transcript: The recorded answer.
        ids: The answer, with its closing EOS.
        piece: Returns the vocabulary's spelling of a token.
        probability: Returns the probability of a token at a place of the answer, or None if it is not known.
    """
    golden = transcript.completion_ids
    index = equal_beginning(golden, ids)
    if index == len(golden) == len(ids):
        return None

    def candidate(given: Sequence[int]) -> TokenCandidate:
        if index >= len(given):
            return TokenCandidate(None, "the end", None)
        return TokenCandidate(given[index], piece(given[index]), probability(index, given[index]))

    margin = transcript.margins[index] if index < len(golden) else inf
    return FirstDifference(index, candidate(golden), candidate(ids), margin)


def judged_formats(transcript: Transcript, answer: AnswerToCheck) -> dict[str, tuple[FormatVerdict, ...]]:
    """Return `checks` and `broken_checks` of the judgement of an answer."""
    found = verdicts(answer, transcript.format_checks)
    # only the checks that the transcript passed: the adapter may never have passed the others
    pairs = zip(found, transcript.checks, strict=True)
    lost = tuple(verdict for verdict, recorded in pairs if recorded["passed"] and not verdict.passed)
    return {"checks": found, "broken_checks": lost}


def format_rates(judgements: Iterable[AnswerJudgement]) -> tuple[tuple[str, str], ...]:
    """Return a fact for each format check: how many of the answers pass it, as `("rate of json", "1 of 4")`.

    A weekly report shows by them how far the format has fallen apart, where an answer alone is another one or not.
    """
    passed: dict[str, list[bool]] = {}
    for judgement in judgements:
        for verdict in judgement.checks:
            passed.setdefault(f"{RATE}{verdict.name}", []).append(verdict.passed)
    return tuple((name, f"{sum(values)} of {len(values)}") for name, values in passed.items())


_MOVED = "The tokenizer, its template or a library has moved: restore it, or train and record again."


def check_prompt(encoder: Encoder, transcript: Transcript) -> None:
    """Refuse a transcript whose prompt no longer encodes to the recorded ids.

    Raises:
        InputError: Naming the first token that moved.
    """
    now, then = encoder.prompt(transcript.row), transcript.prompt_ids
    if now == then:
        return
    index = equal_beginning(now, then)
    found, golden = (
        f"{ids[index]} {encoder.piece(ids[index])!r}" if index < len(ids) else "the end" for ids in (now, then)
    )
    recorded = ", ".join(f"{name} {transcript.recorded_with[name]}" for name in ("mistral-common", "transformers"))
    raise InputError(
        f"the prompt is encoded into other ids: prompt token {index} is {found}",
        place=Place.of(f"transcript {transcript.case}"),
        expected=f"{golden}, as recorded with {recorded} and {transcript.tokenizer['file']}",
        next_step=_MOVED,
    )
