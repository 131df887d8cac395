"""Pipes and devices in the place of files: refused without being opened, in every verb, and never waited for."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from cut_sentencepiece import cut_v3

from pytest_mistral_lora.chat.reading import open_regular, opened
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError

ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@contextmanager
def in_seconds(most: int) -> Iterator[None]:
    """End a test that waits for a pipe."""

    def give_up(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"waits for more than {most} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    return tmp_path


def test_a_pipe_and_a_device_are_not_opened(folder: Path) -> None:
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with in_seconds(5):
        for name in ("pipe", "link", "/dev/zero", "/dev/null"):
            with pytest.raises(InputError, match=f"{name}: is not a regular file; expected a file"):
                opened(Path(name))
        # nobody read from it: a reader would have let the writer in
        with pytest.raises(OSError, match="No such device"):
            os.open("pipe", os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(InputError, match="null byte"):
        opened(Path("a\0b"))
    with pytest.raises(IsADirectoryError):
        opened(folder)
    for path in (folder, folder / "missing"):
        with pytest.raises(InputError, match="cannot be read"), open_regular(path):
            pytest.fail("opened")
    with opened(folder / "rows.jsonl") as file:
        assert file.read().decode() == ROW
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


WORDS = [
    "check {}",
    "check rows.jsonl --tokenizer {}",
    "check rows.jsonl --tokenizer spm-v3 --xfails {}",
    "check {} --tokenizer spm-v3 --as rows",
    "import {} --to out.jsonl",
    "stats {} --tokenizer spm-v3",
    "check {} --tokenizer spm-v3",
    "audit rows.jsonl --tokenizer {}",
    "render {} --tokenizer spm-v3",
    "pin {}",
    "train {}",
    "init {} --base owner/name",
    "init rows.jsonl --base {}",
    "verify {}",
    "diff {} {}",
]


@pytest.mark.parametrize("name", ["pipe", "pipe.yaml", "pipe.json", "/dev/zero"])
@pytest.mark.parametrize("words", WORDS)
def test_each_verb_refuses_it(words: str, name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not name.startswith("/"):
        os.mkfifo(name)
    before = sorted(folder.rglob("*"))
    with in_seconds(60):
        code = main(words.format(name, name).split())
    found = capsys.readouterr()
    assert code == 2 or (code == 1 and "regular file" in found.out), (code, found)
    assert "Traceback" not in found.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", ".pre-commit-config.yaml", "pytest.ini", ".git/config", ".github/workflows/mistral-lora.yml"],
)
def test_init_waits_for_no_file_of_its_own(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    write_tiny_base(folder / "base", cut_v3())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(name)
    with in_seconds(60):
        code = main(["init", "rows.jsonl", "--base", "base", "--ci", "both", "--dry-run"])
    # a pipe in the place of Git's configuration leaves the services unknown; no other is passed over
    assert (code, "is not a regular file" in capsys.readouterr().err) == ((0, False) if "git/" in name else (2, True))
