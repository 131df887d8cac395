"""A merged folder: it answers as base and adapter do, says what it is made of, and is taken for nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from declared import declare
from peft import PeftModel
from safetensors.torch import load_file, save_file
from suite_outcomes import suite_outcomes
from tiny_runs import CONVERSATIONS, MakeRecipe
from transformers import AutoModelForCausalLM

from pytest_mistral_lora import cli
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.merged.checks import cases
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import listing
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import base_tensors, peft_quiet
from pytest_mistral_lora.training.merge import MergedModel, merge
from pytest_mistral_lora.training.merge.folders import with_ties
from pytest_mistral_lora.training.run import RunResult, train

WEIGHTS = "model.safetensors"


def test_the_weights_are_those_of_pefts_merge(run: RunResult, merged: MergedModel) -> None:
    with peft_quiet():
        expected = PeftModel.from_pretrained(
            load_base(BaseFolder(run.base_folder), "fp32", "cpu"), run.output
        ).merge_and_unload()
    found = load_file(merged.output / WEIGHTS)
    assert found.keys() == base_tensors(expected).keys()
    for name, tensor in base_tensors(expected).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_transformers_loads_it_without_more(run: RunResult, merged: MergedModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged.output)
    assert model.dtype == torch.float32
    prompt = torch.tensor([run.encoder.prompt(run.data.train.rows[0])])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
    assert run.encoder.decode(answer[0, prompt.shape[1] :].tolist()) == CONVERSATIONS[0][-1][1]


def test_the_manifest_says_what_was_merged_and_how_it_compares(run: RunResult, merged: MergedModel) -> None:
    data = load(merged.output).data
    parent = data["parent"]
    assert data == merged.manifest
    assert data["kind"] == "merged"
    assert parent["manifest_sha256"] == sha256_file(run.output / "manifest.json")
    assert parent["tensors_sha256"] == run.manifest["lora"]["tensors_sha256"]
    assert (parent["merge_dtype"], parent["greedy_equal"], parent["near_ties"], parent["prompts"]) == (
        "float32",
        True,
        0,
        5,
    )
    assert 0 < parent["max_abs_logit_difference"] < 1e-3
    assert parent["correctly_rounded"] is True
    assert (parent["quantization"], parent["dequantized"], parent["device"]) == (None, False, "cpu")
    assert parent["environment"]["packages"]["torch"] == torch.__version__
    own = {"kind", "files", "parent", "seal", "tokenizer"}
    assert {key: value for key, value in data.items() if key not in own} == {
        key: value for key, value in run.manifest.items() if key not in own
    }
    tokenizer = dict(data["tokenizer"]["files"])
    assert {**data["tokenizer"], "files": None} == {**run.manifest["tokenizer"], "files": None}
    assert run.manifest["tokenizer"]["files"].items() <= tokenizer.items()
    files = {name: entry for name, entry in listing(merged.output).items() if name != "manifest.json"}
    assert data["files"] == files
    assert all(files[name]["sha256"] == digest for name, digest in tokenizer.items())
    assert set(files) == {
        *("config.json", "model.safetensors", "chat_template.jinja", "DECISION.md", "README.md"),
        *("tokenizer.model.v3", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
        *(f"{TRANSCRIPTS}/row-000{number}.json" for number in range(1, 6)),
    }


def test_llama_cpp_s_converter_finds_the_tokenizer_and_its_spaces(run: RunResult, merged: MergedModel) -> None:
    folder = merged.output
    assert (folder / "tokenizer.model").read_bytes() == (folder / "tokenizer.model.v3").read_bytes()
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    # the base has no tokenizer of transformers: the one that is written gives mistral-common's ids
    tokenizer = CheckpointTokenizer(folder)
    text = "Which colour  is the sky?\n\tBlue 🙂"
    ids = tokenizer.fast(f"</s> {text}", add_special_tokens=False)["input_ids"]
    assert ids[1:] == list(tokenizer.oracle.encode_text(text))


def test_a_tokenizer_s_configuration_gets_the_key_and_its_own_record(
    full_base: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    own = json.loads((full_base / "tokenizer_config.json").read_text())
    assert own.get("add_prefix_space") is None
    result = train(make_recipe(full_base, training={"steps": 2}))
    merged = merge(result.output, tmp_path / "merged", full_base, device="cpu").output
    written = json.loads((merged / "tokenizer_config.json").read_text())
    assert written == {**own, "add_prefix_space": False}
    assert (merged / "tokenizer.json").read_bytes() == (full_base / "tokenizer.json").read_bytes()
    fields = {field.name: field.state for field in verify(merged, base=full_base)}
    assert fields["tokenizer.files.tokenizer_config.json"] == fields["tokenizer.files.tokenizer.model"] == "match"
    assert "mismatch" not in fields.values()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("head", "flag", "tied"), [("own", None, False), ("none", None, True), ("same", True, True)])
def test_the_configuration_is_true_to_the_file_at_every_level(
    tmp_path: Path, nested: bool, head: str, flag: bool | None, tied: bool
) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(4, 2)}
    tensors |= {} if head == "none" else {"lm_head.weight": torch.full((4, 2), float(head == "own"))}
    save_file(tensors, tmp_path / WEIGHTS)
    config = {} if flag is None else {"tie_word_embeddings": flag}
    found = with_ties({"text_config": dict(config)} if nested else config, Weights([tmp_path / WEIGHTS]))
    assert found == {**({"text_config": {"tie_word_embeddings": tied}} if nested else {}), "tie_word_embeddings": tied}


def test_its_transcripts_are_its_own(run: RunResult, merged: MergedModel) -> None:
    own, before = load_folder(merged.output / TRANSCRIPTS), load_folder(run.output / TRANSCRIPTS)
    for transcript, recorded in zip(own, before, strict=True):
        assert transcript.model["kind"] == "merged"
        assert transcript.model["tensors_sha256"] != recorded.model["tensors_sha256"]
        assert transcript.model["base_weights_sha256"] == recorded.model["base_weights_sha256"]
        assert (transcript.case, transcript.completion_ids) == (recorded.case, recorded.completion_ids)
        assert transcript.logprobs == pytest.approx(recorded.logprobs, abs=1e-3)


def test_every_check_of_the_suite_passes(run: RunResult, merged: MergedModel, tmp_path: Path) -> None:
    outcomes = list(suite_outcomes([merged.output], run.base_folder))
    assert {outcome.state for outcome in outcomes} <= {"passed", "skipped"}, outcomes
    assert not any(outcome.findings for outcome in outcomes)
    passed = {f"{outcome.subject}::{outcome.case}" for outcome in outcomes if outcome.state == "passed"}
    assert {"adapter::changes-the-base", "manifest::facts", "manifest::declared", "manifest::base"} <= passed
    assert {"transcript::answers", "transcript::recorded-on", "transcript::prompts"} <= passed


def test_a_layer_that_the_manifest_lists_and_the_weights_lack_is_an_error(
    run: RunResult, merged: MergedModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(merged.output, tmp_path / "out"))
    changed_places = cases(AdapterFolder(folder, BaseFolder(run.base_folder)))["changed-places"]
    assert changed_places().findings == ()
    [layers] = {merged.manifest["lora"]["layers"]}
    last = [name for name in merged.manifest["lora"]["modules"] if name.startswith("model.layers.1.")]
    assert 1 < len(last) < layers  # the last layer: without the manifest, it may have been left out on purpose
    tensors, before = load_file(folder / WEIGHTS), load_file(run.base_folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors | {f"{name}.weight": before[f"{name}.weight"] for name in last}, folder / WEIGHTS)
    findings = cases(AdapterFolder(folder, BaseFolder(run.base_folder)))["changed-places"]().findings
    assert [finding.rule for finding in findings] == ["ML432"] * len(last)
    assert findings[0].found == f"{last[0]} is the base's"
    (folder / "manifest.json").unlink()
    findings = cases(AdapterFolder(folder, BaseFolder(run.base_folder)))["changed-places"]().findings
    assert [finding.rule for finding in findings] == ["ML438"]


def test_a_sharded_base_and_its_generation_settings(run: RunResult, one: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    model = load_base(BaseFolder(run.base_folder), "fp32", "cpu")
    model.save_pretrained(base, max_shard_size="2MB")
    sharded = Path(shutil.copytree(run.output, tmp_path / "lora"))
    recipe = {**run.manifest["recipe"], "base": {"path": str(base)}}
    declare(sharded, {**run.manifest, "recipe": recipe, "base_weights_sha256": BaseFolder(base).weights_sha256})
    done = merge(sharded, tmp_path / "out", golden=one)
    assert done.base.samefile(base)  # beside the adapter, by its name
    names = {file.name for file in (tmp_path / "out").glob("model*")}
    assert names == {file.name for file in base.glob("model*")}
    assert len(names) > 2
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert done.manifest["parent"]["max_abs_logit_difference"] < 1e-3
    assert {fact.state for fact in verify(tmp_path / "out", base=base, parent=sharded)} == {"match", "not available"}


def test_help_lists_the_verb_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "merge" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["merge", "--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--dtype", "--golden", "--dequantise", "--json", "mistral-lora merge"))
