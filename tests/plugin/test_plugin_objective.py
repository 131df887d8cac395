"""`--mistral-objective`: labels are judged by it, and what it does not apply to is a usage error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plugin_rows import ROW, write_rows

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.plugin.settings import PluginSettings

Run = Callable[..., pytest.RunResult]
TALK: dict[str, Any] = {
    "messages": [
        *ROW["messages"],
        {"role": "user", "content": "And a larger one?"},
        {"role": "assistant", "content": "Eleven is."},
    ]
}


@pytest.fixture
def here(pytester: pytest.Pytester) -> Path:
    made = Target("spm-v3").oracle.encode(replace(parse_row(TALK), objective=Objective("last-answer")))
    encoded = {"input_ids": list(made.input_ids), "labels": list(made.labels or ())}
    write_rows(pytester.path / "encoded.jsonl", [{**TALK, **encoded}])
    write_rows(pytester.path / "rows.jsonl", [TALK])
    write_rows(pytester.path / "gaps.jsonl", [{"prompt": "a = 1", "suffix": "c = 3", "completion": "b = 2"}])
    return pytester.path


@pytest.mark.parametrize(
    "workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["one process", "two workers"]
)
def test_labels_are_judged_by_the_option(workers: tuple[str, ...], here: Path, golden: Run) -> None:
    rows = ("--mistral-encoded=encoded.jsonl", "--mistral-dataset=rows.jsonl")
    targets = (*rows, "--mistral-tokenizer=spm-v3", *workers)
    result = golden(*targets, "--mistral-objective=last-answer", "--mistral-report=out.json")
    assert result.ret == pytest.ExitCode.OK
    first = ["*= Mistral conformance =*", "objective: last-answer (--mistral-objective)"]
    result.stdout.fnmatch_lines([*first, "*target *subject *"])
    checks = json.loads((here / "out.json").read_text())["checks"]
    assert {check["facts"]["objective"] for check in checks} == {"last-answer (--mistral-objective)"}
    result = golden(*targets, "--mistral-objective=everything")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*ML551*encoded.jsonl:1*", "rerun:*--mistral-objective=everything*"])


def test_labels_are_judged_by_the_ini_value(here: Path, golden: Run, pytester: pytest.Pytester) -> None:
    # beside rows, the tokenizer is not judged itself
    targets = "mistral_encoded = encoded.jsonl\nmistral_datasets = rows.jsonl\nmistral_tokenizers = spm-v3"
    pytester.makeini(f"[pytest]\nmistral_objective = last-answer\n{targets}")
    result = golden()
    result.stdout.fnmatch_lines(["objective: last-answer (mistral_objective)"])
    assert result.ret == pytest.ExitCode.OK
    assert golden("--mistral-objective=answers").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--mistral-tokenizer=spm-v3",), ("--mistral-objective is for rows", "training.objective")),
        (("--mistral-dataset=gaps.jsonl", "--mistral-tokenizer=spm-v3"), ("gaps.jsonl:1", "takes no objective")),
        (("--mistral-encoded=encoded.jsonl", "--mistral-tokenizer=spm-v3"), ("[THINK]", "expected an objective")),
    ],
)
def test_what_it_does_not_apply_to_is_a_usage_error(
    words: tuple[str, ...], found: tuple[str, ...], here: Path, golden: Run
) -> None:
    objective = "no-thinking" if "[THINK]" in found else "last-answer"
    result = golden(*words, f"--mistral-objective={objective}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    refusal = result.stderr.str().strip()
    assert refusal.startswith("ERROR: ")
    assert [part for part in (*found, "--mistral-objective") if part not in refusal] == []


def test_an_ini_value_is_not_for_the_tokenizers_of_the_command_line(
    here: Path, settings_of: Callable[..., PluginSettings], pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\nmistral_objective = last-answer\nmistral_tokenizers = spm-v7")
    assert settings_of("--mistral-tokenizer=spm-v3").objective is None
