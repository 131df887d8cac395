"""lm-eval itself, on a local task. Left out, with the reason, where it is not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.cli import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed here; tox run -e runner-lm-eval")

DOCUMENTS = [
    {"question": "Which colour is the sky?", "choices": ["Blue", "Red"], "answer": 0},
    {"question": "Which colour is grass?", "choices": ["Pink", "Green"], "answer": 1},
    {"question": "Which colour is snow?", "choices": ["White", "Black"], "answer": 0},
]
TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl, train: documents.jsonl}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
description: Answer with one word.
"""
GENERATED = (
    TASK.replace("task: colours", "task: written")
    .replace("multiple_choice", "generate_until")
    .replace('"{{answer}}"', '"{{choices[answer]}}"')
    .replace('doc_to_choice: "{{choices}}"', 'generation_kwargs: {until: ["."], max_gen_toks: 8}')
)
CONFIG = {"tasks": ["colours", "written"], "include_path": "tasks", "apply_chat_template": True, "num_fewshot": 2}

Found = dict[str, list[str]]
Audit = Callable[..., tuple[int, Found]]


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Audit:
    """Audit the prompts of the task, and return the exit code and what is found by each rule."""
    monkeypatch.chdir(tmp_path)
    Path("documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    Path("tasks").mkdir()
    for name, text in (("colours", TASK), ("written", GENERATED)):
        Path("tasks", f"{name}.yaml").write_text(text)

    def run(*options: str, tokenizer: str = "tekken-240911", **config: Any) -> tuple[int, Found]:
        Path("eval.yaml").write_text(json.dumps({**CONFIG, **config}))
        words = [
            "check",
            "--runner",
            "lm-eval",
            "--config",
            "eval.yaml",
            "--tokenizer",
            tokenizer,
            "--output-format=jsonl",
        ]
        code = main([*words, *options])
        *findings, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        rules: Found = {}
        for finding in findings:
            rules.setdefault(finding["rule"], []).append(f"{finding['place']}: {finding['found']}")
        assert last["summary"]["rows"] == 9
        return code, rules

    return run


def test_the_prompts_of_tekken_are_sound(audit: Audit) -> None:
    assert audit() == (0, {})


def test_a_choice_straight_behind_the_marker_is_another_token_of_sentencepiece(audit: Audit) -> None:
    code, found = audit(tokenizer="spm-v3")
    assert (code, found.keys()) == (1, {"ML528"})
    # the prompts whose answers are generated are right
    assert len(found["ML528"]) == 6
    assert found["ML528"][0] == "colours, document 0: after [/INST]: 'Blue', expected ' Blue'"
    documents = [{**document, "choices": [f" {choice}" for choice in document["choices"]]} for document in DOCUMENTS]
    Path("documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    code, found = audit(tokenizer="spm-v3", num_fewshot=0)
    assert (code, found) == (0, {})
    # Tekken has learned answers without it
    code, found = audit(num_fewshot=0)
    assert (code, found.keys()) == (1, {"ML582"})


def test_two_bos_are_found(audit: Audit) -> None:
    code, found = audit(model_args={"add_bos_token": True, "prefix_token_id": 2})
    assert (code, found.keys()) == (1, {"ML521"})
    assert found["ML521"][0] == "colours, document 0: BOS is there 2 times"


def test_texts_without_the_chat_template_are_found(audit: Audit) -> None:
    code, found = audit(apply_chat_template=False)
    assert (code, found.keys()) == (1, {"ML580"})
    assert len(found["ML580"]) == 9


def test_examples_in_the_turn_of_the_question_are_a_note(audit: Audit) -> None:
    code, found = audit(fewshot_as_multiturn=False)
    assert (code, found.keys()) == (0, {"ML581"})
    assert found["ML581"][0].startswith("colours, document 0: 2 examples")


def test_a_system_prompt_that_the_harness_drops_is_found(audit: Audit, tmp_path: Path) -> None:
    from converted import converted_tokenizer

    folder = tmp_path / "checkpoint"
    converted_tokenizer("tekken-240911").fast.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    refusal = "{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    code, found = audit("--oracle", "tekken-240911", tokenizer=str(folder))
    assert (code, found.keys()) == (1, {"ML525"})


def test_the_system_prompt_of_the_rows_is_missed(audit: Audit, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    rows.write_text(json.dumps({"messages": [{"role": "system", "content": "Be kind."}, *turns]}) + "\n")
    code, found = audit("--dataset", str(rows))
    assert (code, found.keys()) == (0, {"ML583"})
    assert "9 of 9 prompts have a system prompt" in found["ML583"][0]
    for name in ("colours", "written"):
        path = Path("tasks", f"{name}.yaml")
        path.write_text(path.read_text().replace("description: Answer with one word.", ""))
    assert audit("--dataset", str(rows), system_instruction="Be kind.") == (0, {})


def test_a_task_that_is_not_there_ends_with_the_harness_s_own_words(
    audit: Audit, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("eval.yaml").write_text(json.dumps({**CONFIG, "tasks": ["colors"]}))
    words = ["check", "--runner", "lm-eval", "--config", "eval.yaml", "--tokenizer", "tekken-240911"]
    assert main(words) == 2
    assert "Tasks not found: colors" in capsys.readouterr().err


def test_pytest_judges_an_evaluation(pytester: pytest.Pytester, audit: Audit) -> None:
    audit()
    pytester.path.joinpath("eval.yaml").write_text(json.dumps({**CONFIG, "include_path": str(Path("tasks").resolve())}))
    pytester.path.joinpath("documents.jsonl").write_text(Path("documents.jsonl").read_text())
    options = ["--mistral-golden", "--mistral-runner=lm-eval=eval.yaml", "-k", "runner", "-p", "no:randomly"]
    result = pytester.runpytest_subprocess(*options, "--mistral-tokenizer=spm-v3")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["ML528 colours, document *: after ?/INST?: *"])
    result.stdout.fnmatch_lines(["*the answers of an evaluation are not trained on*"])
