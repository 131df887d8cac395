"""Judge a model by golden transcripts, in three tiers: exact, equivalent, different."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pytest_mistral_lora.chat.completions import AnswerToCheck, FormatVerdict, verdicts
from pytest_mistral_lora.checkpoint.base_model import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import Transcript
from pytest_mistral_lora.training.generate.generate import Completion, generate
from pytest_mistral_lora.training.generate.record import answer_of, next_token_logprobs

Tier = Literal["exact", "equivalent", "different"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a sound model may be from a transcript that other hardware or libraries recorded.

    Attributes:
        margin: Where the recorded margin is below this, another token may be chosen, in nats.
        logprob: Largest mean difference of the golden completion's log-probabilities, in nats a token.
    """

    margin: float
    logprob: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(0.01, 0.005),
    "fp16": Tolerance(0.05, 0.01),
    "bf16": Tolerance(0.25, 0.05),
}
"""By the dtype of the base's weights; where recording and model differ in it, the wider one counts."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have come next.

    Attributes:
        id: The token.
        piece: As it is written in the vocabulary.
        probability: Its probability here, from 0 to 1.
    """

    id: int
    piece: str
    probability: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a completion leaves its transcript.

    Attributes:
        token: Index into the completion.
        golden: The token of the transcript.
        found: The token that was generated.
        margin: The margin of the golden token when it was recorded, in nats.
    """

    token: int
    golden: Candidate
    found: Candidate
    margin: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one transcript came to.

    Attributes:
        case: Name of the transcript.
        tier: `exact`: the same ids; `equivalent`: other ids, only where the recorded margin is below the tolerance, and
            the golden completion is as likely as it was; `different`: anything else.
        text: What was generated now.
        golden_text: What the transcript has.
        logprob_difference: Mean difference of the golden completion's log-probabilities, in nats a token.
        difference: The first other token; None where ids are equal.
        broken_checks: Format checks that the transcript passed and the completion now fails.
    """

    case: str
    tier: Tier
    text: str
    golden_text: str
    logprob_difference: float
    difference: Difference | None
    broken_checks: tuple[FormatVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether the model answers as recorded."""
        return self.tier != "different" and not self.broken_checks

    def to_json(self) -> dict[str, Any]:
        """Return the judgement as plain JSON data."""
        return {**asdict(self), "passed": self.passed}


def difference_text(one: Judgement) -> list[str]:
    """Return the first other token for a terminal: both candidates, and how near they were; empty for equal ids."""
    if one.difference is None:
        return []
    golden, found = one.difference.golden, one.difference.found
    return [
        f"token {one.difference.token}: recorded {golden.id} {golden.piece!r} (probability {golden.probability:.4f}), "
        f"found {found.id} {found.piece!r} ({found.probability:.4f})",
        f"margin when recorded: {one.difference.margin:.4g} nats; the recorded answer's log-probability moved by "
        f"{one.logprob_difference:.4g} nats a token",
    ]


def judge(model: Any, encoder: Encoder, transcript: Transcript, *, precision: Precision) -> Judgement:
    """Answer a transcript's prompt again, and say in which tier the answer is.

    Args:
        model: Base with adapter.
        encoder: The backend that makes prompts.
        transcript: What was recorded.
        precision: dtype of the base's weights now.

    Raises:
        InputError: If the prompt is encoded into other ids than it was: then there is nothing to compare.
    """
    check_prompt(encoder, transcript)
    [completion] = generate(model, encoder, [transcript.row], max_new_tokens=transcript.max_new_tokens)
    logprobs = next_token_logprobs(model, transcript.prompt_ids, transcript.completion_ids)
    golden = torch.tensor(transcript.completion_ids)[:, None]
    apart = logprobs.gather(1, golden).squeeze(1) - torch.tensor(transcript.logprobs)
    mean = apart.abs().mean().item()
    difference = _difference(transcript, completion, logprobs, encoder)
    tolerance = max((TOLERANCES[precision], TOLERANCES[transcript.precision]), key=lambda one: one.margin)
    return Judgement(
        case=transcript.case,
        tier=_tier(difference, mean, tolerance),
        text=completion.text,
        golden_text=transcript.text,
        logprob_difference=mean,
        difference=difference,
        broken_checks=_broken_checks(transcript, answer_of(completion, transcript.row, encoder)),
    )


def _tier(difference: Difference | None, apart: float, tolerance: Tolerance) -> Tier:
    if difference is None:
        return "exact"
    return "equivalent" if difference.margin < tolerance.margin and apart <= tolerance.logprob else "different"


def _difference(
    transcript: Transcript, completion: Completion, logprobs: torch.Tensor, encoder: Encoder
) -> Difference | None:
    pairs = enumerate(zip(transcript.completion_ids, completion.ids, strict=False))
    first = next(((index, pair) for index, pair in pairs if pair[0] != pair[1]), None)
    if first is None:
        return None  # greedy answers of one longest length: neither is the beginning of the other
    index, pair = first
    golden, found = (Candidate(one, encoder.piece(one), logprobs[index, one].exp().item()) for one in pair)
    return Difference(index, golden, found, transcript.margins[index])


def _broken_checks(transcript: Transcript, answer: AnswerToCheck) -> tuple[FormatVerdict, ...]:
    held = [check for check, one in zip(transcript.format_checks, transcript.checks, strict=True) if one["passed"]]
    return tuple(verdict for verdict in verdicts(answer, held) if not verdict.passed)


def check_prompt(encoder: Encoder, transcript: Transcript) -> None:
    """Refuse a transcript whose prompt is encoded into other ids than it was.

    Raises:
        InputError: Naming the first token that moved.
    """
    now, then = encoder.prompt(transcript.row), transcript.prompt_ids
    if now == then:
        return
    pairs = zip(now, then, strict=False)
    index = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(now), len(then)))
    found, golden = (
        f"{ids[index]} {encoder.piece(ids[index])!r}" if index < len(ids) else "the end" for ids in (now, then)
    )
    recorded = ", ".join(f"{name} {transcript.recorded_with[name]}" for name in ("mistral-common", "transformers"))
    raise InputError(
        f"the prompt is encoded into other ids: prompt token {index} is {found}",
        place=f"transcript {transcript.case}",
        expected=f"{golden}, as recorded with {recorded} and {transcript.tokenizer['file']}",
        next_step="The tokenizer, its template or a library has moved: restore it, or train and record again.",
    )


def check_base(transcripts: Iterable[Transcript], base_weights_sha256: str, base: Path) -> None:
    """Refuse transcripts that were recorded on another base.

    Raises:
        InputError: Naming both.
    """
    for transcript in transcripts:
        recorded = transcript.model["base_weights_sha256"]
        if recorded != base_weights_sha256:
            raise InputError(
                f"the weights have SHA-256 {base_weights_sha256}",
                place=str(base),
                expected=f"{transcript.model['base']} with {recorded}, on which {transcript.case} was recorded",
                next_step="Give that base with --base, or record transcripts on this one.",
            )
