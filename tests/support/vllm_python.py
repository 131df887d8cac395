"""vLLM in an environment of its own, which this one lacks: vLLM needs an older mistral-common."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from local_server import free_port
from server_process import started

VLLM_PYTHON = Path(os.environ.get("MISTRAL_LORA_VLLM_PYTHON", "no-vllm"))

needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON.is_file(), reason="MISTRAL_LORA_VLLM_PYTHON names no Python that has vLLM: tox run -e serving-vllm"
)

VLLM_MODULE = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
"""The command of vLLM: the wheel for CPUs has no working `vllm`."""

SMALL = ["--max-model-len", "2048", "--enforce-eager"]
"""Options that let vLLM start in less time and memory, and change no answer."""

SECONDS = 900
"""The longest start of vLLM."""


def serve_by_vllm(script: Path, *more: str, without: Collection[str] = ()) -> AbstractContextManager[str]:
    """Start the command of an exported script on a port of the tests.

    Args:
        script: The script.
        more: Further options; of an option that is given twice, argparse takes the last.
        without: Options with one value that are left out.
    """
    words = shlex.split(script.read_text().partition("exec ")[2].replace("\\\n", " "))[2:]
    port = str(free_port())
    words[words.index("--port") + 1] = port
    for option in without:
        at = words.index(option)
        del words[at : at + 2]
    command = [*VLLM_MODULE, "--model", *words, *SMALL, *more]
    return started(command, f"http://127.0.0.1:{port}", "/version", SECONDS, cwd=script.parent)
