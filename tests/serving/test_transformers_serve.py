"""`transformers serve` itself: an exported SentencePiece folder by count, in which the named deviations show."""

from __future__ import annotations

import subprocess
import sys
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import pytest
from local_server import free_port
from server_process import started
from test_server_export import write_base

from pytest_mistral_lora.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
        reason="the server of transformers needs its extra `serving`",
    ),
]
SECONDS = 600


def serve(folder: Path) -> AbstractContextManager[str]:
    """Start the server on a folder."""
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    port = str(free_port())
    options = ["serve", str(folder), "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    command = [sys.executable, "-c", program, *options]
    return started(command, f"http://127.0.0.1:{port}", "/v1/models", SECONDS, stderr=subprocess.DEVNULL)


def test_the_number_of_tokens_shows_the_deviations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "spm-v3")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')
    with serve(base) as url:
        code = main(["serve-check", f"openai={url}", "--tokenizer", "spm-v3", "--rows", str(rows)])
        out = capsys.readouterr().out
        assert code == 0, out
        assert "does not show the ids of a prompt" in out
        code = main(["serve-check", f"openai={url}", "--tokenizer", "spm-v3"])
    out = capsys.readouterr().out
    assert (code, "ML904" in out, "empty-user: 4 prompt tokens" in out) == (1, True, True), out
