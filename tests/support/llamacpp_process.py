"""llama.cpp's HTTP server in a process of its own, on GGUF files of our tiny models."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf_files import adapter_fields, adapter_tensors, model_fields, model_tensors, tokenizer_fields, write_gguf
from local_server import free_port
from safetensors.torch import load_file

from pytest_mistral_lora.chat.oracle import Oracle

_PACKAGE = "xllamacpp"
BUILD = version(_PACKAGE).split(".")[2] if find_spec(_PACKAGE) else ""
"""The build of llama.cpp in the package, 2026.10.11549: its server reports none."""

SERVER = Path(__file__).parents[1] / "serving" / "llamacpp_server.py"
Post = Callable[[str, dict[str, Any]], dict[str, Any]]

needs_llamacpp = pytest.mark.skipif(
    find_spec(_PACKAGE) is None, reason="llama.cpp's server is in the package xllamacpp"
)


@contextmanager
def served(file: Path, **settings: Any) -> Iterator[tuple[Post, str]]:
    """Start a server on a file, and yield a function that posts to it, and its address."""
    command = [sys.executable, str(SERVER), str(file), json.dumps(settings)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()

        def post(path: str, data: dict[str, Any]) -> dict[str, Any]:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(address + path, json.dumps(data).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
            return found

        yield post, address
    finally:
        process.kill()
        process.communicate(timeout=30)


@contextmanager
def exported_server(command: str, script: Path) -> Iterator[str]:
    """Run the command of an exported script by a shell, with the tests' server as `llama-server`; yield its address.

    Args:
        command: The command.
        script: The script that it runs, whose port is changed to one on which no process listens.
    """
    program = script.parent / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} "$@"\n')
    program.chmod(0o755)
    script.write_text(script.read_text().replace("--port 8080", f"--port {free_port()}"))
    found = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, shell=True, env=found, text=True, **pipes)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        # a shell between may outlive the kill, and the server ends with its input
        process.kill()
        process.communicate(timeout=30)


def converted_model(folder: Path, oracle: Oracle) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the fields and the tensors of a sound conversion of a tiny checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    fields = {**model_fields(config), **tokenizer_fields(oracle), "tokenizer.chat_template": oracle.chat_template()}
    weights = {
        name: tensor.float().numpy()
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    return fields, model_tensors(weights, config)


def write_lora(file: Path, adapter: Path, base: Path) -> Path:
    """Write the GGUF file of an adapter."""
    config = json.loads((base / "config.json").read_text())
    fields = adapter_fields(json.loads((adapter / "adapter_config.json").read_text()))
    tensors = {name: one.float().numpy() for name, one in load_file(adapter / "adapter_model.safetensors").items()}
    return write_gguf(file, fields, adapter_tensors(tensors, config))
