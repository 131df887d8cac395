"""Files are whole or absent, keep their permissions, and nothing of a foreign folder leads out of it."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import (
    finished_folder,
    inside,
    put_text,
    remove_temporaries,
    require_writable,
    unfinished_path,
    write_text,
)

COMMIT = "ab" * 10 + "cd" * 10


@pytest.fixture
def private() -> Iterator[None]:
    """A user whose new files nobody else may read."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("private")
def test_new_files_and_folders_have_the_permissions_that_the_user_wants(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "a")
    with finished_folder(tmp_path / "folder") as folder:
        write_text(folder / "b.txt", "b")
    assert [mode(tmp_path / name) for name in ("a.txt", "folder", "folder/b.txt")] == [0o600, 0o700, 0o600]


@pytest.mark.parametrize("bits", [0o640, 0o755])
def test_a_file_that_is_rewritten_keeps_its_permissions(bits: int, tmp_path: Path) -> None:
    file = tmp_path / "a.sh"
    file.write_text("before")
    file.chmod(bits)
    write_text(file, "after")
    assert (mode(file), file.read_text()) == (bits, "after")


def fail(path: Path) -> None:
    with finished_folder(path) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt


def write_half(path: Path) -> None:
    write_text(path, "\ud800")


@pytest.mark.parametrize("write", [fail, write_half])
def test_a_write_that_fails_leaves_nothing(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, UnicodeEncodeError)):
        write(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_the_remains_of_a_killed_process_go_and_files_of_the_user_stay(tmp_path: Path) -> None:
    made = tmp_path / "lora-out"
    kept = [tmp_path / name for name in (".lora-out.previous", ".lora-out.20261231", ".lora-out.a.unfinished")]
    for folder in (*kept, unfinished_path(made), tmp_path / ".other.a1b2c3d4.unfinished"):
        folder.mkdir()
    for part, written in ((unfinished_path(made), 0), (at_work := unfinished_path(made), time.time())):
        part.touch()
        os.utime(part, (written, written))
    remove_temporaries(made)
    assert sorted(tmp_path.iterdir()) == sorted((*kept, at_work, tmp_path / ".other.a1b2c3d4.unfinished"))
    assert put_text(kept[0] / "a.txt", "a") == "created"


def test_several_write_one_file_at_once(tmp_path: Path) -> None:
    faults: list[Exception] = []

    def write(number: int) -> None:
        for time_ in range(100):
            try:
                put_text(require_writable(tmp_path / "x.json", lambda file: True), f"{number} {time_}" * 500)
            except InputError as error:
                faults.append(error)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (faults, [path.name for path in tmp_path.iterdir()]) == ([], ["x.json"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a\0b", "no such file"),
        ("a" * 5000, "no such file"),
        ("gone", "no such file"),
        ("loop", "a link that leads nowhere"),
        ("out", "leads out of the folder"),
        ("../secret", "leads out of the folder"),
        ("pipe", "is not a regular file"),
        (".", "is a directory"),
    ],
)
def test_a_name_that_is_no_file_of_the_folder_is_an_error(name: str, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "pipe")
    with pytest.raises(InputError, match=found):
        inside(folder, name)


def test_a_file_of_a_snapshot_leads_to_its_blobs_and_to_no_folder_of_that_name_elsewhere(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "manifest.json").symlink_to("../../blobs/abc")
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    assert inside(snapshot, "manifest.json").read_text() == "{}"
    blobs.rename(tmp_path / "elsewhere")
    # an archive of a foreign adapter can bring this link: through it, any file of the machine could be read
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of the folder"):
        inside(snapshot, "manifest.json")


@pytest.mark.parametrize("read", [read_json, sha256_file])
def test_a_pipe_keeps_no_reader_waiting(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is not a regular file"):
        read(tmp_path / "pipe")
