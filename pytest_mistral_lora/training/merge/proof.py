"""The checks of a merge: adapter and base before it, and the merged model's logits and greedy answers after it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.chat.fields import ROW_KEYS
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import parse_row
from pytest_mistral_lora.checkpoint.base_model import base_weights, load_base, read_config, weight_files
from pytest_mistral_lora.checkpoint.fp8 import declared_quantization, is_fp8
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import FARTHEST, AdapterFolder
from pytest_mistral_lora.records.judgement import AnswerJudgement, check_prompt, difference_text
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load_folder, transcript_files
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.generate.judge import judge
from pytest_mistral_lora.training.generate.model_spec import ModelSpec, Question, ask
from pytest_mistral_lora.training.generate.record import next_token_logits
from pytest_mistral_lora.training.merge.plan import INDEX
from pytest_mistral_lora.training.save import RENDERED

BASE_DTYPE = "base"
"""Value of `--dtype` for the dtype of the base's own weights."""

_DTYPE_NAMES = {code: name for name, code in DTYPES.items()}

# Tokens of the answer to a training row, which is the prompt if there are no transcripts.
_LONGEST_ANSWER = 64
_NEXT_STEP = "Nothing is written. --dtype float32 rounds least."


def merge_source(adapter: Path, base: Path | None, *, device: str) -> ModelSpec:
    """Return an adapter and its base, after both are compared with the adapter's manifest.

    Args:
        adapter: The adapter's folder.
        base: The base's folder; by default, the one that the adapter's folder records.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        InputError: If the folder is no adapter, its manifest is missing, too old, or differs from it, or the base
            is not the one that the adapter was trained on.
    """
    folder = AdapterFolder(adapter, base, may_fetch=True)
    folder.require_adapter()
    if folder.manifest is None:
        raise InputError(
            f"no {MANIFEST}: nothing records the origin of the adapter, and a merged model could not record it either",
            place=str(adapter),
            expected="an adapter folder as mistral-lora train leaves it",
            next_step="PEFT's merge_and_unload merges it without a record.",
        )
    if folder.manifest.version == 0:
        missing = ", ".join(folder.manifest.not_recorded[:4])
        raise InputError(
            f"a manifest of version 0, which does not record {missing} and more",
            place=str(folder.manifest_file),
            expected="a manifest as mistral-lora train writes it",
        )
    # files that are not listed do no harm: a merge does not copy them
    wrong = [field for field in verify(folder) if field.state == "mismatch" and not field.is_unlisted]
    if wrong:
        raise InputError(
            f"{wrong[0].name} is {wrong[0].found}",
            place=str(wrong[0].place),
            expected=f"{wrong[0].recorded}, as recorded",
            next_step=f"The folder is not as it was saved: mistral-lora verify {adapter} lists the differences.",
        )
    return ModelSpec.of(folder, device=device)


def refuse_quantized(base: Path) -> None:
    """Refuse a base with quantised weights other than FP8, by its configuration.

    Raises:
        InputError: With the method of quantisation.
    """
    quantization = declared_quantization(config := read_config(base))
    if quantization and not is_fp8(config):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"the base is quantised ({method}): an adapter cannot be added to packed weights",
            place=str(base / "config.json"),
            expected="full weights",
            next_step="Give the full base with --base, or merge into the dequantised weights: --dequantise.",
        )


def require_full_weights(base: Path) -> Weights:
    """Return a base's tensors in full precision, those in FP8 dequantised.

    Raises:
        PinError: As for `base_weights`.
        InputError: If an adapter is in the base's folder, or if the index differs from the files.
    """
    refuse_quantized(base)
    weights = base_weights(base)
    packed = next((name for name, info in weights.infos.items() if info.dtype not in _DTYPE_NAMES), None)
    if packed is not None:
        info = weights.infos[packed]
        raise InputError(f"{packed} is in {info.dtype}", place=str(info.file), expected=f"one of {', '.join(DTYPES)}")
    if (base / CONFIG).is_file():
        raise InputError(
            "the base has an adapter in its folder, which transformers puts on it", place=str(base / CONFIG)
        )
    index = base / INDEX
    if len(weights.files) == 1 and not index.is_file():
        return weights
    # transformers loads by the index, and this module by the files: they must agree
    listed = read_json(index).get("weight_map")
    found = {name: info.file.name for name, info in weights.stored.infos.items()}
    if listed != found:
        odd = sorted(dict(found.items() ^ (listed or {}).items()))[:1] or ["weight_map"]
        raise InputError(f"{odd[0]} is not where the index says", place=str(index), expected="an index of these files")
    return weights


def merge_dtype(base: Path, weights: Weights, asked: str) -> str:
    """Return the dtype to write: the one asked for, or that of the base's weights.

    Args:
        base: The base's folder.
        weights: Its tensors.
        asked: A name of `DTYPES`, or `base`.

    Raises:
        InputError: If there is no such dtype, or the base's weights have several and its configuration names none.
    """
    if asked in DTYPES:
        return asked
    if asked != BASE_DTYPE:
        raise InputError(f"{asked!r}", place="--dtype", expected=f"{BASE_DTYPE} or one of {', '.join(DTYPES)}")
    found = {_DTYPE_NAMES[info.dtype] for info in weights.infos.values()}
    if len(found) == 1:
        return found.pop()
    config = read_config(base)
    named = str(config.get("dtype") or config.get("torch_dtype"))
    if named not in found:
        raise InputError(
            f"the base's weights are in {' and '.join(sorted(found))}",
            place=str(weights.files[0].parent),
            next_step="Choose with --dtype.",
        )
    return named


