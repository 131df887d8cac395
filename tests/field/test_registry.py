"""Servers and trainers of packages outside this repository are found by their entry points, and judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_server import Behaviour, Ids, serving, space_for_an_empty_text

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.server_target import ServerChoice
from pytest_mistral_lora.errors import EntryPointError, InputError
from pytest_mistral_lora.programs.facts import programs
from pytest_mistral_lora.programs.registry import SERVERS_GROUP, foreign_points
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.serving.servers import SERVERS

Install = Callable[..., None]
Prompt = Callable[[Ids, dict[str, Any]], Ids]
Capture = pytest.CaptureFixture[str]

SERVER = """
from pathlib import Path

from pytest_mistral_lora.field.servers.vllm.server import Vllm


class Mine(Vllm):
    name, title = "mine", "Mine"


class Worded(Mine):
    words, deviations = Path(__file__).with_name("fixes.toml"), Path(__file__).with_name("deviations.toml")


MINE, WORDED = Mine(), Worded()
"""
TRAINER = """
from pathlib import Path

from pytest_mistral_lora.runners import NOTHING, Trainer

MINE = Trainer("mine", "Mine", "", "", Path(__file__).parent / "rows_of_mine.py", NOTHING, "mine train", NOTHING)
"""
ROWS_OF_MINE = """
import argparse, json

