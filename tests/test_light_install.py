"""Without the extra `train`, everything that needs no model is judged, and the rest is reported as not checked."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import write_outputs
from packaging.requirements import Requirement
from safetensors.numpy import save_file
from verbs_without import run_verbs

from pytest_mistral_lora.assertions import assert_adapter_sound
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.extras import EXTRAS, MissingExtraError, extra, missing_extra, require_extra

ROOT = Path(__file__).parents[1]
BLOCKED = ("torch", "peft", "accelerate", "pyarrow", "psutil", "httpx")
"""The packages of extras, as Python imports them."""
COMMIT = "c170c708c41dac9275d15a8fff4eca08d52bab71"

LIGHT = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED!r} else self.finder.find_spec(name, path, target)

# not one finder more, which raises: libraries ask whether there is torch, and an error is no answer
sys.meta_path[:] = map(Without, sys.meta_path)
"""
NONE_IMPORTED = f"assert not {{name.partition('.')[0] for name in sys.modules}} & set({BLOCKED!r})"


def run_light(folder: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Return exit code, output and errors of each command, in one process in which the extra cannot be imported."""
    return run_verbs(LIGHT, commands, folder, after=NONE_IMPORTED)


def outcomes(report: str) -> dict[str, str]:
    """Return the outcome of each check, by subject and name; the rules in place of `failed`."""
    found = {}
    for one in json.loads(report)["checks"]:
        rules = "+".join(sorted({finding["rule"] for finding in one["findings"]}))
        found[f"{one['subject']}::{one['case']}"] = rules or one["not_checked"] or one["outcome"]
    return found


def write_adapter(folder: Path, *, dtype: str = "bfloat16", **changes: Any) -> None:
    """Write an adapter of two layers, as PEFT saves it, and the smallest manifest; `changes` replace tensors."""
    random = np.random.default_rng(0)
    tensors = {}
    for block in range(2):
        for side, shape in (("A", (4, 16)), ("B", (16, 4))):
            name = f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_{side}.weight"
            tensors[name] = random.normal(0, 0.02, shape).astype(getattr(ml_dtypes, dtype, dtype))
    for end, value in changes.items():
        [name] = [name for name in tensors if name.endswith(f"0.self_attn.q_proj.{end}.weight")]
        tensors[name] = np.full_like(tensors[name], value)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.3", "revision": COMMIT}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    manifest = {"base": config["base_model_name_or_path"], "revision": COMMIT, "dataset_sha256": "0" * 64, "seed": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_models(folder: Path) -> None:
    """Write a base of two layers, a model with a change of rank 2 in each, and two that no adapter makes."""
    random = np.random.default_rng(0)
    names = [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(2)]
    base = {name: random.normal(0, 0.02, (32, 32)).astype(np.float32) for name in names}
    product = {name: (random.normal(0, 0.02, (32, 2)) @ random.normal(0, 1, (2, 32))) for name in names}
    full = {name: base[name] + random.normal(0, 0.02, (32, 32)).astype(np.float32) for name in names}
    models = {"whole": base, "merged": {name: base[name] + product[name].astype(np.float32) for name in names}}
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 32, "head_dim": 8}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 32768}
    for name, tensors in {**models, "untouched": base, "full": full}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "model.safetensors")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """The results of the commands of a user without the extra, by a name."""
    folder = tmp_path_factory.mktemp("light")
    write_outputs.write_checkpoint(folder / "checkpoint")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_outputs.write_rows(folder / "rows.jsonl", {"messages": turns})
    write_outputs.write_rows(folder / "bad.jsonl", {"messages": [{"role": "bot", "content": "Hi"}]})
    encoded = Oracle(folder / "checkpoint" / "tokenizer.model.v3").encode({"messages": turns})
    row = {"row": 0, "messages": turns, "input_ids": list(encoded.input_ids), "labels": list(encoded.labels)}
    write_outputs.write_rows(folder / "encoded.jsonl", row)
    write_outputs.write_rows(folder / "masked.jsonl", {**row, "labels": [*row["labels"][:-1], -100]})
    write_adapter(folder / "adapter")
    write_adapter(folder / "narrow", dtype="float32")
    write_adapter(folder / "nan", lora_A=float("nan"))
    write_adapter(folder / "zero", lora_B=0)
    write_adapter(folder / "still", lora_B=1e-6)
    base = write_outputs.write_checkpoint(folder / "base")
    (base / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"], "vocab_size": 32768}))
    save_file({"model.norm.weight": np.ones(8, np.float32)}, base / "model.safetensors")
    pin = BaseFolder(base).weights_sha256
    sections = [f"base: {{path: base, weights_sha256: {pin}}}", "data: {train: [rows.jsonl]}", "training: {steps: 1}"]
    (folder / "recipe.yaml").write_text("\n".join([*sections, "output: out\n"]))
    write_models(folder)
    (folder / "rows.parquet").write_bytes(b"PAR1aaaaPAR1")
    tokenizer, quick = ["--tokenizer", "checkpoint"], ["--examples", "1", "--json"]
    commands = {
        "render": ["render", "rows.jsonl", *tokenizer, "--json"],
        "checkpoint": ["check", "checkpoint", *quick],
        "rows": ["check", "rows.jsonl", *tokenizer, *quick],
        "bad": ["check", "bad.jsonl", *tokenizer, *quick],
        **{name: ["check", name, *quick] for name in ("adapter", "nan", "zero", "still")},
        **{
            name: ["check", name, "--as", "adapter", "--base", "whole", *quick]
            for name in ("merged", "untouched", "full")
        },
        **{name: ["check", f"{name}.jsonl", *tokenizer] for name in ("encoded", "masked")},
        "recipe": ["stats", "recipe.yaml"],
        "stats": ["stats", "rows.jsonl", *tokenizer],
        "verify": ["verify", "adapter"],
        "diff": ["diff", "adapter", "narrow", "--json"],
        "train": ["train", "recipe.yaml"],
        "chat": ["chat", "adapter"],
        "smoke": ["smoke", "adapter"],
        "serve-check": ["serve-check", "openai=http://127.0.0.1:9", *tokenizer],
        "parquet": ["import", "rows.parquet", "--to", "imported.jsonl"],
        "merge": ["merge", "adapter", "merged"],
    }
    return dict(zip(commands, run_light(folder, *commands.values()), strict=True))


MISSING = str(MissingExtraError("torch"))


def test_a_checkpoint_is_judged_in_full(judged: dict[str, tuple[int, str, str]]) -> None:
    code, report, _ = judged["checkpoint"]
    found = outcomes(report)
    assert code == 0
    assert {name.partition("::")[0] for name, one in found.items() if one == "passed"} == {
        "tokenizer",
        "template",
        "mask",
    }
    assert not any("torch" in one for one in found.values())
    assert {"tokenizer::save-and-load", "template::single", "mask::own-rows-1"} & {
        name for name, one in found.items() if one == "passed"
    }


def test_rows_and_encoded_rows_are_judged(judged: dict[str, tuple[int, str, str]]) -> None:
    assert judged["rows"][0] == judged["encoded"][0] == judged["render"][0] == judged["stats"][0] == 0
    assert outcomes(judged["rows"][1])["dataset::rows-are-valid"] == "passed"
    assert judged["recipe"][0] == 0
    assert " the run         1 step: " in judged["recipe"][1]
    assert judged["bad"][0] == judged["masked"][0] == 1
    assert outcomes(judged["bad"][1])["dataset::rows-are-valid"] == "ML601"
    assert "ML546" in judged["masked"][1]


@pytest.mark.parametrize(
    ("name", "case", "rule"),
    [
        ("nan", "adapter::tensors-finite", "ML402"),
        ("zero", "adapter::layers-trained", "ML403"),
        ("still", "adapter::layers-trained", "ML424"),
    ],
)
def test_the_numbers_of_an_adapter_are_judged(
    name: str, case: str, rule: str, judged: dict[str, tuple[int, str, str]]
) -> None:
    sound, broken = outcomes(judged["adapter"][1]), outcomes(judged[name][1])
    assert (judged["adapter"][0], judged[name][0]) == (0, 1)
    assert (sound[case], broken[case]) == ("passed", rule)


def test_what_needs_a_model_is_not_checked_and_names_the_command(judged: dict[str, tuple[int, str, str]]) -> None:
    found = outcomes(judged["adapter"][1])
    unchecked = {name.removeprefix("adapter::") for name, one in found.items() if MISSING in one}
    assert unchecked == {"tensors-complete", "configuration", "fits-base", "changes-the-base"}
    passed = {"adapter::files", "adapter::tensors-finite", "adapter::layers-trained", "adapter::placement"}
    assert {name for name, one in found.items() if one == "passed"} >= {*passed, "manifest::schema"}


def test_an_assertion_judges_the_numbers_first_and_never_passes_for_want_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "zero", lora_B=0)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(AssertionError, match="ML403"):
        assert_adapter_sound(tmp_path / "zero")
    with pytest.raises(MissingExtraError, match=r"pip install 'pytest-mistral-lora\[train\]'"):
        assert_adapter_sound(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "case", "rule"),
    [("untouched", "merged::changes-the-base", "ML413"), ("full", "merged::low-rank", "ML431")],
)
def test_a_merged_model_is_compared_with_its_base(
    name: str, case: str, rule: str, judged: dict[str, tuple[int, str, str]]
) -> None:
    sound, broken = outcomes(judged["merged"][1]), outcomes(judged[name][1])
    assert (sound[case], broken[case]) == ("passed", rule)
    assert not any(MISSING in one for one in sound.values())


def test_a_manifest_and_two_runs_are_compared(judged: dict[str, tuple[int, str, str]]) -> None:
    assert judged["verify"][0] == 0
    code, report, _ = judged["diff"]
    assert code == 1
    assert '"self_attn.q_proj.lora_A"' in report


@pytest.mark.parametrize("verb", ["train", "chat", "smoke", "merge"])
def test_a_verb_that_needs_the_extra_names_it(verb: str, judged: dict[str, tuple[int, str, str]]) -> None:
    assert judged[verb] == (2, "", f"error: {MISSING}\n")


@pytest.mark.parametrize(("name", "module"), [("serve-check", "httpx"), ("parquet", "pyarrow")])
def test_another_extra_is_named_as_well(name: str, module: str, judged: dict[str, tuple[int, str, str]]) -> None:
    assert judged[name] == (2, "", f"error: {MissingExtraError(module)}\n")


def test_the_table_of_extras_is_that_of_the_package_and_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) - {"dev"} == {one.name for one in EXTRAS}
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for one in EXTRAS:
        needed = {Requirement(text).name for text in project["optional-dependencies"][one.name]}
        assert {MissingExtraError(module).found.partition(" ")[0] for module in one.modules} <= needed
        assert f"| `{one.name}` | " in page
        assert f" | {one.gives} |" in page
    assert not {Requirement(text).name for text in project["dependencies"]} & {*BLOCKED, "gguf", "rensa"}
    assert MISSING in page


def test_an_import_that_fails_for_another_reason_keeps_its_traceback() -> None:
    assert missing_extra(ModuleNotFoundError("No module named 'yaml'", name="yaml")) is None
    # installed, and broken: its own message has the reason
    assert missing_extra(ImportError("libcudart.so.12: cannot open", name="torch")) is None
    assert missing_extra(ValueError("torch")) is None


def test_a_missing_library_is_known_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert extra("gguf").missing == ("gguf",)
    with pytest.raises(MissingExtraError, match=r"gguf is .*pip install 'pytest-mistral-lora\[gguf\]'"):
        require_extra("gguf")
    found = missing_extra(ModuleNotFoundError("No module named 'gguf.quants'", name="gguf.quants"))
    assert found is not None
    assert found.exit_code == 2
