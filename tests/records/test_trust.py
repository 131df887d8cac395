"""Whether other users of the machine can write a path, by real owners and modes, and the key of the user's seals."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records import trust
from pytest_mistral_lora.records.trust import is_sealed, key_file, seal, shared_by, user_key

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = tmp_path / "above" / "mine"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750])
def test_a_folder_of_one_user_is_not_shared(mode: int, folder: Path) -> None:
    folder.chmod(mode)
    assert shared_by(folder) == ""
    assert shared_by(folder / "missing" / "file") == ""


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o1777])
def test_a_folder_that_others_can_write_is_named_with_its_mode(mode: int, folder: Path) -> None:
    folder.chmod(mode)
    assert shared_by(folder) == f"other users can write {folder} (mode {mode:o})"


def test_a_folder_above_is_judged_too_unless_it_is_sticky(folder: Path) -> None:
    folder.parent.chmod(0o777)
    assert f"{folder.parent} (mode 777)" in shared_by(folder)
    assert f"{folder.parent} (mode 777)" in shared_by(folder / "missing")
    folder.parent.chmod(0o1777)
    assert shared_by(folder) == ""


def test_a_link_is_as_safe_as_its_folder_and_its_target(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert shared_by(link) == ""
    folder.chmod(0o777)
    assert f"{folder} (mode 777)" in shared_by(link)
    folder.chmod(0o755)
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    (open_folder / "link").symlink_to(folder)
    open_folder.chmod(0o777)
    assert f"{open_folder} (mode 777)" in shared_by(open_folder / "link")
    assert shared_by(folder / ".." / "mine") == ""


def test_a_group_is_others_if_anybody_else_is_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o775)
    status = os.stat_result([stat.S_IFDIR | 0o775, *folder.stat()[1:]])
    monkeypatch.setattr(trust, "_is_private", lambda group: group != status.st_gid)
    assert f"{folder} (mode 775)" in shared_by(folder)
    monkeypatch.undo()
    # the group that a system gives one user alone
    assert trust._is_private(os.getegid()) == (shared_by(folder) == "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
def test_a_folder_of_another_user_is_named_with_its_owner(folder: Path) -> None:
    os.chown(folder, 4711, -1)
    assert shared_by(folder) == f"{folder} belongs to another user (uid 4711)"
    assert "uid 4711" in shared_by(folder / "missing")
    os.chown(folder, 0, 4711)
    folder.chmod(0o770)
    assert "mode 770" in shared_by(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(("owner", "is_shared"), [(0, False), (65_534, False), (1, True), (65_533, True)])
def test_a_folder_above_may_be_of_root_or_of_a_user_of_the_host(
    owner: int, is_shared: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(folder, 4711, -1)
    os.chown(folder.parent, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert (f"{folder.parent} belongs to another user (uid {owner})" == shared_by(folder)) is is_shared
    assert (shared_by(folder) == "") is not is_shared


def test_the_key_is_made_once_and_for_its_user_alone(folder: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(user_key())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {user_key()}
    assert len(user_key()) == 32
    assert stat.S_IMODE(key_file().stat().st_mode) == 0o600
    assert [*key_file().parent.iterdir()] == [key_file()]


def test_a_key_that_others_could_have_is_refused(folder: Path) -> None:
    key = user_key()
    for mode in (0o604, 0o640, 0o602):
        key_file().chmod(mode)
        with pytest.raises(InputError, match="other users can"):
            user_key()
    key_file().chmod(0o600)
    assert user_key() == key
    for broken in (b"", key[:-1], key + b"1"):
        key_file().write_bytes(broken)
        with pytest.raises(InputError, match="is not a key"):
            user_key()
    key_file().unlink()
    key_file().symlink_to(folder / "elsewhere")
    with pytest.raises(InputError, match="cannot be read or made"):
        user_key()
    key_file().unlink()
    os.mkfifo(key_file(), 0o600)
    with pytest.raises(InputError, match="is not a key"):
        user_key()


def test_a_folder_in_which_no_key_can_be_made_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    for name in (str(folder / "file"), "relative", "\0"):
        if name != "\0":
            monkeypatch.setenv("XDG_CONFIG_HOME", name)
            with pytest.raises(InputError):
                user_key()


def test_a_seal_needs_the_key(folder: Path) -> None:
    key = user_key()
    assert is_sealed(b"data", seal(b"data", key), key)
    for data, found, used in (
        (b"date", seal(b"data", key), key),
        (b"data", seal(b"data", b"other"), key),
        (b"data", None, key),
        (b"data", "\ud800", key),
        (b"data", 3, key),
    ):
        assert not is_sealed(data, found, used)