parser = argparse.ArgumentParser()
for name in ("rows", "checkpoint", "config", "output"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
with open(given.rows) as rows, open(given.output, "w") as output:
    for number, _ in enumerate(rows):
        labels = [-100] * 4 + [23325, LAST]
        made = {"row": number, "input_ids": [1, 3, 16127, 4, 23325, 2], "labels": labels}
        output.write(json.dumps(made) + "\\n")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that installs a package beside this one, as pip does, with one entry point."""

    def install(distribution: str, group: str, name: str, value: str, **modules: str) -> None:
        folder = tmp_path / distribution
        metadata = folder / f"{distribution}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[pytest_mistral_lora.{group}]\n{name} = {value}\n")
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)

    return install


def test_a_server_of_another_package_is_judged(install: Install, tmp_path: Path, capsys: Capture) -> None:
    install("mine-server", "servers", "mine", "server_of_mine:MINE", server_of_mine=SERVER)
    oracle, rows = Oracle(shipped_tokenizer("spm-v3")), tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    words = ["--tokenizer", "spm-v3", "--rows", str(rows)]
    with serving(Behaviour(oracle)) as url:
        assert main(["serve-check", f"mine={url}", *words]) == 0
        assert "Mine" in capsys.readouterr().out
    with serving(Behaviour(oracle, prompt=lambda ids, _: ids[1:])) as url:
        assert main(["serve-check", f"mine={url}", *words]) == 1
        assert "ML902" in capsys.readouterr().out


def test_a_server_of_another_package_has_fixes_and_deviations_that_are_not_those_of_its_parent(
    install: Install, tmp_path: Path, capsys: Capture
) -> None:
    install("mine-server", "servers", "mine", "words_of_mine:MINE", words_of_mine=SERVER)
    folder = tmp_path / "mine-server"
    points = folder / "mine-server-1.0.dist-info" / "entry_points.txt"
    points.write_text(f"{points.read_text()}worded = words_of_mine:WORDED\n")
    (folder / "fixes.toml").write_text('[rules]\nML902 = "Start Mine with `--exact`."\n')
    (folder / "deviations.toml").write_text('[prompts]\nempty-text-space = ">=1.2"\n')
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")

    def check(kind: str, version: str, prompt: Prompt = space_for_an_empty_text) -> tuple[int, str]:
        # vLLM 1.2 has this deviation, too
        with serving(Behaviour(Oracle(shipped_tokenizer("spm-v3")), version=version, prompt=prompt)) as url:
            code = main(["serve-check", f"{kind}={url}", "--tokenizer", "spm-v3", "--rows", str(rows)])
        return code, capsys.readouterr().out

    code, out = check("mine", "1.2")
    assert (code, "not known of Mine 1.2" in out, "Start Mine" in out, "Start vLLM" in out) == (1, True, False, False)
    code, out = check("worded", "1.2")
    assert (code, "known of Mine 1.2: empty-text-space (1)" in out) == (0, True)
    code, out = check("worded", "1.1", lambda ids, data: (29473, *ids))
    assert (code, "Start Mine with `--exact`." in out) == (1, True)


@pytest.mark.parametrize(("last", "code"), [("2", 0), ("-100", 1)], ids=["sound", "a masked EOS"])
def test_a_trainer_of_another_package_is_judged(
    last: str, code: int, install: Install, tmp_path: Path, capsys: Capture
) -> None:
    name = f"trainer_of_mine{code}"
    modules = {name: TRAINER, "rows_of_mine": ROWS_OF_MINE.replace("LAST", last)}
    install("mine-trainer", "trainers", "mine", f"{name}:MINE", **modules)
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    command = ["check", "--runner", "mine", "--dataset", str(rows), "--tokenizer", "spm-v3"]
    assert main(command) == code
    assert ("ML546" in capsys.readouterr().out) == bool(code)


def test_names_are_read_without_an_import(install: Install, capsys: Capture) -> None:
    install("loud", "servers", "loud", "loud_server:LOUD", loud_server="raise RuntimeError('it was imported')")
    assert list(SERVERS) == [*SERVERS.ours, "loud"]
    assert [point.name for point in foreign_points(SERVERS_GROUP)] == ["loud"]
    with pytest.raises(SystemExit):
        main(["serve-check", "--help"])
    assert "loud: of another package" in " ".join(capsys.readouterr().out.split())
    # a server whose kind is not named is none of other packages
    with serving(Behaviour(Oracle(shipped_tokenizer("spm-v3")))) as url:
        assert main(["serve-check", url, "--tokenizer", "spm-v3"]) == 0


def test_one_that_does_not_import_is_not_checked_and_says_why(install: Install, capsys: Capture) -> None:
    install("loud", "servers", "loud", "loud_server:LOUD", loud_server="raise RuntimeError('no GPU')")
    with pytest.raises(EntryPointError, match="loud: loud_server:LOUD of loud does not import: RuntimeError: no GPU"):
        SERVERS["loud"]
    assert ServerChoice.parse("loud=http://127.0.0.1:9").kind == "loud"
    assert main(["serve-check", "loud=http://127.0.0.1:9", "--tokenizer", "spm-v3"]) == 1
    out = capsys.readouterr().out
    assert "loud_server:LOUD of loud does not import: RuntimeError: no GPU" in out
    assert "0 findings; 0 checks passed, 0 failed" in out


def test_an_object_of_another_kind_is_refused(install: Install) -> None:
    install("wrong", "trainers", "wrong", "json:dumps")
    with pytest.raises(EntryPointError, match="wrong: json:dumps of wrong is a function"):
        TRAINERS["wrong"]


def test_two_of_one_name_are_an_error_if_the_name_is_used(install: Install) -> None:
    install("first", "servers", "vllm", "server_of_mine:MINE")
    with pytest.raises(InputError, match="2 packages have a kind of server 'vllm': this package, first") as caught:
        SERVERS["vllm"]
    assert caught.value.next_step == "Uninstall one of them: pip uninstall first"
    assert SERVERS["llamacpp"].name == "llamacpp"
    # the judge asks for its own, whoever else has a name of them
    assert [server.name for server in SERVERS.of_this_package()] == [*SERVERS.ours]


def test_the_list_of_environments_names_one_that_does_not_import(install: Install, capsys: Capture) -> None:
    install("loud", "trainers", "loud", "loud_trainer:LOUD", loud_trainer="raise RuntimeError('no GPU')")
    assert main(["runner", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("loud ") and "not checked" in line and "no GPU" in line]
    assert len(lines) == len(TRAINERS.ours) + 1


FACTS = """
program = "mine"
title = "Mine"
kind = "server"

[[fault]]
id = "mine-drops-bos"
seen_on = 2026-11-30
seen_with = { mine = "1.2" }
until = "open"
proof = "run"
symptom = "it drops BOS"
way_out = "start it with --bos"
rules = ["ML902"]
source = "mine/mine#1"
reproduction = { not_run = "it is a sample" }
"""


def test_facts_of_another_package_are_read_without_an_import(install: Install, tmp_path: Path) -> None:
    install("mine_facts", "facts", "mine", "mine_of_facts.seen")
    folder = tmp_path / "mine_facts" / "mine_of_facts"
    (folder / "seen").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (folder / "seen" / "mine.toml").write_text(FACTS)
    programs.cache_clear()
    try:
        assert programs()["mine"].faults[0].way_out == "start it with --bos"
        assert "vllm" in programs()
    finally:
        programs.cache_clear()


def test_a_folder_of_facts_that_is_not_there_is_an_error(install: Install) -> None:
    install("lost", "facts", "lost", "no_such_package.facts")
    programs.cache_clear()
    try:
        with pytest.raises(EntryPointError, match=r"lost: no_such_package\.facts is no folder"):
            programs()
    finally:
        programs.cache_clear()


@pytest.mark.parametrize("text", [b"[console_scripts]\nno equals sign\n", b"[\xff]\n"], ids=["no value", "no UTF-8"])
def test_a_damaged_package_hides_no_other(
    text: bytes, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    install("sound-server", "servers", "sound", "nothing:NOTHING")
    install("damaged", "servers", "damaged", "nothing:NOTHING")
    (tmp_path / "damaged" / "damaged-1.0.dist-info" / "entry_points.txt").write_bytes(text)
    assert [point.name for point in foreign_points(SERVERS_GROUP)] == ["sound"]
    assert "warning: the entry points of the package damaged cannot be read: " in capsys.readouterr().err
    # libraries that this package imports look for plugins, too
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]})
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "damaged"))
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "check", rows, "--tokenizer", "spm-v3", "--no-cache"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_package_that_exits_makes_nothing_green(install: Install, tmp_path: Path, capsys: Capture) -> None:
    install("leaving_server", "servers", "leaving", "leaves:LEAVES", leaves="raise SystemExit(0)")
    install("leaving_trainer", "trainers", "leaving", "leaves:LEAVES")
    assert main(["serve-check", "leaving=http://127.0.0.1:9", "--tokenizer", "spm-v3"]) == 1
    assert "leaves:LEAVES of leaving_server does not import: SystemExit: 0" in capsys.readouterr().out
    assert main(["check", "--runner", "leaving", "--tokenizer", "spm-v3"]) == 2
