"""A tiny run on fill-in-the-middle rows, and what is read of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_data, smoke

from pytest_mistral_lora.chat.kinds.fim import FimRow, parse_fim_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import FindingsError, RowError
from pytest_mistral_lora.records.goldens import Case, record, violations
from pytest_mistral_lora.records.goldens import load as load_golden
from pytest_mistral_lora.records.transcripts import load, load_folder
from pytest_mistral_lora.records.transcripts import violations as transcript_violations
from pytest_mistral_lora.serving.server import chat_request
from pytest_mistral_lora.training.export.run import _why_not_message
from pytest_mistral_lora.training.generate.chat_session import prompt_row
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.run import RunResult, train

ROWS = [
    {"prompt": f"def area_{n}(a, b):\n    ", "suffix": f"\n    return area_{n}\n", "completion": f"area_{n} = a * {n}"}
    for n in range(4)
]
# by itself, SentencePiece's decoder leaves the space of the completion out
ROWS.append({"prompt": "x =", "suffix": "\ny = 2\n", "completion": " 1"})


def write_gaps(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def gap_run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    folder = tmp_path_factory.mktemp("gaps")
    write_gaps(folder)
    evaluation = {"generations": 5, "max_new_tokens": 40}
    return train(parse_recipe(recipe_data(base, evaluation=evaluation), folder=folder))


def test_the_model_fills_the_gaps_of_its_rows(gap_run: RunResult) -> None:
    assert [completion.text for completion in gap_run.completions] == [row["completion"] for row in ROWS]
    assert [completion.equal for completion in gap_run.completions] == [True] * 5


def test_a_run_on_gaps_alone_does_not_lead_to_a_chat(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_data(base, training={"steps": 1})))
    rows = write_gaps(tmp_path)
    assert main(["train", str(recipe)]) == 0
    shown = capsys.readouterr().err
    assert "mistral-lora smoke " in shown
    assert "mistral-lora chat " not in shown
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    rows.write_text(rows.read_text() + json.dumps(chat) + "\n")
    recipe.write_text(json.dumps({**recipe_data(base, training={"steps": 1}), "output": "both"}))
    assert main(["train", str(recipe)]) == 0
    assert "mistral-lora chat " in capsys.readouterr().err


def test_the_manifest_says_that_completions_carry_loss(gap_run: RunResult) -> None:
    manifest = json.loads((gap_run.output / "manifest.json").read_text())
    assert manifest["masking"]["policy"] == "assistant turns of weight 1 and completions, to EOS"
    supervised = sum(encoded.supervised_tokens for encoded in gap_run.data.train.encoded)
    assert manifest["masking"]["supervised_tokens"] == supervised


def test_the_folder_is_verified_with_its_rows(gap_run: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    rows = gap_run.output.parent / "rows.jsonl"
    assert main(["verify", str(gap_run.output), "--dataset", str(rows)]) == 0
    assert "0 mismatch" in capsys.readouterr().out


def test_smoke_answers_the_transcripts_again(
    gap_run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = gap_run.base_folder
    assert smoke(gap_run.output, "--base", base) == 0
    assert "5 exact" in capsys.readouterr().out
    prompts = tmp_path / "prompts.jsonl"
    lines = [{key: ROWS[4][key] for key in ("prompt", "suffix")}, ROWS[0]]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert smoke(gap_run.output, "--base", base, "--rows", prompts) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [
        "row 0: ' 1' (stopped by eos, not checked)",
        "row 1: 'area_0 = a * 0' (stopped by eos, as in the row)",
    ]


def test_a_transcript_is_read_as_it_is_written(gap_run: RunResult) -> None:
    transcripts = load_folder(gap_run.output / "transcripts")
    assert [transcript.row.to_json() for transcript in transcripts] == ROWS
    file = gap_run.output / "transcripts" / "row-0005.json"
    data = json.loads(file.read_text())
    assert data["row"] == {"prompt": "x =", "suffix": "\ny = 2\n"}
    assert data["answer"] == [{"role": "completion", "content": " 1"}]
    assert load(file).to_text() == file.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"row": {"prompt": "a"}},
        {"row": {"prompt": "a", "suffix": "b", "messages": []}},
        {"answer": [{"role": "completion"}]},
        {"answer": [{"role": "completion", "content": "a"}, {"role": "completion", "content": "b"}]},
    ],
)
def test_a_transcript_of_another_form_is_refused(change: dict[str, Any], gap_run: RunResult) -> None:
    data = json.loads((gap_run.output / "transcripts" / "row-0001.json").read_text())
    assert not transcript_violations(data, "row-0001")
    assert transcript_violations({**data, **change}, "row-0001")


def test_many_rows_come_from_the_cache_as_they_were_encoded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MANY_BYTES", 1)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    write_gaps(tmp_path)
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))
    recipe = parse_recipe(recipe_data(base), folder=tmp_path)
    for _ in range(2):
        train = load_data(recipe, encoder, processes=1).train
        assert [row.to_json() for row in train.rows] == ROWS
        assert list(train.encoded) == [encoder.encode(parse_fim_row(row)) for row in ROWS]
        assert train.figures.tally.completions == 5
    assert any((tmp_path / "cache").rglob("*.arrow"))


def test_a_run_through_the_chat_template_refuses_the_rows(tmp_path: Path, full_base: Path) -> None:
    write_gaps(tmp_path)
    recipe = parse_recipe({**recipe_data(full_base), "backend": "chat-template"}, folder=tmp_path)
    with pytest.raises(FindingsError, match="no chat template renders"):
        train(recipe)


def test_a_golden_of_a_gap_is_its_own_test(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer(shipped_tokenizer("spm-v3"))
    case = Case(name="gap", description="A gap.", row=parse_fim_row(ROWS[0]), versions=frozenset())
    golden = record(case, tokenizer, tmp_path)
    golden.write()
    assert load_golden(golden.path) == golden
    assert golden.encoded.spans[-1].role == "completion"
    data = json.loads(golden.path.read_text())
    assert not violations(data, "gap")
    assert violations({**data, "row": {"prompt": "a", "completion": "b"}}, "gap")


def test_the_suite_judges_a_recorded_gap(
    tmp_path: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)  # where goldens are not written
    folder = pytester.mkdir("goldens")
    write_gaps(folder)
    arguments = ("--mistral-golden", "--mistral-golden-dir", "goldens", "--mistral-tokenizer", "spm-v3", "-k", "own-")
    arguments = (*arguments, "--mistral-no-train", "-p", "no:cacheprovider")
    pytester.runpytest_inprocess(*arguments, "--mistral-golden-update")
    assert len(list(folder.glob("templates/*/*.json"))) == 5
    pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=5)


def test_a_gap_is_exported_as_tokens() -> None:
    row = parse_fim_row(ROWS[0])
    encoded = CheckpointTokenizer(shipped_tokenizer("spm-v3")).oracle.encode(row)
    template: Any = None
    assert _why_not_message(row, encoded, template) == "it is fill-in-the-middle, which has no messages"


def test_a_gap_is_asked_of_a_model_and_not_of_a_chat() -> None:
    asked = prompt_row({"prompt": "a", "suffix": "b"})
    assert (asked.has_answer, asked.row) == (False, FimRow.of("a", "b", ""))
    assert prompt_row(ROWS[0]).has_answer
    with pytest.raises(RowError):
        chat_request(parse_fim_row(ROWS[0]))
