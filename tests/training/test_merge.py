"""A merged folder: it answers as base and adapter do, says what it is made of, and is taken for nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import declare
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows
from transformers import AutoModelForCausalLM

from pytest_mistral_lora import cli
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import Weights
from pytest_mistral_lora.conformance.checks import check
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.base_location import base_weights_sha256
from pytest_mistral_lora.records.files import listing, sha256_file
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.adapter import base_tensors, peft_quiet
from pytest_mistral_lora.training.generate.judge import compare
from pytest_mistral_lora.training.merge import MergedModel, merge, proof
from pytest_mistral_lora.training.merge.folders import with_ties
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

WEIGHTS = "model.safetensors"


@pytest.fixture
def adapter(run: RunResult, tmp_path: Path) -> Path:
    """A copy of the trained folder to break."""
    return Path(shutil.copytree(run.output, tmp_path / "lora"))


@pytest.fixture
def one(run: RunResult) -> Path:
    """One transcript: a proof with one prompt."""
    return run.output / TRANSCRIPTS / "row-0004.json"


def test_the_weights_are_those_of_pefts_merge(run: RunResult, merged: MergedModel) -> None:
    with peft_quiet():
        expected = PeftModel.from_pretrained(load_base(run.base_folder, "fp32", "cpu"), run.output).merge_and_unload()
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
    results = {
        record["nodeid"]: (record["outcome"], result) for record, result in check([merged.output], base=run.base_folder)
    }
    assert {outcome for outcome, _ in results.values()} <= {"passed", "skipped"}, results
    assert not any(result.findings for _, result in results.values())
    passed = {
        name.partition("::")[2].partition("::")[2] for name, (outcome, _) in results.items() if outcome == "passed"
    }
    assert {"adapter::changes-the-base", "manifest::facts", "manifest::declared", "manifest::base"} <= passed
    assert {"transcript::answers", "transcript::recorded-on", "transcript::prompts"} <= passed


def test_verify_knows_the_parent(run: RunResult, merged: MergedModel, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    facts = verify(merged.output, base=run.base_folder, dataset=rows, parent=run.output)
    assert {fact.state for fact in facts} == {"match"}
    assert {"parent.manifest_sha256", "parent.tensors_sha256", "masking.ids_sha256"} <= {fact.name for fact in facts}
    alone = {fact.name: fact.state for fact in verify(merged.output)}
    assert alone["parent.manifest_sha256"] == alone["parent.tensors_sha256"] == "not available"
    assert cli.main(["verify", str(merged.output), "--parent", str(run.output)]) == 0


def test_an_element_that_is_not_the_sum_is_a_mismatch_whatever_is_declared(
    run: RunResult, merged: MergedModel, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    tensors, name = load_file(copy / WEIGHTS), "model.layers.1.self_attn.o_proj.weight"
    tensors[name][7, 7] *= 1 + 2**-20
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    files = {one: entry for one, entry in listing(copy).items() if one in merged.manifest["files"]}
    declare(copy, {**merged.manifest, "files": files})
    wrong = [one for one in verify(copy, base=run.base_folder, parent=run.output) if one.state == "mismatch"]
    assert [one.name for one in wrong] == ["parent.correctly_rounded"]
    assert f"{name} is not the rounded sum of base and adapter in 1 of" in wrong[0].found
    alone = {one.name: (one.state, one.found) for one in verify(copy, parent=run.output)}
    assert alone["parent.correctly_rounded"] == ("not available", "no base given")
    older = {key: value for key, value in merged.manifest["parent"].items() if key != "correctly_rounded"}
    declare(copy, {**merged.manifest, "files": files, "parent": older})
    facts = verify(copy, base=run.base_folder, parent=run.output)
    assert "parent.correctly_rounded" not in {one.name for one in facts}


def test_another_parent_or_a_changed_bit_is_a_mismatch(adapter: Path, merged: MergedModel) -> None:
    file = adapter / "manifest.json"
    file.write_text(file.read_text() + "\n")
    states = {fact.name: fact.state for fact in verify(merged.output, parent=adapter)}
    assert (states["parent.manifest_sha256"], states["parent.tensors_sha256"]) == ("mismatch", "match")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert {fact.name: fact.state for fact in verify(merged.output, parent=adapter)}[
        "parent.tensors_sha256"
    ] == "mismatch"


def test_whatever_is_changed_in_the_folder_is_found(merged: MergedModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    for name in (*merged.manifest["files"], "manifest.json"):
        before = (copy / name).read_bytes()
        at = len(before) // 2
        (copy / name).write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        try:
            assert "mismatch" in {fact.state for fact in verify(copy)}, name
        except InputError:
            assert name == "manifest.json"
        (copy / name).write_bytes(before)
    assert "mismatch" not in {fact.state for fact in verify(copy)}


def test_answers_of_the_adapter_are_not_the_merged_models_own(
    run: RunResult, merged: MergedModel, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    shutil.copytree(run.output / TRANSCRIPTS, copy / TRANSCRIPTS, dirs_exist_ok=True)
    findings = [finding for _, result in check([copy]) for finding in result.findings]
    assert {finding.rule for finding in findings} == {"ML702", "ML803"}
    assert any("the model's tensors have SHA-256" in finding.text() for finding in findings)


def test_smoke_needs_no_base(
    merged: MergedModel, run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["smoke", str(merged.output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 exact, 0 equivalent, 0 different; fp32 on cpu"
    assert cli.main(["smoke", str(merged.output), "--golden", str(run.output / TRANSCRIPTS)]) == 0
    *_, remark, verdict = capsys.readouterr().out.splitlines()
    assert remark == "The transcripts were recorded with another model than this merged one."
    assert verdict == "5 exact, 0 equivalent, 0 different; fp32 on cpu"
    rows = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:1])
    assert cli.main(["smoke", str(merged.output), "--rows", str(rows), "--json"]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert (answered["completions"][0]["equal"], "adapter_effect" in answered) == (True, False)
    assert cli.main(["smoke", str(merged.output), "--base", str(run.base_folder)]) == 2
    assert "a merged model (kind merged in its manifest.json), which needs no base" in capsys.readouterr().err


def test_a_merged_model_that_is_changed_is_different(merged: MergedModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged.output, tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, copy / WEIGHTS)
    comparison = compare(copy)
    assert (comparison.passed, comparison.recorded_adapter, comparison.kind) == (False, False, "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_proven_in_their_own_dtype(
    run: RunResult, one: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "merge",
        run.output,
        tmp_path / "out",
        "--base",
        run.base_folder,
        "--golden",
        one,
        "--dtype",
        dtype,
        "--json",
    ]
    assert cli.main([str(word) for word in words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output"] == str(tmp_path / "out")
    assert said["parent"]["merge_dtype"] == dtype
    assert 0 < said["parent"]["max_abs_logit_difference"] < 1
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    [transcript] = load_folder(tmp_path / "out" / TRANSCRIPTS)
    assert transcript.precision == {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    assert compare(tmp_path / "out").tiers["exact"] == 1


@pytest.mark.parametrize(
    "lora",
    [{"rslora": True, "dora": True}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}],
)
def test_a_run_without_transcripts_is_proven_with_its_rendered_row(
    base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    train(parse_recipe(recipe_data(base, lora=lora, training={"steps": 3}), folder=tmp_path))
    done = merge(tmp_path / "out", tmp_path / "merged", base)
    assert done.manifest["parent"]["prompts"] == 1
    assert done.manifest["parent"]["max_abs_logit_difference"] < 1e-3
    assert [one.case for one in load_folder(tmp_path / "merged" / TRANSCRIPTS)] == ["rendered_row"]
    assert done.manifest["lora"] == load(tmp_path / "out").data["lora"]


def test_a_sharded_base_and_its_generation_settings(run: RunResult, one: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny"
    model = load_base(run.base_folder, "fp32", "cpu")
    model.save_pretrained(base, max_shard_size="9MB")
    sharded = Path(shutil.copytree(run.output, tmp_path / "lora"))
    declare(sharded, {**run.manifest, "base_weights_sha256": base_weights_sha256(base)})
    done = merge(sharded, tmp_path / "out", golden=one)
    assert done.base.samefile(base)  # beside the adapter, by its name
    names = {file.name for file in (tmp_path / "out").glob("model*")}
    assert names == {file.name for file in base.glob("model*")}
    assert len(names) > 2
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert done.manifest["parent"]["max_abs_logit_difference"] < 1e-3
    assert {fact.state for fact in verify(tmp_path / "out", base=base, parent=sharded)} == {"match", "not available"}


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_base_in_the_wrong_dtype_or_scale_fails_the_proof(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(run.output), str(tmp_path / "out"), "--base", str(run.base_folder), "--golden", str(one)]
    monkeypatch.setattr("pytest_mistral_lora.training.merge.plan_merge", lambda *given: {})
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "is not the rounded sum of base and adapter in " in said
    assert "units in the last place, and 7 more; expected at most half a unit" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("pytest_mistral_lora.training.merge.check_sums", lambda *given: None)
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "from those of base and adapter; expected at most 0.01, which rounding to float32 explains" in said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(proof, "FARTHEST", {"float32": 1e9})
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert "1 of 1 prompts are answered otherwise\n  row-0004: " in said
    assert "token 0: recorded" in said
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_fail_the_proof(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([torch.zeros(9, 9), torch.full((9, 9), torch.nan)])
    monkeypatch.setattr(proof, "_answer_logits", lambda *given: next(found))
    with pytest.raises(MergeError, match="logits are up to inf from those"):
        merge(run.output, tmp_path / "out", run.base_folder, golden=one)


def test_a_near_tie_is_recorded_and_said(
    run: RunResult, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tie that falls otherwise cannot be made at will: every difference is taken for one."""
    for name, found in (("plan_merge", {}), ("check_sums", None)):
        monkeypatch.setattr(f"pytest_mistral_lora.training.merge.{name}", lambda *given, found=found: found)
    monkeypatch.setattr(proof, "FARTHEST", {"float32": 1e9})
    monkeypatch.setattr("pytest_mistral_lora.training.generate.judge.answer_tier", lambda *given: "equivalent")
    done = merge(run.output, tmp_path / "out", run.base_folder, golden=one)
    assert (done.manifest["parent"]["greedy_equal"], done.manifest["parent"]["near_ties"]) == (False, 1)
    assert done.notes == ("1 of 1 answers differ, from a token on that base and adapter hardly prefer.",)


def test_help_lists_the_verb_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "merge" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["merge", "--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--dtype", "--golden", "--dequantise", "--json", "mistral-lora merge"))
