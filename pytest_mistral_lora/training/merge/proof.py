"""The checks of a merged model: each element of its weights, and then its logits and greedy answers."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.chat.kinds.records import parse_trained, record_kind
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.errors import InputError, MergeError, and_more
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import FARTHEST, AdapterFolder
from pytest_mistral_lora.records.goldens import golden_paths
from pytest_mistral_lora.records.judgement import AnswerJudgement, check_prompt, difference_text
from pytest_mistral_lora.records.merged_weights import inexact_tensors
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder
from pytest_mistral_lora.training.generate.judge import judge
from pytest_mistral_lora.training.generate.model_spec import ModelSpec, Question, ask
from pytest_mistral_lora.training.generate.record import next_token_logits
from pytest_mistral_lora.training.merge.routing import (
    ROUTER_SHARE,
    RouterDifference,
    changed_routers,
    recorded_routing,
    replayed_routing,
    router_weights,
    tier_of_logits,
)
from pytest_mistral_lora.training.save import RENDERED

# Tokens of the answer to a training row, which is the prompt if there are no transcripts.
_LONGEST_ANSWER = 64
_NEXT_STEP = "Nothing is written. --dtype float32 rounds least."


@contextmanager
def float32_sums(model: Any) -> Iterator[None]:
    """Let a model compute in float32 within the block; one weight at a time is in float32."""
    # Two models must differ by weights, not by how their sums round. On a real model of 135M parameters, merged
    # in bfloat16, logits differed by 0.4 to 1.0 from base and adapter with sums in bfloat16, by 0.1 to 0.2 in float32.
    handles: list[Any] = []
    for module in model.modules():
        values = {
            name: parameter.data
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype != torch.float32
        }
        if values:
            handles.append(
                module.register_forward_pre_hook(
                    lambda hooked, given, values=values: _set(hooked, values, torch.float32)
                )
            )
            handles.append(
                module.register_forward_hook(lambda hooked, given, output, values=values: _set(hooked, values))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set(module: Any, values: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    for name, value in values.items():
        getattr(module, name).data = value.to(dtype or value.dtype)


@dataclass(frozen=True)
class Proof:
    """The differences between the merged model and base with adapter.

    Attributes:
        max_abs_logit_difference: Largest difference of a logit at the positions of the adapter's answers.
        near_ties: Number of prompts with another answer, which first differs at a token that base and adapter hardly
            preferred, or because a token went to experts that they rated nearly as high.
        routing: How the routers differ, in a model with experts.
        transcripts: The merged model's own answers, with sums in its own dtype.
    """

    max_abs_logit_difference: float
    near_ties: int
    routing: RouterDifference
    transcripts: Sequence[Transcript]

    @property
    def greedy_equal(self) -> bool:
        """Whether all greedy answers are equal, token by token."""
        return not self.near_ties


def check_sums(merged: Weights, base: Weights, adapter: AdapterFolder) -> None:
    """Refuse merged weights if any element is not the rounded sum of base and adapter.

    Logits do not show a small error in one matrix: rounding to bfloat16 moves them as far as 5 % of a change does.

    Raises:
        MergeError: With the first tensor, and the number of the others.
        InputError: As for `inexact_tensors`.
    """
    if wrong := list(inexact_tensors(merged, base, adapter)):
        raise MergeError(
            f"{wrong[0]}{and_more(1, len(wrong))}",
            expected="at most half a unit",
            next_step="Nothing is written: the files of the base, or of the merge, are not what was read.",
        )


def proof_questions(adapter: AdapterFolder, golden: Path | None) -> list[Question]:
    """Return the prompts of the given golden transcripts, of the adapter's own transcripts, or of its rendered row.

    Args:
        adapter: The adapter.
        golden: A transcript or a folder of transcripts, or None.

    Raises:
        InputError: If there is no prompt, or one is encoded into other ids than when it was recorded.
    """
    recorded, rendered = adapter.path / TRANSCRIPTS, adapter.path / RENDERED
    if golden is not None or golden_paths(recorded):
        transcripts = load_folder(recorded if golden is None else golden)
        for transcript in transcripts:
            check_prompt(adapter.encoder, transcript)
        return [Question.again(transcript) for transcript in transcripts]
    if not rendered.is_file():
        raise InputError(
            f"neither {TRANSCRIPTS} nor {RENDERED}: there is no prompt to prove the merged model with",
            place=str(adapter.path),
            next_step="Give transcripts with --golden.",
        )
    data = read_json(rendered)
    named = {key: data[key] for key in record_kind(data).keys if key in data}
    return [Question(rendered.stem, parse_trained(named, place=Place.of(rendered)), max_new_tokens=_LONGEST_ANSWER)]


def prove(
    spec: ModelSpec,
    merged: BaseFolder,
    questions: Sequence[Question],
    *,
    dtype: str,
    identity: dict[str, Any],
    scratch: Path,
) -> Proof:
    """Ask base and adapter, then the merged model, with sums in float32 on weights of the merged dtype, and compare.

    Args:
        spec: Base and adapter, in the precision of `dtype`.
        merged: The merged weights, with their configuration.
        questions: The result of `proof_questions`.
        dtype: dtype of the merged weights.
        identity: The `model` of the merged model's transcripts.
        scratch: Folder to make for logits, which may be large.

    Raises:
        MergeError: If the merged model's answers differ, or its logits are farther away than rounding explains.
    """
    scratch.mkdir()
    model, router = spec.load(), merged.architecture.text.router
    routings, weights = [], router_weights(model, router)
    with float32_sums(model):
        expected = [ask(model, spec, question) for question in questions]
        for transcript in expected:
            with recorded_routing(model, router) as routing:
                save_file({"logits": _answer_logits(model, transcript)}, scratch / transcript.case)
            routings.append(routing)
    # both models together may not fit: the first is freed, and its logits wait on disk
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = load_base(merged, spec.precision, spec.device).eval()
    if not_the_bases := changed_routers(weights, router_weights(model, router)):
        raise MergeError(
            f"{not_the_bases[0]} is not the base's{and_more(1, len(not_the_bases))}",
            expected="the routers of the base, which no adapter changes",
            next_step="Nothing is written: the files of the base, or of the merge, are not what was read.",
        )
    farthest, difference, explained = 0.0, RouterDifference(), set()
    with float32_sums(model):
        for transcript, routing in zip(expected, routings, strict=True):
            with replayed_routing(model, router, routing) as routed:
                logits = _answer_logits(model, transcript)
            apart = (logits - load_file(scratch / transcript.case)["logits"]).abs().max().item()
            farthest = max(farthest, inf if isnan(apart) else apart)  # max() would lose a NaN
            difference.include(routed)
            if routed.moved and tier_of_logits(logits, transcript, spec.precision) != "different":
                explained.add(transcript.case)
        judgements = [judge(model, spec.encoder, transcript, precision=spec.precision) for transcript in expected]
    _check_equal(farthest, difference, dtype)
    _check_answers(
        [judgement for judgement in judgements if not (judgement.passed or _is_explained(judgement, explained))],
        len(judgements),
    )
    merged_spec = replace(spec, identity=identity)
    transcripts = [ask(model, merged_spec, question) for question in questions]
    return Proof(farthest, sum(judgement.tier != "exact" for judgement in judgements), difference, transcripts)


def _answer_logits(model: Any, answer: Transcript) -> torch.Tensor:
    return next_token_logits(model, answer.prompt_ids, answer.completion_ids)


def _is_explained(judgement: AnswerJudgement, explained: Collection[str]) -> bool:
    """Report whether an answer differs only because some tokens went to other experts, and keeps its format."""
    return judgement.case in explained and not judgement.broken_checks


def _check_equal(farthest: float, routing: RouterDifference, dtype: str) -> None:
    if routing.farthest > ROUTER_SHARE * FARTHEST[dtype]:
        raise MergeError(
            f"a router's logits are up to {routing.farthest:.3g} of their standard deviations from those of base and "
            "adapter",
            expected=f"at most {ROUTER_SHARE * FARTHEST[dtype]:g}, which rounding to {dtype} explains",
            next_step=_NEXT_STEP,
        )
    if farthest > FARTHEST[dtype]:
        raise MergeError(
            f"logits are up to {farthest:.3g} from those of base and adapter",
            expected=f"at most {FARTHEST[dtype]:g}, which rounding to {dtype} explains",
            next_step=_NEXT_STEP,
        )


def _check_answers(wrong: Sequence[AnswerJudgement], prompts: int) -> None:
    if wrong:
        first = wrong[0]
        broken = [f"{check.name} failed: {check.reason}" for check in first.broken_checks]
        count = f"{len(wrong)} of {prompts} prompts are answered otherwise"
        lines = "\n  ".join([count, f"{first.case}: {first.text!r}", *difference_text(first), *broken])
        raise MergeError(lines, expected="the answers of base and adapter", next_step=_NEXT_STEP)
