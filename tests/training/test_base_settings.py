"""Settings in a base's own files that would change a loss or an answer: they are left out, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from class_models import Case, distance
from class_steps import Case as ClassCase
from class_steps import ClassRun
from tiny_runs import MakeRecipe, base_with

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.generate import complete
from pytest_mistral_lora.training.generate.record import next_token_logprobs
from pytest_mistral_lora.training.prepare import plan_run, prepare
from pytest_mistral_lora.training.step import Segment
from pytest_mistral_lora.training.step.forward import attend_in_segments, segment_arguments

LENGTH = 16
BY_LENGTH: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": LENGTH,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
}
"""The factors are for heads of 32 numbers."""


def rope(kind: str) -> dict[str, Any]:
    positions = {"rope_theta": 10000.0, **BY_LENGTH[kind]}
    # transformers 4 reads the first key, and 5 the second
    return {"rope_scaling": positions, "rope_parameters": positions, "max_position_embeddings": LENGTH}


class Stretched(Case):
    """A model whose frequencies depend on the longest row of a pass."""

    def config(self, **sizes: Any) -> Any:
        return super().config(**rope("dynamic"), **sizes)


def test_frequencies_that_follow_the_longest_row_make_a_pack_inexact() -> None:
    assert distance(Stretched("llama"))[1] > 0.1  # the reason for the refusal below


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rows_that_would_change_the_frequencies_of_others_are_refused(
    kind: str, base: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    folder = base_with(base, tmp_path / "base", **rope(kind))
    with pytest.raises(RecipeError, match=rf"^training\.max_length: 17, .* {kind}: .* at most 16"):
        prepare(make_recipe(folder, training={"max_length": LENGTH + 1}))


def test_rows_within_the_original_length_are_not(base: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    folder = base_with(base, tmp_path / "base", **rope("dynamic"))
    assert plan_run(make_recipe(folder, training={"max_length": LENGTH})).layers


@pytest.mark.parametrize(("share_prefix", "dropout"), [(True, 0.1), (True, 0.0), (False, 0.1)])
def test_rows_share_no_mask_of_the_bases_own_dropout(
    base: Path, tmp_path: Path, make_recipe: MakeRecipe, share_prefix: bool, dropout: float
) -> None:
    recipe = make_recipe(
        base_with(base, tmp_path / "base", attention_dropout=dropout), training={"share_prefix": share_prefix}
    )
    if share_prefix and dropout:
        with pytest.raises(RecipeError, match=r"training.share_prefix: true, .*attention_dropout 0.1"):
            plan_run(recipe)
    else:
        assert plan_run(recipe).layers


def test_greedy_answers_follow_no_penalty_of_the_base(base: Path, tmp_path: Path) -> None:
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))
    prompt = encoder.tokenizer.oracle.encode_text("la la la la")
    plain = complete(load_base(BaseFolder(base), "fp32", "cpu"), encoder, prompt, max_new_tokens=4)
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    own = {"repetition_penalty": 9.0, "suppress_tokens": list(plain), "do_sample": True, "temperature": 5.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps({**own, **ids, "transformers_version": "4.57.1"}))
    model = load_base(BaseFolder(folder), "fp32", "cpu")
    assert complete(model, encoder, prompt, max_new_tokens=4) == plain
    assert next_token_logprobs(model, prompt, plain).argmax(dim=-1).tolist() == list(plain)
    assert model.generation_config.eos_token_id == 2


def test_a_base_that_reports_the_balance_of_its_experts_is_trained(tmp_path: Path) -> None:
    run = ClassRun(ClassCase(Architecture(TEXT_MODELS["mixtral"]), tied=False), tmp_path)
    run.write_base()
    config = json.loads((run.base / "config.json").read_text())
    (run.base / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    model = load_base(BaseFolder(run.base), "fp32", "cpu")
    attend_in_segments(model)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 9)[None], **segment_arguments([Segment(0, 4)])).logits
    assert logits.shape[1] == 4
