"""`assert_transcript_matches` and the suite judge transcripts, and report each rule and what was not checked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from suite_outcomes import suite_outcomes
from tiny_runs import zero_the_layers

from pytest_mistral_lora.assertions import assert_transcript_matches
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load
from pytest_mistral_lora.training.run import RunResult


def test_the_assertion_passes_on_the_runs_own_folder_and_on_one_transcript(run: RunResult) -> None:
    assert_transcript_matches(run.output, run.output / TRANSCRIPTS, run.base_folder)
    assert_transcript_matches(str(run.output), run.output / TRANSCRIPTS / "row-0003.json", str(run.base_folder))


def test_the_assertion_fails_with_each_rule(adapter: Path, base: Path, run: RunResult, tmp_path: Path) -> None:
    golden = adapter / TRANSCRIPTS
    sound = load(golden / "row-0001.json")
    short = {"name": "short", "kind": "max_tokens", "value": 2, "passed": True, "reason": ""}
    ids = (*sound.completion_ids[:2], 9, *sound.completion_ids[3:])
    for rule, changes in {
        "ML802": {"prompt_ids": (1, *sound.prompt_ids)},
        "ML803": {"model": {**sound.model, "base_weights_sha256": "0" * 64}},
        "ML804": {"completion_ids": ids},
        "ML805": {"checks": (short,)},
    }.items():
        file = replace(sound, **changes).write(tmp_path)
        with pytest.raises(AssertionError) as caught:
            assert_transcript_matches(adapter, file, base)
        assert str(caught.value).startswith(rule)
        assert str(caught.value).count("\n  rule: ") == 1
    file.write_text("{}")
    with pytest.raises(AssertionError, match="ML801"):
        assert_transcript_matches(adapter, file, base)
    zero_the_layers(adapter)
    with pytest.raises(AssertionError, match=r"ML804 .*row-0001\.json, token 0: answered") as caught:
        assert_transcript_matches(adapter, golden, base)
    assert str(caught.value).count("ML804 ") == 5


def test_the_assertion_needs_transcripts_and_a_base(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no transcripts"):
        assert_transcript_matches(adapter, tmp_path)
    with pytest.raises(InputError, match="the base 'tiny' is missing"):
        assert_transcript_matches(adapter, adapter / TRANSCRIPTS)


def test_answers_that_cannot_be_generated_are_no_pass(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1))
    with pytest.raises(InputError, match=r"no answer was judged: .*memory, 0 GiB are free"):
        assert_transcript_matches(adapter, adapter / TRANSCRIPTS, base)


def test_the_suite_says_what_it_did_not_check(adapter: Path, base: Path) -> None:
    def states(base: Path | None) -> dict[str, str]:
        outcomes = [outcome for outcome in suite_outcomes([adapter], base) if outcome.subject == "transcript"]
        return {outcome.case: outcome.state for outcome in outcomes}

    every = ("files", "recorded-on", "prompts", "answers", "formats")
    assert states(base) == dict.fromkeys(every, "passed")
    assert states(None) == {**dict.fromkeys(every, "skipped"), "files": "passed"}
    for file in (adapter / TRANSCRIPTS).iterdir():
        sound = load(file)
        replace(sound, prompt_ids=(1, *sound.prompt_ids)).write(adapter / TRANSCRIPTS)
    # an answer to another prompt says nothing about the adapter
    assert states(base) == {**dict.fromkeys(every, "passed"), "prompts": "failed"} | dict.fromkeys(every[3:], "skipped")
    shutil.rmtree(adapter / TRANSCRIPTS)
    assert states(base) == {"files": "skipped"}
