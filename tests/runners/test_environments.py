from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.runners import TRAINERS, Environment, Trainer, interpreter

HERE = Path(sys.executable)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A runner whose environment is quickly made: one module, from a wheel on disk."""
    return _locked(tmp_path_factory.mktemp("wheel"), "1.0")


def _locked(folder: Path, version: str) -> Trainer:
    wheel = folder / f"tiny_runner-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_runner.py", f"__version__ = {version!r}\n")
        info = f"tiny_runner-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-runner\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    lock = folder / f"lock-{version}.txt"
    lock.write_text(f"# made by hand\ntiny-runner @ {wheel.as_uri()}\n")
    tiny = {"name": "tiny", "title": "Tiny", "module": "tiny_runner", "distribution": "tiny-runner"}
    return dataclasses.replace(TRAINERS["trl"], **tiny, lock=lock)


@pytest.fixture(scope="module")
def made(runner: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder with the environment in it."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("MISTRAL_LORA_CACHE", str(cache))
        assert Environment(runner).state == "not there"
        assert Environment(runner).setup(HERE)
        assert Environment(runner).state == "ready"
    return cache


@pytest.fixture
def environment(made: Path, runner: Trainer, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(made))
    return Environment(runner)


def test_a_runner_is_run_by_the_python_of_its_environment(environment: Environment) -> None:
    assert interpreter(environment.runner) == environment.python


def test_a_folder_of_a_runner_s_name_is_no_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "axolotl").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunnerError, match="Axolotl is not installed"):
        interpreter(TRAINERS["axolotl"])


def test_an_environment_that_is_ready_is_used_again(environment: Environment) -> None:
    before = environment.python.lstat().st_mtime_ns
    assert not environment.setup(HERE)
    assert environment.python.lstat().st_mtime_ns == before


def test_one_that_was_broken_off_is_not_used_and_is_finished(
    environment: Environment, capfd: pytest.CaptureFixture[str]
) -> None:
    (environment.folder / "mistral-lora.json").unlink()
    assert environment.state == "not finished"
    with pytest.raises(RunnerError, match="its environment is not finished") as caught:
        interpreter(environment.runner)
    assert "mistral-lora runner setup tiny" in str(caught.value)
    made_at = environment.python.lstat().st_mtime_ns
    assert environment.setup(HERE)
    assert environment.state == "ready"
    assert environment.python.lstat().st_mtime_ns == made_at
    assert "$ " in capfd.readouterr().err


def test_another_lock_file_asks_for_the_versions_in_it(environment: Environment, tmp_path: Path) -> None:
    newer = Environment(_locked(tmp_path, "2.0"))
    assert newer.state == "made from another lock file"
    assert newer.setup(HERE)
    assert newer.state == "ready"
    assert environment.setup(HERE)


@pytest.mark.slow
def test_one_whose_python_or_pip_is_gone_is_made_again(environment: Environment) -> None:
    environment.python.unlink()
    assert environment.state == "broken: its Python is gone"
    with pytest.raises(RunnerError, match="its environment is broken: its Python is gone"):
        interpreter(environment.runner)
    assert environment.setup(HERE)
    assert interpreter(environment.runner) == environment.python
    # as Debian's `python -m venv` leaves a folder without python3-venv: a Python, and no pip
    [pip] = environment.folder.glob("lib/python*/site-packages/pip")
    shutil.rmtree(pip)
    (environment.folder / "mistral-lora.json").unlink()
    assert environment.setup()
    assert interpreter(environment.runner) == environment.python


def test_a_package_that_cannot_be_installed_leaves_nothing_that_looks_finished(
    runner: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"tiny-runner @ {(tmp_path / 'nope-1.0-py3-none-any.whl').as_uri()}\n")
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(made))
    broken = Environment(dataclasses.replace(runner, lock=lock))
    with pytest.raises(RunnerError, match=r"pip install .*: exit code 1"):
        broken.setup(HERE)
    assert broken.state == "not finished"


def test_a_python_that_is_not_there_is_named(runner: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path))
    with pytest.raises(RunnerError, match=r"nope: .*expected Python 3\.11 or newer"):
        Environment(runner).setup(tmp_path / "nope")


def _python_of(version: str, path: Path) -> Path:
    """A Python of another version, as far as `setup` looks at it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old_is_replaced_by_a_newer_one_on_the_path(
    runner: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    newer = Environment(dataclasses.replace(runner, least_python=(3, 90)))
    own = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(RunnerError, match=rf"Python {own}, and on the PATH none of python3.90, .*python3.93") as caught:
        newer.setup()
    assert "mistral-lora runner setup tiny --python PATH" in str(caught.value)
    with pytest.raises(RunnerError, match=r"python: Python 3\.12; expected Python 3\.90 or newer"):
        newer.setup(_python_of("3 12", tmp_path / "python"))
    _python_of("3 11", tmp_path / "bin" / "python3.90")  # a name that lies is not believed
    _python_of("3 91", tmp_path / "bin" / "python3.91")
    # it is taken; as it makes no environment, there is nothing to go on with
    with pytest.raises(RunnerError, match=r"runners/tiny/bin/python: cannot be started"):
        newer.setup()


def test_the_list_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path))
    assert main(["runner", "list", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["state"]) for one in data] == [(name, "not there") for name in TRAINERS]
    (tmp_path / "runners" / "trl").mkdir(parents=True)
    assert main(["runner", "list"]) == 0
    assert "trl           not finished" in capsys.readouterr().out


@pytest.mark.parametrize("runner", TRAINERS.values(), ids=[*TRAINERS])
def test_every_packaged_runner_has_its_files(runner: Trainer) -> None:
    assert runner.config.is_file()
    assert runner.script.is_file()
    lines = [line for line in runner.lock.read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    assert any(line.startswith("torch==") for line in lines)
    assert any(line.replace("_", "-").startswith(f"{runner.distribution}==") for line in lines)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")
def test_an_environment_that_others_can_write_is_not_run(
    runner: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    shared = Environment(runner)
    ran = tmp_path / "ran"
    shared.python.parent.mkdir(parents=True)
    shared.python.write_text(f"#!/bin/sh\ntouch {ran}\necho 3 12\n")
    shared.python.chmod(0o755)
    (shared.folder / "mistral-lora.json").write_text(json.dumps({"lock_sha256": sha256_file(runner.lock)}))
    assert interpreter(runner) == shared.python
    assert ran.exists()
    for folder in (shared.folder, shared.python.parent, tmp_path / "cache"):
        ran.unlink(missing_ok=True)
        folder.chmod(0o777)
        assert shared.state == "not trusted: others can write it"
        for call in (lambda: interpreter(runner), shared.setup):
            with pytest.raises(RunnerError, match=rf"not trusted: .*{folder} \(mode 777\)"):
                call()
        assert not ran.exists()
        folder.chmod(0o755)
    assert shared.state == "ready"


def test_no_module_of_the_current_folder_is_run(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("venv", "pip", "csv", "email", "zipfile", "tiny_runner", "site", "json"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').write(__name__)\n")
    assert interpreter(environment.runner, environment.python) == environment.python
    (environment.folder / "mistral-lora.json").unlink(missing_ok=True)
    assert environment.setup(HERE)
    assert environment.state == "ready"
    assert not (tmp_path / "ran").exists()
