"""Files for servers: each command and folder has what the server needs to serve as it was trained, or is refused."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_tokenizer
from derived_tekken import derived_tokenizer, write_derived
from packaging.requirements import Requirement
from page_sections import section
from safetensors.torch import save_file

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.field.servers.ollama.modelfile import read_modelfile
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.run import train

LAYERS = {"q_proj": 128, "v_proj": 64}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "target_modules": list(LAYERS)}


def write_base(folder: Path, name: str) -> Path:
    """Write a base as the Hub has them: Mistral's tokenizer file, and what transformers loads."""
    tokenizer = converted_tokenizer(name)
    write_tiny_base(folder, tokenizer.oracle.path)
    tokenizer.fast.save_pretrained(folder)
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
    assert "serve-check vllm:fp32=http://127.0.0.1:8000" in out
    assert out.rpartition("check:")[2].strip() in (tmp_path / "to" / "README.md").read_text()


def test_the_line_for_a_cpu_starts_the_module_with_the_same_options(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(capsys, base, "--to", "vllm", "--output", tmp_path / "served")[0] == 0
    page = section("serving.md", "vLLM on a CPU")
    [line] = re.findall(r"^\$ (sed .*)$", page, flags=re.MULTILINE)
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    words, other = (command(tmp_path / "served" / name) for name in ("serve.sh", "serve-cpu.sh"))
    assert words[:2] == ["vllm", "serve"]
    assert other == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]


