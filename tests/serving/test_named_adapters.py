"""Two adapters on llama.cpp itself: each name answers as its own adapter, or the finding says as which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from derived_tekken import write_derived
from gguf_files import write_gguf
from llamacpp_process import BUILD, converted_model, needs_llamacpp, served, write_lora
from safetensors.torch import load_file, save_file
from test_server_export import write_adapter

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.cli.serve_check import _adapters
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.generate.model_spec import record_rows

ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]}
    for question in ("Hi", "Who?")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of it that answer otherwise, with transcripts and GGUF files."""
    folder = tmp_path_factory.mktemp("two")
    base = write_tiny_base(folder / "base", write_derived("derived-v7", folder, words=2000))
    fields, tensors = converted_model(base, Oracle(base / "tekken.json"))
    write_gguf(folder / "model.gguf", fields, tensors)
    for number, name in enumerate(("tuned", "other")):
        adapter = write_adapter(folder / name, base)
        # far from the base and from each other
        file = adapter / "adapter_model.safetensors"
        save_file({key: value * (1 + number) * 0.1 for key, value in load_file(file).items()}, file)
        record_rows(adapter, [parse_row(row) for row in ROWS], folder / f"{name}-answers", base, max_new_tokens=8)
        write_lora(folder / f"{name}.gguf", adapter, base)
    (folder / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return folder


Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(files: dict[str, Path]) -> tuple[int, str]:
        """Serve files of adapters, each under a name, and ask for both names."""
        loras = [str(shutil.copy(file, tmp_path / f"{name}.gguf")) for name, file in files.items()]
        named = [f"--adapter={name}={folder / f'{name}-answers'}" for name in ("tuned", "other")]
        with served(folder / "model.gguf", loras=loras) as (_, address):
            words = ["--tokenizer", str(folder / "base"), "--rows", str(folder / "one.jsonl"), *named]
            code = main(["serve-check", f"llamacpp@{BUILD}={address}", *words])
        return code, "".join(capsys.readouterr())

    return run


@needs_llamacpp
def test_each_name_answers_as_its_own_adapter(check: Check, folder: Path) -> None:
    code, out = check({"tuned": folder / "tuned.gguf", "other": folder / "other.gguf"})
    assert code == 0, out
    assert "2 of 2 names answer as their own adapter" in out


@needs_llamacpp
def test_swapped_adapters_are_named(check: Check, folder: Path) -> None:
    code, out = check({"tuned": folder / "other.gguf", "other": folder / "tuned.gguf"})
    assert (code, "ML932" in out) == (1, True), out
    assert "tuned answers as other" in out
    assert "other answers as tuned" in out


@needs_llamacpp
def test_an_adapter_that_changes_nothing_answers_as_the_base(check: Check, folder: Path, tmp_path: Path) -> None:
    still = shutil.copytree(folder / "other", tmp_path / "still")
    file = still / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    nothing = write_lora(tmp_path / "still.gguf", still, folder / "base")
    code, out = check({"tuned": folder / "tuned.gguf", "other": nothing})
    assert (code, "other answers as the base" in out, "tuned answers" in out) == (1, True, False), out


@needs_llamacpp
def test_a_name_that_is_not_loaded_is_a_finding(check: Check, folder: Path) -> None:
    code, out = check({"tuned": folder / "tuned.gguf"})
    assert code == 1
    assert "other: no adapter is loaded from a file of this name" in out, out
    assert "expected: one of: tuned" in out


def test_an_adapter_may_have_a_name(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert _adapters([str(odd)]) == (odd, [])
    assert _adapters([str(odd), "tuned=lora-out"]) == (odd, [("tuned", Path("lora-out"))])
    with pytest.raises(InputError, match="several adapters without a name"):
        _adapters(["a", "b"])
    with pytest.raises(InputError, match="given twice"):
        _adapters(["a=b", "a=c"])
