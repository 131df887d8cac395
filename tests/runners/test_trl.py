"""TRL itself, through its own command's code. Left out, with the reason, where it is not installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import write_derived

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.runners import TRAINERS, find_runner
from pytest_mistral_lora.runners.extract import Extraction, extract

pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Run:
    def run(rows: list[Row], config: str = "max_length: null") -> list[dict[str, Any]]:
        (tmp_path / "trl.yaml").write_text(config)
        made: Extraction = extract(
            find_runner("trl"), rows, checkpoint, tmp_path / "out.jsonl", config=tmp_path / "trl.yaml"
        )
        assert made.environment["trl"]
        return [json.loads(line) for line in made.file.read_text().splitlines()]

    return run


def test_ids_are_mistral_common_s_and_everything_is_trained_on_by_default(run: Run, rows: list[Row]) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    for row, line in zip(rows, run(rows), strict=True):
        assert line["input_ids"] == list(oracle.encode(row).input_ids)
        assert line["labels"] == line["input_ids"]


def test_rows_of_which_it_drops_one_and_moves_the_rest_come_back_in_order(run: Run, rows: list[Row]) -> None:
    long = parse_row({"messages": [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "No."}]})
    prompt = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}"
    template = prompt + "{% generation %} {{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    Path("template.jinja").write_text(template)
    config = "max_length: 20\nassistant_only_loss: true\nshuffle_dataset: true\nchat_template_path: template.jinja"
    lines = run([rows[0], long, *rows[1:]], config)
    assert [line["row"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[1]["error"] == "it was left out, without an error"
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    for row, line in zip(rows, [lines[0], *lines[2:]], strict=True):
        assert line["labels"] == list(oracle.encode(row).labels or ())


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_row_that_is_cut_comes_back_cut(run: Run, rows: list[Row]) -> None:
    assert [len(line["input_ids"]) for line in run(rows[:1], "max_length: 5")] == [5]


def test_a_configuration_that_it_refuses_is_an_error_with_its_words(run: Run, rows: list[Row]) -> None:
    with pytest.raises(RunnerError, match="chat template is not training-compatible"):
        run(rows, "assistant_only_loss: true")


def test_packing_is_refused_by_name(run: Run, rows: list[Row]) -> None:
    with pytest.raises(RunnerError, match="turn packing off"):
        run(rows, "packing: true\nmax_length: 64")


def test_the_audit_says_what_is_wrong(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "[INST]"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    words = ["check", "--runner", "trl", "--tokenizer", str(checkpoint), "--dataset", str(tmp_path / "rows.jsonl")]
    assert main([*words, "--output-format=jsonl"]) == 1
    output = capsys.readouterr()
    *findings, summary = [json.loads(line) for line in output.out.splitlines()]
    assert {finding["class"] for finding in findings} == {"control-token-injection", "everything-trained"}
    assert summary["summary"]["wrong"] == 1
    assert "trl 1." in output.err


@pytest.mark.parametrize("name", ["derived-v7", "derived-v11", "derived-v13-thinking", "derived-v15-schema"])
def test_the_training_template_of_a_newer_layout_gives_the_oracles_labels(name: str, tmp_path: Path) -> None:
    """`mistral-lora template` for `chat_template_path`: generation spans, system prompt, tools and thinking."""
    tekken = write_derived(name, tmp_path, words=1000)
    tokenizer = CheckpointTokenizer(tekken)
    (tmp_path / "folder").mkdir()
    tokenizer.fast.save_pretrained(tmp_path / "folder")  # no tekken.json: with it, TRL gets no template at all
    assert main(["template", "--tokenizer", str(tekken), "--output", "training.jinja"]) == 0
    Path("trl.yaml").write_text("max_length: null\nassistant_only_loss: true\nchat_template_path: training.jinja\n")
    # TRL gives a template messages and tools, and no other key of a row
    cases = [case for case in packaged_cases() if case.fits(tokenizer.oracle)]
    cases = [case for case in cases if not case.row.reasoning_effort and not case.row.response_format]
    sound = [case for case in cases if not compare(case.row, tokenizer.oracle, tokenizer.template).deviations]
    sound = [case for case in sound if all(message.get("weight") != 0 for message in case.row.messages)]
    assert len(sound) > 20
    made = extract(
        find_runner("trl"),
        [case.row for case in sound],
        tmp_path / "folder",
        tmp_path / "out.jsonl",
        config=Path("trl.yaml"),
        oracle=str(tekken),
    )
    with made.file.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    for case, line in zip(sound, lines, strict=True):
        encoded = tokenizer.oracle.encode(case.row)
        assert "error" not in line, (case.name, line["error"])
        assert line["input_ids"] == list(encoded.input_ids), case.name
        assert line["labels"] == list(encoded.labels or ()), case.name


def test_a_known_trainer_has_its_fix_alone(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(row.to_jsonl() + "\n" for row in rows))
    words = ["--runner", "trl", "--python", sys.executable, "--tokenizer", "spm-v3"]
    assert main(["check", *words, "--dataset", str(tmp_path / "rows.jsonl")]) == 1
    shown = capsys.readouterr().out
    assert "\n  fix:      Set `assistant_only_loss: true`" in shown
    assert not any(f"\n  {trainer.title}:" in shown for trainer in TRAINERS.values())


def test_every_token_is_an_error_or_is_declared(
    tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(row.to_jsonl() + "\n" for row in rows))
    words = ["check", "--runner", "trl", "--python", sys.executable, "--tokenizer", "spm-v3"]
    words += ["--dataset", str(tmp_path / "rows.jsonl")]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "ML543" in shown
    assert "declare it: `--objective everything`" in " ".join(shown.split())
    assert main([*words, "--objective", "everything"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "objective: everything (--objective)"
    Path("trl.yaml").write_text("max_length: null\nassistant_only_loss: true\n")
    assert main([*words, "--config", "trl.yaml", "--objective", "everything"]) == 2
    assert "everything (--objective) and answers (assistant_only_loss: true)" in capsys.readouterr().err
