"""A file that may declare rows: without a trainer that is known here, and with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.declarations import declared_sources
from pytest_mistral_lora.formats.importers import importers, may_declare, trainer_answer
from pytest_mistral_lora.formats.sources import rows_of
from pytest_mistral_lora.programs import registry

ROW = '{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}\n'

REFUSED = [
    ("a: [", "not valid YAML"),
    ("[]", "is a list; expected a configuration"),
    ("model: x", "no data is declared (keys model)"),
    ("base: {}\ndata: {}", "this is a recipe of mistral-lora"),
]


@pytest.fixture(params=["with field", "without field"])
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the trainers of this package be there, or not."""
    if request.param == "without field":
        monkeypatch.setattr(registry, "_FIELD", "pytest_mistral_lora.no_field")
    importers.cache_clear()
    yield
    importers.cache_clear()


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[case[1][:40] for case in REFUSED])
def test_a_file_that_declares_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        declared_sources(Path("a.yaml"))
    assert said in str(caught.value)


@pytest.mark.usefixtures("anywhere")
def test_data_declare_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW, "utf-8")
    words = ["import", str(tmp_path / "rows.jsonl"), "--dataset", "other", "--to", str(tmp_path / "x")]
    assert main(words) == 2
    assert "rows.jsonl: declares no data set other" in capsys.readouterr().err


TRAINER = """
from types import SimpleNamespace

from pytest_mistral_lora.formats.convert import Source
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.formats.importers import Importer, declared_path

GROUPS = ("trainers", "servers", "facts")
PROGRAMS = {f"pytest_mistral_lora.{group}": {} for group in GROUPS}
PROGRAMS["pytest_mistral_lora.trainers"] = {"mine": "toy_field:MINE", "plain": "toy_field:PLAIN"}


class MyImporter(Importer):
    title, model_key, rows_key = "my-trainer", "my_model", "my_rows"
    own_keys = frozenset({"my_rows", "my_rank"})
    json_files = "my_*.json"

    def declares_rows(self, path, config):
        return isinstance(config.get("my_rows"), str)

    def sources(self, path, config, names):
        return [Source(file) for file in source_files(declared_path(path, config["my_rows"]))], ["a remark"]


IMPORTER, NO_IMPORTER = MyImporter(), "text"
MINE, PLAIN = SimpleNamespace(importer="toy_field:IMPORTER"), SimpleNamespace()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put a toy trainer in the place of those of this package; return a folder with a file of rows."""
    (tmp_path / "toy_field").mkdir()
    module = tmp_path / "toy_field" / "__init__.py"
    module.write_text(TRAINER, "utf-8")
    (tmp_path / "rows.jsonl").write_text(ROW, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_FIELD", "toy_field")
    importers.cache_clear()
    yield tmp_path
    importers.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "my_rows: rows.jsonl"), ("my_a.json", '{"my_rows": "rows.jsonl"}')]
)
def test_a_trainer_gives_the_files_of_its_configuration(toy: Path, name: str, text: str) -> None:
    (toy / name).write_text(text, "utf-8")
    assert may_declare(toy / name)
    sources, remarks = declared_sources(toy / name)
    assert ([source.path for source in sources], remarks) == ([toy / "rows.jsonl"], ["a remark"])
    assert len(list(rows_of(toy / name))) == 1
    with pytest.raises(InputError, match="declares no data set other"):
        declared_sources(toy / name, ["other"])


def test_a_trainer_is_named_for_its_configuration_and_for_a_file_without_rows(toy: Path) -> None:
    base = {"my_model": "owner/name", "my_rank": 8}
    title, step = trainer_answer(toy / "a.yaml", base) or ("", "")
    assert title == "a configuration of my-trainer"
    assert f"mistral-lora check --runner mine --config {toy / 'a.yaml'} --tokenizer PATH" in step
    assert "the folder of owner/name as PATH" in step
    assert trainer_answer(toy / "a.yaml", {"my_model": "owner/name"}) is None
    # as a folder of this machine, and as no name of one
    assert f"--tokenizer {toy}" in (trainer_answer(toy / "a.yaml", {**base, "my_model": str(toy)}) or ("", ""))[1]
    assert trainer_answer(toy / "a.yaml", {**base, "my_model": "x" * 5000 + "\0"})
    (toy / "a.yaml").write_text("my_model: owner/name", "utf-8")
    with pytest.raises(InputError) as caught:
        declared_sources(toy / "a.yaml")
    assert caught.value.expected == "`my_rows` of my-trainer"


def test_an_object_of_another_kind_is_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_field

    monkeypatch.setattr(toy_field.MINE, "importer", "toy_field:NO_IMPORTER")
    with pytest.raises(InputError, match="toy_field:NO_IMPORTER is a str"):
        importers()