def weights_of(base: Path) -> Weights:
    """Return the tensors of a base's folder.

    Raises:
        PinError: If there are none.
        InputError: If a file is no safetensors file.
    """
    return Weights(weight_files(base))


@contextmanager
def float32_sums(model: Any) -> Iterator[None]:
    """Let a model compute in float32 within the block; of its weights, one is in float32 at a time."""
    # Two models must differ by weights, not by how their sums round. On a real model of 135M parameters, merged
    # in bfloat16, logits differed by 0.4 to 1.0 from base and adapter with sums in bfloat16, by 0.1 to 0.2 in float32.
    handles: list[Any] = []
    for module in model.modules():
        own = {name: one.data for name, one in module.named_parameters(recurse=False) if one.dtype != torch.float32}
        if own:
            handles.append(module.register_forward_pre_hook(lambda one, given, own=own: _set(one, own, torch.float32)))
            handles.append(module.register_forward_hook(lambda one, given, output, own=own: _set(one, own)))
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
        near_ties: Number of prompts with another answer, which differs first at a token that base and adapter hardly
            preferred.
        transcripts: The merged model's own answers, with sums in its own dtype.
    """

    max_abs_logit_difference: float
    near_ties: int
    transcripts: Sequence[Transcript]

    @property
    def greedy_equal(self) -> bool:
        """Whether all greedy answers are equal, token by token."""
        return not self.near_ties


def proof_questions(adapter: AdapterFolder, golden: Path | None) -> list[Question]:
    """Return the prompts: of the golden transcripts given, of the adapter's own, or else of its rendered row.

    Args:
        adapter: The adapter.
        golden: A transcript or a folder of transcripts, or None.

    Raises:
        InputError: If there is no prompt, or one is encoded into other ids than it was.
    """
    own, rendered = adapter.path / TRANSCRIPTS, adapter.path / RENDERED
    if golden is not None or transcript_files(own):
        transcripts = load_folder(own if golden is None else golden)
        for one in transcripts:
            check_prompt(adapter.encoder, one)
        return [Question.again(one) for one in transcripts]
    if not rendered.is_file():
        raise InputError(
            f"neither {TRANSCRIPTS} nor {RENDERED}: there is no prompt to prove the merged model with",
            place=str(adapter.path),
            next_step="Give transcripts with --golden.",
        )
    data = read_json(rendered)
    named = {key: data[key] for key in ROW_KEYS if key in data}
    return [Question(rendered.stem, parse_row(named, place=str(rendered)), max_new_tokens=_LONGEST_ANSWER)]


def prove(
    spec: ModelSpec, merged: Path, asked: Sequence[Question], *, dtype: str, identity: dict[str, Any], scratch: Path
) -> Proof:
    """Ask base and adapter, then the merged model, with sums in float32 on weights of the merged dtype, and compare.

    Args:
        spec: Base and adapter, in the precision of `dtype`.
        merged: Folder of the merged weights, with its configuration.
        asked: The result of `proof_questions`.
        dtype: dtype of the merged weights.
        identity: The `model` of the merged model's transcripts.
        scratch: Folder to make for logits, which may be large.

    Raises:
        MergeError: If the merged model answers otherwise, or its logits are farther away than rounding explains.
    """
    scratch.mkdir()
    model = spec.load()
    with float32_sums(model):
        expected = [ask(model, spec, one) for one in asked]
        for one in expected:
            save_file({"logits": _answer_logits(model, one)}, scratch / one.case)
    # both models together may not fit: the first is freed, and its logits wait on disk
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = load_base(merged, spec.precision, spec.device).eval()
    farthest = 0.0
    with float32_sums(model):
        for one in expected:
            apart = (_answer_logits(model, one) - load_file(scratch / one.case)["logits"]).abs().max().item()
            farthest = max(farthest, inf if isnan(apart) else apart)  # max() would lose a NaN
        judgements = [judge(model, spec.encoder, one, precision=spec.precision) for one in expected]
    _check_equal(farthest, judgements, dtype)
    own = replace(spec, identity=identity)
    transcripts = [ask(model, own, one) for one in asked]
    return Proof(farthest, sum(one.tier == "equivalent" for one in judgements), transcripts)


def _answer_logits(model: Any, answer: Transcript) -> torch.Tensor:
    return next_token_logits(model, answer.prompt_ids, answer.completion_ids)


def _check_equal(farthest: float, judgements: Sequence[AnswerJudgement], dtype: str) -> None:
    if farthest > FARTHEST[dtype]:
        raise MergeError(
            f"logits are up to {farthest:.3g} from those of base and adapter",
            expected=f"at most {FARTHEST[dtype]:g}, which rounding to {dtype} explains",
            next_step=_NEXT_STEP,
        )
    wrong = [one for one in judgements if not one.passed]
    if wrong:
        first = wrong[0]
        broken = [f"{check.name} failed: {check.reason}" for check in first.broken_checks]
        count = f"{len(wrong)} of {len(judgements)} prompts are answered otherwise"
        lines = "\n  ".join([count, f"{first.case}: {first.text!r}", *difference_text(first), *broken])
        raise MergeError(lines, expected="the answers of base and adapter", next_step=_NEXT_STEP)
