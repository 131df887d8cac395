"""Judge a model by golden transcripts, in three tiers: exact, equivalent, different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pytest_mistral_lora.chat.completions import FormatVerdict, verdicts
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder
from pytest_mistral_lora.training.generate import Completion, generate
from pytest_mistral_lora.training.generate.model_spec import model_spec
from pytest_mistral_lora.training.generate.record import answer_of, next_token_logprobs

Tier = Literal["exact", "equivalent", "different"]


@dataclass(frozen=True, slots=True)
class TierTolerance:
    """Largest differences from a transcript that other hardware or library versions explain.

    Attributes:
        margin: Another token may be chosen if the recorded margin is below this, in nats.
        logprob: Largest mean difference of the golden completion's log-probabilities, in nats a token.
    """

    margin: float
    logprob: float


# bf16 has 8 significant bits: a logit near 30 is rounded by up to 0.06, the difference of two by up to twice that.
TOLERANCES: Mapping[str, TierTolerance] = {
    "fp32": TierTolerance(0.01, 0.005),
    "fp16": TierTolerance(0.05, 0.01),
    "bf16": TierTolerance(0.25, 0.05),
}
"""By the dtype of the base's weights. If recording and model differ in it, the wider one applies."""


@dataclass(frozen=True, slots=True)
class TokenCandidate:
    """A token that could have come next.

    Attributes:
        id: The token's id.
        piece: Its text in the vocabulary.
        probability: Its probability under the judged model, from 0 to 1.
    """

    id: int
    piece: str
    probability: float


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
        tier: `exact`: the same ids; `equivalent`: other ids, only where the recorded margin is below the tolerance, and
            the golden completion is as likely as it was; `different`: anything else.
        text: The text that was generated now.
        golden_text: The text of the transcript.
        logprob_difference: Mean difference of the golden completion's log-probabilities, in nats a token.
        difference: The first other token; None if the ids are equal.
        broken_checks: Format checks that the transcript passed and the completion now fails.
    """

    case: str
    tier: Tier
    text: str
    golden_text: str
    logprob_difference: float
    difference: FirstDifference | None
    broken_checks: tuple[FormatVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether the model answers as recorded."""
        return self.tier != "different" and not self.broken_checks

    def to_json(self) -> dict[str, Any]:
        """Return the judgement as plain JSON data, with `passed`."""
        return {**asdict(self), "passed": self.passed}


def difference_text(one: AnswerJudgement) -> list[str]:
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


def judge(model: Any, encoder: Encoder, transcript: Transcript, *, precision: Precision) -> AnswerJudgement:
    """Answer a transcript's prompt again, and return the tier of the answer.

    Args:
        model: Base with adapter, or a merged model.
        encoder: The backend that makes prompts.
        transcript: The recorded answer.
        precision: dtype of the base's weights now.

    Raises:
        InputError: If the prompt is encoded into other ids than it was, or the model lacks a recorded id.
    """
    check_prompt(encoder, transcript)
    transcript.require_ids_below(model.get_input_embeddings().weight.shape[0])
    [completion] = generate(model, encoder, [transcript.row], max_new_tokens=transcript.max_new_tokens)
    # The golden completion is fed to the model: its mean |log p_now - log p_recorded| is defined for any answer.
    logprobs = next_token_logprobs(model, transcript.prompt_ids, transcript.completion_ids)
    golden = torch.tensor(transcript.completion_ids)[:, None]
    apart = (logprobs.gather(1, golden).squeeze(1) - torch.tensor(transcript.logprobs)).abs().mean().item()
    difference = _first_difference(transcript, completion, logprobs, encoder)
    tolerance = max((TOLERANCES[precision], TOLERANCES[transcript.precision]), key=lambda one: one.margin)
    # only the checks that the transcript passed: the adapter may never have kept the others
    held = [check for check, one in zip(transcript.format_checks, transcript.checks, strict=True) if one["passed"]]
    checked = verdicts(answer_of(completion, transcript.row, encoder), held)
    return AnswerJudgement(
        case=transcript.case,
        tier=answer_tier(difference, apart, tolerance),
        text=completion.text,
        golden_text=transcript.text,
        logprob_difference=apart,
        difference=difference,
        broken_checks=tuple(verdict for verdict in checked if not verdict.passed),
    )


