"""A recipe reads data in any format: converted like `mistral-lora import`, and recorded by bytes and by rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_runs import CONVERSATIONS, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_file, sha256_files
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.dataset.checks import check_dataset
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import InputError, RecipeError, RowsError
from pytest_mistral_lora.formats.sources import recorded_file
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import sha256_rows
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.recipe import Recipe, load_recipe, parse_recipe
from pytest_mistral_lora.training.rerun import rerun
from pytest_mistral_lora.training.rows import loading
from pytest_mistral_lora.training.rows.loading import RunData, load_data
from pytest_mistral_lora.training.run import train

FROM = {"system": "system", "user": "human", "assistant": "gpt"}


def sharegpt() -> list[dict[str, Any]]:
    return [{"conversations": [{"from": FROM[role], "value": text} for role, text in one]} for one in CONVERSATIONS]


def write_sources(folder: Path) -> dict[str, Any]:
    """Write the same rows in several formats, and return the entry of each in a recipe."""
    (folder / "talks.json").write_text(json.dumps(sharegpt(), indent=1))
    shards = folder / "shards"
    shards.mkdir()
    for number, part in enumerate((sharegpt()[:2], sharegpt()[2:])):
        parquet.write_table(pa.Table.from_pylist(part), shards / f"train-{number:05}-of-00002.parquet")
    talk = [[{"who": role, "what": text} for role, text in one] for one in CONVERSATIONS]
    (folder / "mine.jsonl").write_text("".join(json.dumps({"talk": one}) + "\n" for one in talk))
    columns = {"messages": "talk"}
    return {
        "array": {"path": "talks.json"},
        "named": {"path": "talks.json", "format": "sharegpt"},
        "shards": {"path": "shards"},
        "layout": {
            "path": "mine.jsonl",
            "format": "messages",
            "layout": {"keys": columns, "message_keys": {"role": "who", "content": "what"}},
        },
    }


@pytest.fixture
def loaded(base: Path) -> Any:
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))

    def load(recipe: Recipe) -> RunData:
        return load_data(recipe, encoder)

    return load


@pytest.mark.parametrize("is_long", [False, True], ids=["in-memory", "cached"])
def test_every_format_gives_the_same_run(
    tmp_path: Path, make_recipe: MakeRecipe, loaded: Any, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "is_long", lambda files: is_long)
    expected = loaded(make_recipe()).train
    for name, entry in write_sources(tmp_path).items():
        # twice: encoded, then from the cache
        for _ in range(1 + is_long):
            data = loaded(make_recipe(data={"train": [entry]}))
            assert list(data.train.rows) == list(expected.rows), name
            assert data.train.figures.sha256 == expected.figures.sha256
            for file in data.files:
                assert file.source is not None
                again = read_rows(recorded_file(file.path, {"source": file.source}))
                assert file.source["rows_sha256"] == sha256_rows(again)
            assert sum(file.rows for file in data.files) == len(CONVERSATIONS)


def test_rows_have_the_places_of_the_source(tmp_path: Path, make_recipe: MakeRecipe, loaded: Any) -> None:
    write_sources(tmp_path)
    data = loaded(make_recipe(data={"train": ["rows.jsonl"], "eval": [{"path": "shards"}]}))
    folder = tmp_path / "shards"
    assert [str(row.place) for row in data.held_out.rows] == [
        *(f"{folder / 'train-00000-of-00002.parquet'}:{number}" for number in (1, 2)),
        *(f"{folder / 'train-00001-of-00002.parquet'}:{number}" for number in (1, 2, 3)),
    ]


def test_bad_records_are_reported_with_those_of_other_files(
    tmp_path: Path, make_recipe: MakeRecipe, loaded: Any
) -> None:
    (tmp_path / "talks.json").write_text(json.dumps([*sharegpt(), {"conversations": [{"from": "bot", "value": "x"}]}]))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RowsError) as caught:
        loaded(make_recipe(data={"train": ["rows.jsonl", {"path": "talks.json"}]}))
    assert [str(error.place) for error in caught.value.errors] == [
        f"{tmp_path}/rows.jsonl:1",
        f"{tmp_path}/talks.json record 6, line 1, conversations[0].from",
    ]


def test_a_loss_is_an_error_until_the_recipe_allows_it(
    tmp_path: Path, make_recipe: MakeRecipe, loaded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": 5, "rejected": "c"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    with pytest.raises(RowsError, match=r"a preference pair.*`lossy: \[rejected\]`"):
        loaded(make_recipe(data={"train": [{"path": "pairs.jsonl"}]}))
    with caplog.at_level(logging.WARNING):
        data = loaded(make_recipe(data={"train": [{"path": "pairs.jsonl", "lossy": ["rejected", "bad-records"]}]}))
    assert len(data.train.rows) == 1
    assert "rejected in 1 records, 1 records as a whole" in caplog.text
    assert data.files[0].source["left_out"] == 1


def test_a_file_of_another_format_is_refused_if_it_is_named_as_rows(
    tmp_path: Path, make_recipe: MakeRecipe, loaded: Any
) -> None:
    write_sources(tmp_path)
    with pytest.raises(RowsError, match=r"this is a JSON array"):
        loaded(make_recipe(data={"train": ["talks.json"]}))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"path": "nowhere.json"}, "no such file or folder"),
        ({"path": "rows.jsonl", "dataset": ["mine"]}, "declares no data set mine"),
    ],
)
def test_an_entry_that_cannot_be_opened_is_an_error_of_train_and_a_finding_of_check(
    tmp_path: Path, make_recipe: MakeRecipe, base: Path, loaded: Any, entry: dict[str, Any], said: str
) -> None:
    write_sources(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match=said):
        loaded(make_recipe(data={"train": [entry]}))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe_data(base, data={"train": ["rows.jsonl", entry]})))
    chosen = Settings(1, None, "cpu", True, (), False, tmp_path / "work")
    chosen.work_folder.mkdir()
    checks = [one for one in collect([RecipeTarget("recipe", file)], chosen) if one.subject == "dataset"]
    results = {check.case: check.run() for check in checks if check.case != "recipe"}
    # one check reports it, with the key of the recipe, and the others are not checked
    [finding] = [finding for result in results.values() for finding in result.findings]
    assert (finding.rule, said in f"{finding.found} {finding.expected}") == ("ML640", True)
    assert "data.train.1, " in str(finding.place)
    assert all(result.not_checked for result in results.values() if not result.findings)


def results_of(folder: Path, base: Path, data: dict[str, Any]) -> Any:
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe_data(base, data=data)))
    return check_dataset(file, processes=1)


def test_check_judges_the_rows_of_a_source_at_their_places(tmp_path: Path, base: Path) -> None:
    write_sources(tmp_path)
    whole = results_of(tmp_path, base, {"train": [{"path": "talks.json"}], "eval": [{"path": "shards"}]})
    assert dict(whole["statistics"].facts)["rows"] == 2 * len(CONVERSATIONS)
    leaked = whole["no-leakage"].findings
    assert str(leaked[0].place) == f"{tmp_path / 'shards' / 'train-00000-of-00002.parquet'}:1"
    assert f"{tmp_path / 'talks.json'} record 1, line 2" in leaked[0].words
    (tmp_path / "talks.json").write_text(json.dumps([*sharegpt(), {"conversations": []}]))
    bad = results_of(tmp_path, base, {"train": [{"path": "talks.json"}]})["rows-are-valid"].findings
    assert [(one.rule, str(one.place)) for one in bad] == [("ML601", f"{tmp_path / 'talks.json'} record 6, line 1")]


def test_the_manifest_has_bytes_and_rows_and_verify_and_rerun_compare_both(
    tmp_path: Path, base: Path, make_recipe: MakeRecipe
) -> None:
    entries = write_sources(tmp_path)
    data = {"train": [entries["layout"], entries["shards"]], "eval": [entries["array"]]}
    # its files have the same rows
    result = train(make_recipe(data=data, training={"steps": 2}), unjudged=True)
    folder = AdapterFolder(result.output)
    manifest = folder.require_manifest().data
    shards = sorted((tmp_path / "shards").iterdir())
    assert manifest["dataset_sha256"] == sha256_files([tmp_path / "mine.jsonl", *shards])
    files = manifest["dataset"]["files"]
    assert [one["path"] for one in files] == ["mine.jsonl", *(f"shards/{path.name}" for path in shards)]
    assert [one["sha256"] for one in files] == [sha256_file(tmp_path / one["path"]) for one in files]
    assert files[0]["source"]["rows_sha256"] == sha256_rows(read_rows(write_rows(tmp_path / "rows.jsonl")))
    assert files[0]["source"]["format"] == "messages"
    assert manifest["recipe"]["data"]["train"] == data["train"]
    decision = (result.output / "DECISION.md").read_text()
    assert f"JSON Lines of messages, rows `{files[0]['source']['rows_sha256']}`" in decision

    fields = verify(result.output, base=base, dataset=tmp_path, open_file=recorded_file)
    assert {field.name: field.state for field in fields if field.state != "match"} == {
        "dataset.judgement": "not available"
    }
    assert "dataset.eval_files[0].source.rows_sha256" in {field.name for field in fields}
    unopened = {field.name: field.state for field in verify(result.output, base=base, dataset=tmp_path)}
    assert unopened["dataset.rows_sha256"] == "not available"
    assert set(unopened.values()) == {"match", "not available"}

    assert rerun(result.output, base=base).fact.state == "match"
    text = (tmp_path / "mine.jsonl").read_text()
    (tmp_path / "mine.jsonl").write_text(text.replace("spider", "beetle"))
    changed = {
        field.name
        for field in verify(result.output, dataset=tmp_path, open_file=recorded_file)
        if field.state == "mismatch"
    }
    assert {"dataset_sha256", "dataset.files[0].sha256", "dataset.files[0].source.rows_sha256"} <= changed
    with pytest.raises(InputError, match="the data has SHA-256"):
        rerun(result.output, base=base)


def test_an_output_in_the_data_is_refused(tmp_path: Path, base: Path) -> None:
    from pytest_mistral_lora.training.run_folder import check_output

    entries = write_sources(tmp_path)
    data = recipe_data(base, data={"train": [entries["shards"]]})
    with pytest.raises(RecipeError, match="is inside the data"):
        check_output(parse_recipe({**data, "output": "shards/out"}, folder=tmp_path))


@pytest.mark.parametrize(
    ("entry", "field", "said"),
    [
        ("{format: sharegpt}", "data.train.0.path", "is missing"),
        ("{path: a.json, formt: sharegpt}", "data.train.0.formt", "no such key .did you mean 'format'"),
        ("{path: a.json, format: sharegp}", "data.train.0.format", "expected one of messages, sharegpt"),
        ("{path: a.json, lossy: [reject]}", "data.train.0.lossy.0", "expected one of rejected"),
        ("{path: a.json, lossy: rejected}", "data.train.0.lossy", "expected a list|should be a list"),
        ("{path: a.json, layout: {system: x}}", "data.train.0", "a layout without its format"),
        ("{path: a.json, format: messages, layout: {keys: {mesages: x}}}", "mesages", "expected one of messages"),
        ("{path: a.json, format: messages, layout: {roles: {bot: asistant}}}", "roles.bot", "expected one of system"),
    ],
)
def test_a_bad_entry_is_one_fault_with_its_line(tmp_path: Path, entry: str, field: str, said: str) -> None:
    head = f"base: {{path: b, weights_sha256: {'a' * 64}}}\ntraining: {{steps: 1}}\noutput: out\n"
    (tmp_path / "recipe.yaml").write_text(f"{head}data:\n  train:\n  - {entry}\n")
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert str(caught.value.place).startswith(f"{tmp_path}/recipe.yaml:6, data.train.0")
    assert field in str(caught.value.place)


def test_an_entry_is_written_as_it_was_read(tmp_path: Path, base: Path) -> None:
    entries = list(write_sources(tmp_path).values())
    recipe = parse_recipe(recipe_data(base, data={"train": ["rows.jsonl", *entries]}), folder=tmp_path)
    written = recipe.as_written()
    assert written["data"]["train"] == ["rows.jsonl", *entries]
    assert parse_recipe(written, folder=tmp_path) == recipe


def test_render_shows_the_rows_of_a_recipe(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = write_sources(tmp_path)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_data(base, data={"train": [entries["array"]]})))
    assert main(["render", str(tmp_path / "recipe.yaml"), "--tokenizer", "spm-v3"]) == 0
    shown = capsys.readouterr().out
    assert [f"{tmp_path / 'talks.json'} record {number}, line " in shown for number in range(1, 7)] == [True] * 5 + [
        False
    ]
