"""`check --fix` writes Mistral's own template into a local checkpoint folder, and nothing else; `--diff` shows it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cut_sentencepiece import cut_v3
from transformers import AutoTokenizer

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main

TEMPLATE = "chat_template.jinja"
ROW = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template lacks the space after [INST]."""
    folder = tmp_path_factory.mktemp("made") / "model"
    file = cut_v3()
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    shutil.copy(file, folder)
    text = (folder / TEMPLATE).read_text()
    assert "'[INST] '" in text
    (folder / TEMPLATE).write_text(text.replace("'[INST] '", "'[INST]'"))
    return folder


@pytest.fixture
def broken(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "model")
    return Path("model")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_template_alone_is_written_and_the_folder_is_sound_for_transformers(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(broken)
    assert main(["check", "model", "--no-cache", "--diff", "--output-format", "concise"]) == 1
    assert "@@" in capsys.readouterr().out
    assert contents(broken) == before
    assert main(["check", "model", "--no-cache", "--fix"]) == 1
    assert f"mended: model/{TEMPLATE}" in capsys.readouterr().out
    after = contents(broken)
    assert {name for name in after if after[name] != before.get(name)} == {TEMPLATE}
    assert main(["check", "model", "--no-cache"]) == 0
    fast = AutoTokenizer.from_pretrained("model")
    assert fast.apply_chat_template(ROW, tokenize=False) == "<s>[INST] Hi[/INST] Hello</s>"


def _link(folder: Path) -> Path:
    (folder / TEMPLATE).rename(folder / "own.jinja")
    (folder / TEMPLATE).symlink_to("own.jinja")
    return folder


def _linked_folder(folder: Path) -> Path:
    Path("link").symlink_to(folder)
    return Path("link")


def _in_the_cache(folder: Path) -> Path:
    snapshot = Path("models--a--b/snapshots", "0" * 40)
    snapshot.parent.mkdir(parents=True)
    return folder.rename(snapshot)


def _with_a_manifest(folder: Path) -> Path:
    (folder / "manifest.json").write_text("{}")
    return folder


def _at_two_places(folder: Path) -> Path:
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": (folder / TEMPLATE).read_text()}))
    return folder


@pytest.mark.parametrize("change", [_link, _linked_folder, _in_the_cache, _with_a_manifest, _at_two_places])
def test_what_is_not_the_user_s_to_change_stays(
    change: Callable[[Path], Path], broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = change(broken)
    before = contents(folder)
    assert main(["check", str(folder), "--as", "tokenizer", "--no-cache", "--fix"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines if "mended: " in line] == ["not mended"]
    assert contents(folder) == before


def test_it_is_for_checkpoints_and_text(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model", "--fix", "--json"]) == 2
    assert "--fix" in capsys.readouterr().err
