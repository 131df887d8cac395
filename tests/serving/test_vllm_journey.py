"""From an adapter to a checked vLLM by the commands that the export prints, and by nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from local_server import free_port
from planted_faults import found_rules
from server_process import started
from test_llamacpp_journey import CALL, TEXTS, learned, printed
from vllm_python import SECONDS, SMALL, VLLM_MODULE, needs_vllm

from pytest_mistral_lora.cli import main

pytestmark = [pytest.mark.vllm, needs_vllm]

ROWS = (*TEXTS, CALL)
"""The rows that each adapter learns by heart: with a tool call, the one of version 11, too."""


@contextmanager
def served_by(command: str, output: Path) -> Iterator[str]:
    """Run the printed command by a shell, with the tests' vLLM as `vllm`, and yield its address."""
    programs = output / "bin"
    programs.mkdir()
    # `vllm serve WEIGHTS`: the wheel for CPUs has the module alone
    words = f'shift\nexec {shlex.join([*VLLM_MODULE, "--model"])} "$@" {shlex.join(SMALL)}\n'
    (programs / "vllm").write_text(f"#!/bin/sh\n{words}")
    (programs / "vllm").chmod(0o755)
    port, script = free_port(), output / "serve.sh"
    script.write_text(script.read_text().replace("--port 8000", f"--port {port}"))
    found = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    with started(["sh", "-c", command], f"http://127.0.0.1:{port}", "/version", SECONDS, env=found) as address:
        yield address


def exported(adapter: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """Return the command that serves an adapter, the command that checks the server, and all that is printed."""
    capsys.readouterr()
    assert main(["export", str(adapter), "--to", "vllm", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    # what installs the versions is done: they are in an environment of the server's own
    [serve] = [command for command in printed(out, "run") if "pip install" not in command]
    [check] = printed(out, "check")
    return serve, check, out


def checked(check: str, address: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the printed check, on the port that no other test has."""
    code = main(shlex.split(check.replace("http://127.0.0.1:8000", address))[1:])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", ["spm-v3", "derived-v7", "derived-v13-thinking"])
def test_the_printed_commands_alone_lead_to_a_green_check(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = learned(tmp_path, converted_tokenizer(name).oracle.path, ROWS)
    output = tmp_path / "my server"
    serve, check, _ = exported(adapter, output, capsys)
    with served_by(serve, output) as address:
        code, out = checked(check, address, capsys)
    assert_green(code, out, ROWS)


def assert_green(code: int, out: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Assert that a check passes, with each transcript answered as recorded."""
    assert (code, found_rules(out)) == (0, []), out
    # by ids and by messages
    assert out.count(f"{len(rows)} exact of {len(rows)}") == 2, out
    assert f"it changes {len(rows)} of {len(rows)} answers of the base" in out
    assert re.search(r"(\d+) of \1 prompts have the ids", out), out


def test_calls_of_version_11_do_not_arrive_and_the_cause_is_named_before_and_after_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = learned(tmp_path, converted_tokenizer("derived-v11").oracle.path, ROWS)
    output = tmp_path / "my server"
    serve, check, said = exported(adapter, output, capsys)
    assert "\ndifferent: No tool call of v11 arrives: " in said, said
    with served_by(serve, output) as address:
        code, out = checked(check, address, capsys)
    # the texts are right, and so is the model: by ids nothing differs
    assert (code, found_rules(out)) == (1, ["ML909"]), out
    assert (f"{len(ROWS)} exact of {len(ROWS)}" in out, f"{len(TEXTS)} exact" in out) == (True, True), out
    assert "because the grammar refuses [CALL_ID]" in out, out
    # the known fault of this version, with its way out
    assert re.search("^known of .*it reads the id of a call of v11 as a part of the tool's name", out, re.MULTILINE), (
        out
    )


def test_a_tokenizer_of_version_15_is_served_if_the_pinned_versions_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads(converted_tokenizer("derived-v15").oracle.path.read_text())
    tokenizer["model_settings_builder"].pop("json_schema")
    tokenizer["model_settings_builder"]["reasoning_effort"]["values"] = ["none", "high"]
    (tmp_path / "tekken.json").write_text(json.dumps(tokenizer))
    adapter = learned(tmp_path, tmp_path / "tekken.json", ROWS)
    output = tmp_path / "my server"
    serve, check, said = exported(adapter, output, capsys)
    assert "does not start" not in said
    with served_by(serve, output) as address:
        code, out = checked(check, address, capsys)
    assert_green(code, out, ROWS)


def test_a_tokenizer_of_version_15_that_the_pinned_versions_refuse_is_named_before_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = learned(tmp_path, converted_tokenizer("derived-v15").oracle.path, ROWS)
    output = tmp_path / "my server"
    serve, _, said = exported(adapter, output, capsys)
    assert re.search(r"^different: The server does not start with this tokenizer: .*'low'", said, re.MULTILINE), said
    with pytest.raises(AssertionError, match="ended with"), served_by(serve, output):
        pass