@pytest.mark.parametrize(("name", "needs"), [("derived-v7", False), ("derived-v11", True), ("derived-v13", True)])
def test_vllm_needs_the_versions_that_answer_a_tekken_tokenizer_from_version_11_on(
    name: str, needs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tiny_base(tmp_path / "base", derived_tokenizer(name, words=2000))
    code, out = export(capsys, base, "--to", "vllm", "--output", tmp_path / "to")
    assert code == 0, out
    written = {file.name: file.read_text() for file in (tmp_path / "to").iterdir()}
    assert ("requirements.txt" in written) is needs
    # in the file that starts the server, in the page beside it and in the printed summary
    for text in (written["serve.sh"], written["README.md"], out):
        assert bool(re.search(r"vLLM 0\.32\.0 .*mistral-common 1\.13\.1, .* 1\.12\.0", text)) is needs
    command(tmp_path / "to" / "serve.sh")
    if needs:
        lines = [line for line in written["requirements.txt"].splitlines() if not line.startswith("#")]
        assert [str(Requirement(line)) for line in lines] == ["vllm==0.32.0", "mistral-common==1.12.0"]
        assert out.index("pip install -r requirements.txt") < out.index("sh serve.sh")


REFUSED = "the setting json_schema, the reasoning_effort 'low', which the mistral-common of "


@pytest.mark.parametrize(
    ("name", "has_calls", "has_thinking", "starts"),
    [
        ("derived-v7", True, False, True),
        ("derived-v11", False, False, True),
        ("derived-v13", True, False, True),
        ("derived-v13-thinking", True, True, True),
        ("derived-v15", True, True, False),
    ],
)
def test_an_export_says_what_does_not_work_before_a_server_is_started(
    name: str, has_calls: bool, has_thinking: bool, starts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tiny_base(tmp_path / "base", derived_tokenizer(name, words=2000))
    for kind in ("vllm", "llamacpp"):
        code, out = export(capsys, base, "--to", kind, "--output", tmp_path / kind)
        assert code == 0, out
        page = (tmp_path / kind / "README.md").read_text()
        for text in (out, page):
            assert ("No tool call of v11 arrives: " in text) is not has_calls, text
            assert (REFUSED in text) is (not starts and kind == "vllm"), text
    words = command(tmp_path / "vllm" / "serve.sh")
    assert ("--reasoning-parser" in words) is has_thinking
    assert ("holds only after a thought" in (tmp_path / "vllm" / "README.md").read_text()) is has_thinking


def test_vllm_starts_with_the_settings_that_its_mistral_common_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    file = write_derived("derived-v15", tmp_path / "tokenizer", words=2000)
    data = json.loads(file.read_text())
    effort = {**data["model_settings_builder"]["reasoning_effort"], "values": ["none", "high"]}
    file.write_text(json.dumps({**data, "model_settings_builder": {"reasoning_effort": effort}}))
    write_tiny_base(tmp_path / "base", file)
    code, out = export(capsys, tmp_path / "base", "--to", "vllm", "--output", tmp_path / "to")
    assert (code, "does not start" in out) == (0, False), out


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


INJECTED = "Text that spells a control token becomes that control token (ML906)"
MARKS = "Hindi, Tamil, Thai and other text with combining marks gets other ids (ML915)"
NO_TOOLS = "No Go template has exact tools"
KEPT_SPACES = "Spaces at the end of an answer are kept"
CUT = "Ollama cuts a prompt of more than num_ctx tokens, "
NO_THOUGHTS = "Thoughts in a history are left out"


@pytest.mark.parametrize(
    ("to", "name", "remarks"),
    [
        ("vllm", "spm-v3", ()),
        ("vllm", "derived-v13", ()),
        ("llamacpp", "spm-v3", (INJECTED,)),
        ("llamacpp", "derived-v7", (INJECTED, MARKS)),
        ("llamacpp", "derived-v13", (INJECTED, MARKS)),
        ("ollama", "spm-v3", (INJECTED, NO_TOOLS, KEPT_SPACES, CUT)),
        ("ollama", "derived-v7", (INJECTED, MARKS, NO_TOOLS, KEPT_SPACES, CUT)),
        ("ollama", "derived-v13-thinking", (INJECTED, MARKS, NO_TOOLS, KEPT_SPACES, CUT, NO_THOUGHTS)),
    ],
)
def test_the_page_beside_an_export_has_the_remarks_that_are_printed(
    to: str, name: str, remarks: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    is_derived = name.startswith("derived")
    source = derived_tokenizer(name, words=2000) if is_derived else shipped_tokenizer(name)
    base = write_tiny_base(tmp_path / "base", source)
    code, out = export(capsys, base, "--to", to, "--output", tmp_path / "to")
    assert code == 0, out
    page = (tmp_path / "to" / "README.md").read_text()
    _, heading, listed = page.partition("\nDifferent from training:\n\n")
    assert bool(heading) is bool(remarks)
    lines = [line.removeprefix("- ") for line in listed.splitlines()]
    assert len(lines) == len(remarks), page
    assert all(line.startswith(remark) for line, remark in zip(lines, remarks, strict=True)), page
    # the same are printed, and no other
    assert [line.partition(": ")[2] for line in out.splitlines() if line.startswith("different:")] == lines
    check = out.rpartition("check:")[2].strip()
    assert f"```console\n$ {check}\n```" in page
    # who reads the file alone sees it, too: Ollama takes the line for a comment
    if to == "ollama":
        text = (tmp_path / "to" / "Modelfile").read_text()
        assert (f"\n# {NO_THOUGHTS}" in text) is (NO_THOUGHTS in remarks)
        words = [one.name for one in read_modelfile(Path("Modelfile"), text).commands]
        assert words == ["from", "template", "parameter", "parameter"]


def test_an_adapter_of_a_chat_template_is_served_by_it_with_a_remark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = TrainerHarness(tmp_path, tmp_path, "cpu")
    write_base(harness.base, "spm-v3")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    harness.rows.write_text(json.dumps(row) + "\n")
    train(harness.recipe(harness.adapter, steps=1).model_copy(update={"backend": "chat-template"}))
    capsys.readouterr()
    code, out = export(capsys, harness.adapter, "--to", "vllm", "--output", tmp_path / "to")
    words = command(tmp_path / "to" / "serve.sh")
    assert (code, option(words, "--tokenizer-mode")) == (0, "hf"), out
    page = (tmp_path / "to" / "README.md").read_text()
    assert page.rpartition("Different from training:")[2].strip() == f"- {INJECTED}."
    assert f"different: {INJECTED}." in out


@pytest.mark.parametrize("to", ["vllm", "llamacpp", "ollama"])
def test_the_check_of_an_adapter_replays_its_transcripts(
    to: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "lora out", base)
    code, out = export(capsys, adapter, "--to", to, "--output", tmp_path / "to", "--name", "tuned")
    words = shlex.split(out.rpartition("check:")[2])
    assert (code, option(words, "--adapter"), option(words, "--model")) == (0, str(adapter), "tuned"), out
    # a full model has nothing to be applied: its transcripts are replayed if it has some
    for has_some in (False, True):
        if has_some:
            (base / TRANSCRIPTS).mkdir()
        code, out = export(capsys, base, "--to", to, "--output", tmp_path / f"full {has_some}")
        assert ("--adapter" in out) is has_some, out
    (base / TRANSCRIPTS).rmdir()


def test_ollama_gets_an_explicit_template(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "lora", base)
    code, out = export(capsys, adapter, "--to", "ollama", "--output", tmp_path / "to")
    text = (tmp_path / "to" / "Modelfile").read_text()
    assert code == 0, out
    assert text.startswith('FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE """{{- $turn := -1 }}')
    assert "PARAMETER repeat_penalty 1\nPARAMETER num_ctx " in text
    assert "cuts a prompt of more than num_ctx tokens" in out
    assert "Thoughts in a history" not in out
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
        ("ollama", {"use_dora": True}, "which Ollama does not load"),
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
        (["recipe.yaml", "--to", "trl", "--base", "b"], "--base only applies to servers, not to trl"),
        (["lora", "--to", "vllm", "--rows", "auto"], "--rows only applies to trainers, not to vllm"),
        (["lora", "--to", "vllm"], "lora: no such folder"),
    ],
)
def test_an_option_or_a_source_of_the_other_kind_is_bad_usage(
    words: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = export(capsys, *words, "--output", tmp_path / "to")
    assert (code, found in out) == (2, True), out


def merged_folder(tmp_path: Path, tokenizer: Path) -> Path:
    """Return the folder that `merge` writes, of a base with Mistral's own tokenizer file alone."""
    harness = TrainerHarness(tmp_path, tmp_path, "cpu")
    write_tiny_base(harness.base, tokenizer)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    harness.rows.write_text(json.dumps(row) + "\n")
    train(harness.recipe(harness.adapter, steps=1))
    assert main(["merge", str(harness.adapter), str(tmp_path / "my merged")]) == 0
    return tmp_path / "my merged"


def test_a_merged_folder_with_tekken_json_names_the_command_whose_folder_converts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = derived_tokenizer("derived-v7", words=2000)
    merged = merged_folder(tmp_path, tokenizer)
    out = capsys.readouterr().out
    assert (merged / "tekken.json").read_bytes() == tokenizer.read_bytes()
    # beside tekken.json alone, the converter would make a file whose template is a name
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (merged / "tokenizer.json").is_file()
    command = out.partition("convert the folder of: ")[2].splitlines()[0]
    assert main(shlex.split(command)[1:]) == 0
    model = tmp_path / "my merged-gguf" / "model"
    assert (model / "tokenizer.json").is_file()
    assert not (model / "tekken.json").exists()
    assert (model / "model.safetensors").samefile(merged / "model.safetensors")