def answer_tier(difference: FirstDifference | None, apart: float, tolerance: TierTolerance) -> Tier:
    """Return the tier of an answer whose golden log-probabilities moved by `apart` nats a token on average."""
    if difference is None:
        return "exact"
    return "equivalent" if difference.margin < tolerance.margin and apart <= tolerance.logprob else "different"


def _first_difference(
    transcript: Transcript, completion: Completion, logprobs: torch.Tensor, encoder: Encoder
) -> FirstDifference | None:
    pairs = enumerate(zip(transcript.completion_ids, completion.ids, strict=False))
    first = next(((index, pair) for index, pair in pairs if pair[0] != pair[1]), None)
    if first is None:
        return None  # greedy answers of one longest length: neither is the beginning of the other
    index, pair = first
    golden, found = (TokenCandidate(one, encoder.piece(one), logprobs[index, one].exp().item()) for one in pair)
    return FirstDifference(index, golden, found, transcript.margins[index])


_MOVED = "The tokenizer, its template or a library has moved: restore it, or train and record again."
_LOST_ORDER = (
    "The file was written by a version that sorted the keys of tools and arguments, whose order a prompt keeps. Record "
    "it again from its rows: mistral-lora smoke DIR --rows ROWS.jsonl --record FOLDER"
)


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
        next_step=_LOST_ORDER if transcript.may_have_lost_order else _MOVED,
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


@dataclass(frozen=True)
class TranscriptComparison:
    """The comparison of an adapter or a merged model with golden transcripts.

    Attributes:
        golden: Folder of the transcripts.
        base: Folder of the base.
        device: Device of the model: `cpu` or `cuda`.
        precision: dtype of the base's weights.
        kind: `adapter` or `merged`.
        recorded_adapter: Whether the transcripts were recorded with this very adapter or merged model.
        judgements: The judgement of each transcript, in order.
    """

    golden: Path
    base: Path
    device: str
    precision: Precision
    kind: str
    recorded_adapter: bool
    judgements: Sequence[AnswerJudgement]

    @property
    def passed(self) -> bool:
        """Whether the adapter answers all of them as recorded."""
        return all(one.passed for one in self.judgements)

    @property
    def tiers(self) -> dict[str, int]:
        """Number of transcripts in each tier."""
        counts = Counter(one.tier for one in self.judgements)
        return {tier: counts[tier] for tier in ("exact", "equivalent", "different")}

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON data."""
        data = {name: str(getattr(self, name)) for name in ("golden", "base", "device", "precision", "kind")}
        return {
            **data,
            "recorded_adapter": self.recorded_adapter,
            "passed": self.passed,
            "tiers": self.tiers,
            "transcripts": [one.to_json() for one in self.judgements],
        }


def compare(
    adapter: Path, golden: Path | None = None, base: Path | None = None, *, device: str = "auto"
) -> TranscriptComparison:
    """Compare an adapter or a merged model with golden transcripts.

    Args:
        adapter: The adapter's or the merged model's folder.
        golden: Folder of transcripts, or one transcript; by default `transcripts` in the adapter's folder.
        base: The base's folder; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If there are no transcripts, or they are of another base, prompt or vocabulary.
    """
    golden = adapter / TRANSCRIPTS if golden is None else golden
    transcripts = load_folder(golden)
    spec = model_spec(adapter, base, device=device)
    check_base(transcripts, spec.identity["base_weights_sha256"], spec.base)
    for transcript in transcripts:
        check_prompt(spec.encoder, transcript)
    model = spec.load()
    return TranscriptComparison(
        golden=golden,
        base=spec.base,
        device=spec.device,
        precision=spec.precision,
        kind=spec.identity["kind"],
        recorded_adapter=all(one.model["tensors_sha256"] == spec.identity["tensors_sha256"] for one in transcripts),
        judgements=[judge(model, spec.encoder, one, precision=spec.precision) for one in transcripts],
    )
