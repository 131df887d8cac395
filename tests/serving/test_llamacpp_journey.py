"""From an adapter to a checked llama.cpp server by the commands that the export prints, and by nothing else."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from golden_answers import TOOL
from learned_rows import asked, called
from llamacpp_process import exported_server, needs_llamacpp

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.generate.model_spec import record_rows
from pytest_mistral_lora.training.run import train

pytestmark = needs_llamacpp

TEXTS: tuple[Mapping[str, Any], ...] = (
    asked("What is the capital of France?", "Paris."),
    asked("Write code", "def f(x):\n    return x + 1"),
    {"messages": [{"role": "system", "content": "You are terse."}, *asked("Name a colour", "Blue")["messages"]]},
)
CALL = {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}, called("Oslo")], "tools": [TOOL]}
LEARNED = {
    "spm-v3": (*TEXTS, CALL),
    "derived-v7": (*TEXTS, CALL),
    # llama.cpp makes another call of each call of v11: served-call-ids-in-another-order
    "derived-v11": TEXTS,
    "derived-v13-thinking": (*TEXTS, CALL),
    "derived-v15": (*TEXTS, CALL),
}
"""The rows that the adapter of each tokenizer learns by heart."""


def learned(folder: Path, tokenizer: Path, learned: Sequence[Mapping[str, Any]]) -> Path:
    """Return the folder of an adapter that knows rows by heart, with its transcripts."""
    harness = TrainerHarness(folder, folder, "cpu")
    write_tiny_base(harness.base, tokenizer)
    harness.rows.write_text("".join(json.dumps(row) + "\n" for row in learned), encoding="utf-8")
    train(harness.recipe(harness.adapter, steps=40, batch_size=len(learned)))
    rows = list(read_rows(harness.rows))
    record_rows(harness.adapter, rows, harness.adapter / TRANSCRIPTS, harness.base, max_new_tokens=48, device="cpu")
    return harness.adapter


def printed(out: str, label: str) -> list[str]:
    """Return the commands that stand behind a label."""
    return [line.partition(":")[2].strip() for line in out.splitlines() if line.startswith(f"{label}:")]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "derived-v13-thinking" else pytest.mark.slow) for name in LEARNED],
)
def test_the_printed_commands_alone_lead_to_a_green_check(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = learned(tmp_path, converted_tokenizer(name).oracle.path, LEARNED[name])
    output = tmp_path / "my server"
    capsys.readouterr()
    assert main(["export", str(adapter), "--to", "llamacpp", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    convert, serve = printed(out, "run")
    [check] = printed(out, "check")
    # what the command calls LLAMA_CPP
    converters = output / "LLAMA_CPP"
    converters.mkdir()
    for program in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (converters / program).symlink_to(Path(__file__).with_name("llamacpp_converters.py"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(convert, shell=True, check=True, env={**os.environ, "PATH": path}, capture_output=True)
    with exported_server(serve, output / "serve.sh") as address:
        # the port is one that no other test has
        code = main(shlex.split(check.replace("http://127.0.0.1:8080", address))[1:])
    out = capsys.readouterr().out
    assert_green(out, code, len(LEARNED[name]))


def assert_green(out: str, code: int, count: int) -> None:
    """Assert that a check passes, with each transcript answered as recorded, and what is known stated."""
    assert (code, [line for line in out.splitlines() if line.startswith("ML")]) == (0, []), out
    # by ids and by messages
    assert out.count(f"{count} exact of {count}") == 2, out
    assert f"it changes {count} of {count} answers of the base" in out
    # stated, and no fault of the file
    assert re.search(r"^control tokens of .* in 3 of \d+ prompts, .*llama\.cpp", out, re.MULTILINE), out
