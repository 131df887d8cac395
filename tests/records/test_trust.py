"""Whether other users of the machine can write a path, by real owners and modes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pytest_mistral_lora.records import trust
from pytest_mistral_lora.records.trust import shared_by

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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
