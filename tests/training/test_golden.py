"""A saved adapter answers as its transcripts say; where it does not, the tier and the first other token are said."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_sentencepiece import cut_v3
from forked import run_forked
from safetensors.torch import load_file, save_file
from tiny_runs import CONVERSATIONS, recipe_data, smoke, write_rows, zero_the_layers
from transformers import MistralForCausalLM

from pytest_mistral_lora import judge as judge_folder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.judgement import TOLERANCES
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, Transcript, load, load_folder
from pytest_mistral_lora.training.generate.judge import compare, judge
from pytest_mistral_lora.training.generate.record import next_token_logprobs
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train


def test_a_new_process_answers_as_the_run_did(run: RunResult) -> None:
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "smoke", str(run.output), "--base"]
    done = run_forked([*command, run.base_folder])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "5 exact, 0 equivalent, 0 different; fp32 on cpu"


def test_a_run_leaves_a_transcript_of_each_generation(run: RunResult) -> None:
    transcripts = load_folder(run.output / TRANSCRIPTS)
    assert [one.text for one in transcripts] == [one[-1][1] for one in CONVERSATIONS]
    for transcript, completion in zip(transcripts, run.completions, strict=True):
        assert transcript.completion_ids == completion.ids
        assert transcript.prompt_ids == run.encoder.prompt(transcript.row)
        assert transcript.model["tensors_sha256"] == run.manifest["lora"]["tensors_sha256"]
        assert transcript.model["base_weights_sha256"] == run.manifest["base_weights_sha256"]
        assert f"{TRANSCRIPTS}/{transcript.case}.json" in run.manifest["files"]
        assert all(margin > 1 for margin in transcript.margins)
        assert not set(zip(transcript.completion_ids, transcript.runner_up_ids, strict=True)) & {
            (n, n) for n in range(9)
        }


def test_log_probabilities_are_those_of_the_model(run: RunResult) -> None:
    transcript = load_folder(run.output / TRANSCRIPTS)[2]
    ids = torch.tensor([[*transcript.prompt_ids, *transcript.completion_ids]])
    with torch.inference_mode():
        logits = run.model(input_ids=ids, use_cache=False).logits[0, len(transcript.prompt_ids) - 1 : -1].double()
    own = logits.log_softmax(-1)
    best = own.topk(2, dim=-1)
    expected = best.values[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist(), best.indices[:, 1].tolist()
    # float32, which CPUs of several kinds sum in other orders: 2.9e-5 was seen
    assert transcript.logprobs == pytest.approx(expected[0], abs=5e-5)
    assert transcript.margins == pytest.approx(expected[1], abs=5e-5)
    assert list(transcript.runner_up_ids) == expected[2]


def test_a_broken_adapter_is_different(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero_the_layers(adapter)
    assert smoke(adapter, "--base", base) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "different   row-0001"
    assert lines[1].startswith("  token 0: recorded 2993 '▁Par' (probability 0.")
    assert lines[3] == "  recorded: 'Paris is the capital of France.'"
    remark, *verdict = lines[-3:]
    assert "another adapter" in remark
    assert verdict == ["0 exact, 0 equivalent, 5 different; fp32 on cpu", "next: mistral-lora rules ML804"]
    assert smoke(adapter, "--base", base, "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["passed"], data["recorded_adapter"], data["tiers"]["different"]) == (False, False, 5)
    assert data["transcripts"][0]["difference"]["golden"]["piece"] == "▁Par"
    assert smoke(adapter, "--base", base, "--output-format", "github") == 1
    *annotations, verdict = capsys.readouterr().out.splitlines()
    assert annotations[0].startswith("::error file=")
    assert "row-0001.json,title=ML804 " in annotations[0]
    assert verdict.startswith("0 exact, 0 equivalent, 5 different; ")
    assert smoke(adapter, "--base", base, "--rows", adapter, "--output-format", "github") == 2
    assert "--output-format: without transcripts" in capsys.readouterr().err


def test_a_tensor_of_another_shape_is_a_finding_and_answers_are_not_checked(
    run: RunResult, adapter: Path, base: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.cat([tensors[name]] * 2, dim=1)}, file)
    verdict = judge_folder(adapter, base=base)
    assert [finding for finding in verdict.findings if finding.rule == "ML412" and name in finding.found]
    not_checked = {name.partition("::")[2] for name in verdict.not_checked}
    assert {"transcript::answers", "transcript::formats"} <= not_checked
    healthy = judge_folder(run.output, base=base)
    assert healthy.ok
    assert not [name for name in healthy.not_checked if "::transcript::" in name]


def test_a_known_answer_does_not_fail_and_a_report_has_each_transcript(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / TRANSCRIPTS / "row-0002.json"
    transcript = load(file)
    # another answer was recorded
    ids = (*transcript.completion_ids[:-2], 1117, transcript.completion_ids[-1])
    replace(transcript, completion_ids=ids).write(file.parent)
    known, report = tmp_path / "known.txt", tmp_path / "report.json"
    assert smoke(adapter, "--base", base, "--write-xfails", known, "--report", report) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "next: mistral-lora rules ML804"
    nodeid = f"mistral-golden::{adapter.name}::transcript::row-0002"
    data = json.loads(report.read_text())
    assert {check["nodeid"]: check["outcome"] for check in data["checks"] if check["outcome"] != "passed"} == {
        nodeid: "failed"
    }
    assert (data["counts"]["passed"], data["counts"]["failed"]) == (4, 1)
    known.write_text(known.read_text().replace("  # \n", "  # we know\n"))
    assert nodeid in known.read_text()
    assert smoke(adapter, "--base", base, "--xfails", known) == 0
    out = capsys.readouterr().out
    assert f"known {nodeid}: we know (1 check)" in out
    assert "4 exact, 0 equivalent, 1 different" in out
    assert smoke(adapter, "--base", base, "--rows", file, "--report", report) == 2
    assert "--report: without transcripts" in capsys.readouterr().err


def with_another_choice(run: RunResult, *, margin: float, moved: float = 0.0) -> Transcript:
    """A transcript as other hardware would have recorded it: at token 2, it chose the runner-up."""
    sound = load_folder(run.output / TRANSCRIPTS)[0]
    ids = list(sound.completion_ids)
    ids[2] = sound.runner_up_ids[2]
    logprobs = next_token_logprobs(run.model, sound.prompt_ids, ids).gather(1, torch.tensor(ids)[:, None])
    margins = (*sound.margins[:2], margin, *sound.margins[3:])
    values = tuple(value - moved for value in logprobs.squeeze(1).tolist())
    return replace(sound, completion_ids=tuple(ids), margins=margins, logprobs=values)


@pytest.mark.parametrize(
    ("margin", "moved", "tier"),
    [
        (TOLERANCES["fp32"].margin / 2, 0.0, "equivalent"),
        (-0.001, 0.0, "equivalent"),
        (TOLERANCES["fp32"].margin * 2, 0.0, "different"),
        (TOLERANCES["fp32"].margin / 2, TOLERANCES["fp32"].logprob * 2, "different"),
    ],
)
def test_another_token_is_equivalent_only_at_a_near_tie(run: RunResult, margin: float, moved: float, tier: str) -> None:
    judgement = judge(run.model, run.encoder, with_another_choice(run, margin=margin, moved=moved), precision="fp32")
    assert judgement.tier == tier
    assert judgement.passed is (tier == "equivalent")
    assert judgement.difference is not None
    assert judgement.difference.token == 2
    assert judgement.difference.found.id == load_folder(run.output / TRANSCRIPTS)[0].completion_ids[2]
    found, golden = judgement.difference.found.probability, judgement.difference.golden.probability
    assert (found or 0) > 0.9 > (golden or 1)
    assert judgement.logprob_difference == pytest.approx(moved, abs=1e-4)


def test_where_precisions_differ_the_wider_tolerance_counts(run: RunResult) -> None:
    golden = with_another_choice(run, margin=TOLERANCES["fp32"].margin * 2)
    assert judge(run.model, run.encoder, golden, precision="bf16").tier == "equivalent"
    recorded = replace(golden, precision="bf16")
    assert judge(run.model, run.encoder, recorded, precision="fp32").tier == "equivalent"


def test_a_prompt_that_is_encoded_otherwise_is_an_error_of_its_own(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / TRANSCRIPTS / "row-0002.json"
    transcript = load(file)
    ids = list(transcript.prompt_ids)
    for changed, place, said in [
        ([*ids[:2], 1027, *ids[3:]], "prompt token 2 is", "expected 1027 '▁▁'"),
        (ids[:-1], f"prompt token {len(ids) - 1} is 4 '[/INST]'", "expected the end"),
        ([*ids, 5], f"prompt token {len(ids)} is the end", "expected 5 "),
    ]:
        replace(transcript, prompt_ids=tuple(changed)).write(file.parent)
        assert smoke(adapter, "--base", base) == 2
        error = capsys.readouterr().err
        assert re.search(f"error: transcript row-0002: .*: {re.escape(place)}", error)
        assert said in error
        assert "as recorded with mistral-common" in error


def test_another_base_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tiny_base(tmp_path / "other", cut_v3(), seed=1)
    assert smoke(adapter, "--base", other) == 2
    assert "which the adapter was trained on" in capsys.readouterr().err
    golden = adapter / TRANSCRIPTS
    golden.rename(tmp_path / "golden")
    (adapter / "manifest.json").unlink()
    assert smoke(adapter, "--base", other, "--golden", tmp_path / "golden") == 2
    assert "on which row-0001 was recorded" in capsys.readouterr().err


def test_a_base_is_found_where_its_recipe_has_it(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert smoke(adapter) == 2
    assert re.search("'tiny' is missing.*--base", capsys.readouterr().err)
    write_tiny_base(tmp_path / "tiny", cut_v3(), seed=1)
    assert smoke(adapter) == 2  # a folder of that name with other weights is not the base
    monkeypatch.chdir(base.parent)
    assert smoke(adapter) == 0
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    shutil.copytree(base, tmp_path / "tiny")
    assert compare(adapter).base.samefile(tmp_path / "tiny")


def test_no_transcripts_is_an_error_that_says_what_to_do(
    adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(adapter / TRANSCRIPTS)
    assert smoke(adapter, "--base", base) == 2
    error = capsys.readouterr().err
    assert f"{adapter / TRANSCRIPTS}: no such folder" in error
    assert "mistral-lora smoke DIR --record FOLDER" in error


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    "run_out",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),  # a RuntimeError of torch's own allocator
        out_of_device_memory,
    ],
    ids=["host", "device"],
)
def test_a_model_that_does_not_fit_is_exit_code_3_with_advice(
    run_out: Callable[[], Any],
    run: RunResult,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(MistralForCausalLM, "forward", lambda *given, **named: run_out())
    assert smoke(run.output, "--base", base) == 3
    error = capsys.readouterr().err
    assert "error: out of memory: " in error
    assert "--device cpu" in error


def test_a_format_that_falls_apart_fails_whatever_the_tier(adapter: Path, base: Path) -> None:
    file = adapter / TRANSCRIPTS / "row-0001.json"
    check = {"name": "regex:x", "kind": "regex", "value": "x", "passed": True, "reason": ""}
    replace(load(file), checks=(check,)).write(file.parent)
    comparison = compare(adapter, base=base)
    assert comparison.tiers["exact"] == 5
    assert [one.name for one in comparison.judgements[0].broken_checks] == ["regex:x"]
    assert not comparison.passed


@pytest.mark.parametrize("settings", [{"training": {"precision": "bf16"}}, {"backend": "chat-template"}])
def test_each_precision_and_backend_is_exact_in_the_same_environment(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    training = {"steps": 3, **settings.get("training", {})}
    data = recipe_data(base, training=training, evaluation={"generations": 2, "max_new_tokens": 6})
    result = train(parse_recipe({**data, **{k: v for k, v in settings.items() if k == "backend"}}, folder=tmp_path))
    comparison = compare(result.output, base=base)
    assert comparison.tiers == {"exact": 2, "equivalent": 0, "different": 0}
    assert comparison.recorded_adapter
    assert max(one.logprob_difference for one in comparison.judgements) < 1e-5


def test_no_adapter_is_an_error(tmp_path: Path, run: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: no such file"):
        compare(tmp_path, run.output / TRANSCRIPTS)
    assert smoke(tmp_path, "--golden", run.output / TRANSCRIPTS) == 2
