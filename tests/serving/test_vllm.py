"""vLLM itself, on a CPU: an exported adapter is served with the ids of mistral-common, by base and adapter.

It takes minutes to start, and gigabytes to install: `tox run -e serving-vllm`. Its answers are recorded in
docs/serving/recorded/, and replayed by every run (test_server_scoreboard.py).
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_server import free_port
from test_server_export import export, write_adapter, write_base

from pytest_mistral_lora.cli import main

pytestmark = pytest.mark.vllm
SECONDS = 600


@contextmanager
def started(script: Path, *more: str) -> Iterator[str]:
    """Start the command of an exported script on a port of the tests, and yield the address."""
    words = shlex.split(script.read_text().partition("exec ")[2].replace("\\\n", " "))[2:]
    port = str(free_port())
    words[words.index("--port") + 1] = port
    # the wheel for CPUs has no working `vllm`
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words, *more]
    command += ["--max-model-len", "2048", "--enforce-eager"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(SECONDS // 5):
            assert process.poll() is None, "vLLM ended"
            try:
                urllib.request.urlopen(f"{url}/version", timeout=5)
            except OSError:
                time.sleep(5)
            else:
                break
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.parametrize("name", ["spm-v3", "tekken-240911"])
def test_an_exported_adapter_is_served_with_the_ids_of_mistral_common(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", name)
    adapter = write_adapter(tmp_path / "lora", base)
    assert export(capsys, adapter, "--to", "vllm", "--output", tmp_path / "to", "--name", "tuned")[0] == 0
    with started(tmp_path / "to" / "serve.sh") as url:
        for model in ("base", "tuned"):
            code = main(["serve-check", f"vllm={url}", "--tokenizer", name, "--model", model])
            out = capsys.readouterr().out
            assert code == 0, out
            assert "41 of 41 prompts have the ids of mistral-common" in out


def test_the_mode_of_transformers_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "spm-v3")
    assert export(capsys, base, "--to", "vllm", "--output", tmp_path / "to")[0] == 0
    # argparse takes the last of two options
    with started(tmp_path / "to" / "serve.sh", "--tokenizer-mode", "hf") as url:
        code = main(["serve-check", f"vllm={url}", "--tokenizer", "spm-v3"])
    assert (code, "ML906" in capsys.readouterr().out) == (1, True)
