"""Runs that drop and cut rows by choice: what they record is what they trained on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from declared import declare
from many_rows import said, write_lines
from tiny_runs import recipe_data

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.notes import DECISION
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

ROWS = [
    said("Hi", "Yes."),
    said("Hi", "Yes.", weight=0),
    said("Hi", "long " * 60),
    said("long " * 60, "Yes."),
    said("Hello", "No."),
]
HELD_OUT = [said("Ho", "Perhaps."), said("Ho", "long " * 60)]


def run_of(folder: Path, base: Path, **training: Any) -> RunResult:
    write_lines(folder / "rows.jsonl", ROWS)
    write_lines(folder / "eval.jsonl", HELD_OUT)
    training = {"steps": 2, "batch_size": 1, "max_length": 30, **training}
    return train(parse_recipe(recipe_data(base, data={"eval": ["eval.jsonl"]}, training=training), folder=folder))


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    return run_of(tmp_path_factory.mktemp("cut"), base, truncation="right", unsupervised="drop")


@pytest.mark.parametrize(("name", "place"), [("rows", "data.train"), ("eval", "data.eval")])
def test_rows_of_which_none_has_a_loss_are_refused_before_a_weight_is_loaded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setattr(
        sys.modules[__name__], "ROWS" if name == "rows" else "HELD_OUT", [said("Hm", "Yes.", weight=0)] * 2
    )
    monkeypatch.delattr("pytest_mistral_lora.training.run._load_with_adapter")
    with pytest.raises(InputError, match=rf"^{place}: none of its 2 rows has a token to train on"):
        run_of(tmp_path, base, unsupervised="warn", truncation="drop")


def removed(part: dict[str, Any]) -> list[Any]:
    names = ("rows_dropped", "rows_truncated", "rows_without_loss", "tokens_removed", "supervised_tokens_removed")
    return [part[name] for name in names]


def test_the_manifest_counts_what_was_dropped_and_cut(cut: RunResult) -> None:
    dataset, encode = cut.manifest["dataset"], cut.encoder.tokenizer.oracle.encode
    whole = [encode(row) for row in ROWS]
    used = [whole[0], whole[2].cut(30), whole[4]]
    tokens, supervised = sum(len(one.input_ids) for one in used), sum(one.supervised_tokens for one in used)
    assert (dataset["rows"], dataset["rows_used"], dataset["held_out_rows"]) == (5, 3, 2)
    assert (dataset["truncation"], dataset["unsupervised"]) == ("right", "drop")
    assert removed(dataset) == [
        {"nothing-supervised": 2},
        1,
        0,
        sum(len(one.input_ids) for one in whole) - tokens,
        sum(one.supervised_tokens for one in whole) - supervised,
    ]
    beyond = len(encode(HELD_OUT[1]).input_ids) - 30
    assert removed(dataset["held_out_removed"]) == [{}, 1, 0, beyond, beyond]
    masking = cut.manifest["masking"]
    assert (masking["tokens"], masking["supervised_tokens"]) == (tokens, supervised)
    assert [file["rows"] for file in (*dataset["files"], *dataset["eval_files"])] == [5, 2]


def test_the_decision_record_says_it(cut: RunResult) -> None:
    text, dataset = (cut.output / DECISION).read_text(), cut.manifest["dataset"]
    figures = f"{dataset['tokens_removed']} tokens removed, {dataset['supervised_tokens_removed']} of them with loss"
    assert "| Rows | 3 trained on, 2 held out |" in text
    assert f" 2 dropped (nothing-supervised), 1 cut: {figures} |" in text
    assert "| Held-out rows | 1 cut: " in text


def test_what_was_dropped_and_cut_is_found_again(cut: RunResult) -> None:
    facts = {fact.name: fact for fact in verify(cut.output, base=cut.base_folder, dataset=cut.output.parent)}
    assert {fact.state for fact in facts.values()} == {"match"}
    assert {"dataset.rows_used", "dataset.rows_dropped", "dataset.rows_truncated", "masking.ids_sha256"} <= set(facts)


def copied(run: RunResult, folder: Path, change: dict[str, Any]) -> Path:
    """Copy a run with other figures in its manifest."""
    copy = Path(shutil.copytree(run.output, folder / "copy", dirs_exist_ok=True))
    manifest = {**run.manifest, "dataset": {**run.manifest["dataset"], **change}}
    declare(copy, manifest)
    return copy


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"rows_truncated": 2}, {"dataset.rows_truncated"}),
        ({"rows_dropped": {}}, {"dataset.rows_dropped"}),
        ({"rows_used": 4}, {"dataset.rows_used"}),
        ({"tokens_removed": 1}, {"dataset.tokens_removed"}),
        (
            {"truncation": "drop"},
            {
                "dataset.truncation",
                "dataset.rows_used",
                "dataset.rows_dropped",
                "dataset.rows_truncated",
                "dataset.rows_sha256",
                "dataset.tokens_removed",
                "dataset.supervised_tokens_removed",
                "dataset.held_out_rows",
                "dataset.held_out_rows_sha256",
                "dataset.held_out_ids_sha256",
                "dataset.held_out_labels_sha256",
                "dataset.held_out_removed.rows_dropped",
                "dataset.held_out_removed.rows_truncated",
                "dataset.held_out_removed.tokens_removed",
                "dataset.held_out_removed.supervised_tokens_removed",
                "masking.ids_sha256",
                "masking.labels_sha256",
                "masking.tokens",
                "masking.supervised_tokens",
            },
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_figure_that_was_edited_is_a_mismatch(
    change: dict[str, Any], facts: set[str], cut: RunResult, tmp_path: Path
) -> None:
    folder = copied(cut, tmp_path, change)
    found = verify(folder, dataset=cut.output.parent)
    assert {fact.name for fact in found if fact.state == "mismatch"} == facts


@pytest.mark.parametrize(
    ("unsupervised", "rows"),
    [("drop", {"dataset.rows": None}), ("error", {"dataset.rows": "match", "dataset.rows_used": "match"})],
)
def test_without_a_tokenizer_rows_are_counted_where_none_can_have_been_dropped(
    unsupervised: str, rows: dict[str, str | None], cut: RunResult, tmp_path: Path
) -> None:
    folder = copied(cut, tmp_path, {"unsupervised": unsupervised, "rows_used": 5})
    (folder / "tokenizer.model.v3").unlink()
    found = {fact.name: fact.state for fact in verify(folder, dataset=cut.output.parent) if not fact.again}
    assert found["masking.ids_sha256"] == "mismatch"
    assert {name: found.get(name) for name in rows} == rows


def test_a_row_without_loss_may_be_kept_in_a_step_that_has_others(base: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS[:2])
    training = {"steps": 2, "batch_size": 2, "unsupervised": "warn"}
    run = train(parse_recipe(recipe_data(base, training=training), folder=tmp_path))
    assert run.manifest["dataset"]["rows_without_loss"] == 1
    assert "1 without loss: 0 tokens removed" in (run.output / DECISION).read_text()
