"""Answer the prompts of golden transcripts again, and judge the model by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.records.judgement import (
    AnswerJudgement,
    answer_tier,
    check_prompt,
    first_difference,
    judged_formats,
    widest_tolerance,
)
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.generate.answers import generate
from pytest_mistral_lora.training.generate.model_spec import model_spec
from pytest_mistral_lora.training.generate.record import answer_of, next_token_logprobs


def judge(model: Any, encoder: Encoder, transcript: Transcript, *, precision: Precision) -> AnswerJudgement:
    """Answer a transcript's prompt again, and return the tier of the answer.

    Args:
        model: Base with adapter, or a merged model.
        encoder: The backend that makes prompts.
        transcript: The recorded answer.
        precision: dtype of the base's weights now.

    Raises:
        InputError: If the prompt's ids differ from the recorded ones, or the model lacks a recorded id.
    """
    check_prompt(encoder, transcript)
    transcript.require_ids_below(model.get_input_embeddings().weight.shape[0])
    [completion] = generate(model, encoder, [transcript.row], max_new_tokens=transcript.max_new_tokens)
    # The golden completion is fed to the model: its mean |log p_now - log p_recorded| is defined for any answer.
    logprobs = next_token_logprobs(model, transcript.prompt_ids, transcript.completion_ids)
    golden = torch.tensor(transcript.completion_ids)[:, None]
    apart = (logprobs.gather(1, golden).squeeze(1) - torch.tensor(transcript.logprobs)).abs().mean().item()

    def probability(index: int, token: int) -> float | None:
        # no pass of the golden completion covers what follows it
        return logprobs[index, token].exp().item() if index < len(logprobs) else None

    difference = first_difference(transcript, completion.ids, encoder.piece, probability)
    tolerance = widest_tolerance(precision, transcript.precision)
    return AnswerJudgement(
        case=transcript.case,
        tier=answer_tier(difference, apart, tolerance),
        text=completion.text,
        golden_text=transcript.text,
        logprob_difference=apart,
        difference=difference,
        **judged_formats(transcript, answer_of(completion, transcript.row, encoder)),
    )


def check_base(transcripts: Iterable[Transcript], base_weights_sha256: str, base: Path) -> None:
    """Refuse transcripts that were recorded on another base.

    Raises:
        InputError: With both bases.
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
        recorded_adapter: Whether the transcripts were recorded with the same adapter or merged model.
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
        return all(judgement.passed for judgement in self.judgements)

    @property
    def tiers(self) -> dict[str, int]:
        """Number of transcripts in each tier."""
        counts = Counter(judgement.tier for judgement in self.judgements)
        return {tier: counts[tier] for tier in ("exact", "equivalent", "different")}

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON data."""
        data = {name: str(getattr(self, name)) for name in ("golden", "base", "device", "precision", "kind")}
        return {
            **data,
            "recorded_adapter": self.recorded_adapter,
            "passed": self.passed,
            "tiers": self.tiers,
            "transcripts": [judgement.to_json() for judgement in self.judgements],
        }


def compare(
    adapter: Path,
    golden: Path | None = None,
    base: Path | None = None,
    *,
    device: str = "auto",
    display: RunDisplay | None = None,
) -> TranscriptComparison:
    """Compare an adapter or a merged model with golden transcripts.

    Args:
        adapter: The adapter's or the merged model's folder.
        golden: Folder of transcripts, or one transcript; by default `transcripts` in the adapter's folder.
        base: The base's folder; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.
        display: Display of the progress; None to show nothing.

    Raises:
        InputError: If there are no transcripts, or they belong to another base, prompt or vocabulary.
    """
    golden = adapter / TRANSCRIPTS if golden is None else golden
    transcripts = load_folder(golden)
    spec = model_spec(adapter, base, device=device)
    check_base(transcripts, spec.identity["base_weights_sha256"], spec.base.path)
    for transcript in transcripts:
        check_prompt(spec.encoder, transcript)
    display = display or RunDisplay()
    display.phase("loading the model")
    model = spec.load()
    display.phase(f"answering {counted(len(transcripts), 'prompt')} again")
    judgements = []
    for transcript in transcripts:
        judgements.append(judge(model, spec.encoder, transcript, precision=spec.precision))
        display.count(len(judgements), len(transcripts), "answer")
    return TranscriptComparison(
        golden=golden,
        base=spec.base.path,
        device=spec.device,
        precision=spec.precision,
        kind=spec.identity["kind"],
        recorded_adapter=all(
            transcript.model["tensors_sha256"] == spec.identity["tensors_sha256"] for transcript in transcripts
        ),
        judgements=judgements,
    )
