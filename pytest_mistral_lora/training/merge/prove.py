"""Arithmetic in float32 on weights of less: what two models differ in is then their weights, and not how sums round.

Of a real model of 135M parameters, merged in bfloat16, logits were 0.4 to 1.0 from those of base and adapter with sums
in bfloat16, and 0.1 to 0.2 with sums in float32.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.adapter_folder import FARTHEST
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder, transcript_files
from pytest_mistral_lora.training.generate.compare import Adapted
from pytest_mistral_lora.training.generate.judge import Judgement, check_prompt, difference_text, judge
from pytest_mistral_lora.training.generate.questions import Question, ask
from pytest_mistral_lora.training.generate.record import next_token_logits
from pytest_mistral_lora.training.save import RENDERED


@contextmanager
def float32_sums(model: Any) -> Iterator[None]:
    """Let a model compute in float32 within the block; of its weights, one is in float32 at a time."""
    handles: list[Any] = []
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dtype != torch.float32:
            kept = weight.data
            handles.append(module.register_forward_pre_hook(lambda one, given, kept=kept: _set(one, kept.float())))
            handles.append(module.register_forward_hook(lambda one, given, output, kept=kept: _set(one, kept)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set(module: Any, weight: torch.Tensor) -> None:
    module.weight.data = weight


_LONGEST_ANSWER = 64
"""Tokens of the answer to a training row, where there are no transcripts."""

_NOTHING = "Nothing is written."


@dataclass(frozen=True)
class Proof:
    """How the merged model compares with base and adapter.

    Attributes:
        max_abs_logit_difference: Largest difference of a logit, where a token of the adapter's answer comes next.
        near_ties: Prompts answered otherwise, from a token on that base and adapter hardly preferred.
        transcripts: The merged model's own answers, with sums in its own dtype.
    """

    max_abs_logit_difference: float
    near_ties: int
    transcripts: Sequence[Transcript]

    @property
    def greedy_equal(self) -> bool:
        """Whether all greedy answers are equal, token by token."""
        return not self.near_ties


def questions(adapted: Adapted, golden: Path | None) -> list[Question]:
    """Return the prompts: of the golden transcripts given, of the adapter's own, or else of its rendered row.

    Args:
        adapted: The adapter.
        golden: A transcript or a folder of transcripts, or None.

    Raises:
        InputError: If there is no prompt, or one is encoded into other ids than it was.
    """
    own = adapted.adapter / TRANSCRIPTS
    if golden is None and not transcript_files(own):
        row = _rendered_row(adapted.adapter)
        return [Question(Path(RENDERED).stem, row, max_new_tokens=_LONGEST_ANSWER)]
    transcripts = load_folder(own if golden is None else golden)
    for one in transcripts:
        check_prompt(adapted.encoder, one)
    return [Question.again(one) for one in transcripts]


def _rendered_row(adapter: Path) -> Row:
    file = adapter / RENDERED
    if not file.is_file():
        raise InputError(
            f"neither {TRANSCRIPTS} nor {RENDERED}: there is no prompt to prove the merged model with",
            place=str(adapter),
            next_step="Give transcripts with --golden.",
        )
    data = read_json(file)
    named = {key: data[key] for key in ("messages", "tools", "reasoning_effort") if key in data}
    return parse_row(named, place=str(file))


def prove(
    adapted: Adapted, merged: Path, asked: Sequence[Question], *, dtype: str, identity: dict[str, Any], scratch: Path
) -> Proof:
    """Ask base and adapter, then the merged model, with sums in float32 on weights of the merged dtype, and compare.

    Args:
        adapted: Base and adapter, in the precision of `dtype`.
        merged: Folder of the merged weights, with its configuration.
        asked: What `questions` returned.
        dtype: dtype of the merged weights.
        identity: What the merged model's transcripts say of it.
        scratch: Folder for logits, which may be large; it is not there yet.

    Raises:
        MergeError: If the merged model answers otherwise, or its logits are farther away than rounding explains.
    """
    scratch.mkdir()
    model = adapted.load()
    with float32_sums(model):
        expected = [ask(model, adapted, one) for one in asked]
        for one in expected:
            save_file({"logits": _logits(model, one)}, scratch / one.case)
    del model
    _free()
    model = load_base(merged, adapted.precision, adapted.device).eval()
    with float32_sums(model):
        farthest = max(_farthest(model, one, scratch / one.case) for one in expected)
        judgements = [judge(model, adapted.encoder, one, precision=adapted.precision) for one in expected]
    _check_logits(farthest, dtype)
    _check_answers(judgements)
    own = replace(adapted, identity=identity)
    transcripts = [ask(model, own, one) for one in asked]
    return Proof(farthest, sum(one.tier == "equivalent" for one in judgements), transcripts)


def _check_answers(judgements: Sequence[Judgement]) -> None:
    wrong = [one for one in judgements if not one.passed]
    if wrong:
        raise MergeError(
            "\n".join([f"{len(wrong)} of {len(judgements)} prompts are answered otherwise", *_lines(wrong[0])]),
            expected="the answers of base and adapter",
            next_step=f"{_NOTHING} --dtype float32 rounds least.",
        )


def _lines(one: Judgement) -> list[str]:
    broken = [f"{check.name} failed: {check.reason}" for check in one.broken_checks]
    return [f"  {line}" for line in (f"{one.case}: {one.text!r}", *difference_text(one), *broken)]


def _logits(model: Any, one: Transcript) -> torch.Tensor:
    return next_token_logits(model, one.prompt_ids, one.completion_ids)


def _farthest(model: Any, one: Transcript, file: Path) -> float:
    difference = (_logits(model, one) - load_file(file)["logits"]).abs().max().item()
    return inf if isnan(difference) else float(difference)


def _check_logits(farthest: float, dtype: str) -> None:
    if farthest > FARTHEST[dtype]:
        raise MergeError(
            f"logits are up to {farthest:.3g} from those of base and adapter",
            expected=f"at most {FARTHEST[dtype]:g}, which rounding to {dtype} explains",
            next_step=f"{_NOTHING} --dtype float32 rounds least.",
        )


def _free() -> None:
    """Give a model's memory back before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
