"""Configurations that are broken at random: no command fails with anything but an error of this project."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sampling import sampled
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.checks import adapter_findings, cases
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.adapter_config import AdapterConfig, key_faults, match_counts
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.generate import load_adapted
from pytest_mistral_lora.training.merge.plan import plan_merge

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of PEFT, and its base of one layer and 64 ids."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("fuzzed")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=1, architectures=["MistralForCausalLM"], **size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MistralForCausalLM(config).save_pretrained(home / "base")
        model = MistralForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
        model.save_pretrained(home / "adapter")
    return home / "adapter", home / "base"


def used(adapter: Path, base: Path) -> list[str]:
    """Judge, load and plan to merge an adapter; return the text of each finding and of each error of this project."""
    texts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            texts += [finding.text() for finding in adapter_findings(adapter, base)]
        except MistralLoraError as error:
            texts.append(str(error))
        uses = (
            lambda: load_adapted(AdapterFolder(adapter), BaseFolder(base), "fp32", "cpu"),
            lambda: plan_merge(AdapterFolder(adapter), BaseFolder(base)),
            lambda: AdapterFolder(adapter, BaseFolder(base)).identity,
        )
        for use in uses:
            try:
                use()
            except MistralLoraError as error:
                texts.append(str(error))
    return texts


ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        8,
        64,
        10**6,
        10**20,
        10**400,
        0.5,
        -0.0,
        1e300,
        "",
        "x",
        "q_proj",
        "(",
        "\x1b[2J",
        "\x00",
    ),
    *(
        [],
        ["q_proj"],
        ["", "q_proj"],
        [1],
        [None],
        [[0, 1]],
        [["q_proj"]],
        {},
        {"q_proj": 8},
        {"(": 8},
        {"a": {"b": []}},
    ),
    *(
        "a" * 100_000,
        ["q_proj"] * 20_000,
        {f"a{number}": 1 for number in range(3_000)},
        ".*",
        "all-linear",
        "LORA",
        "IA3",
    ),
    *("main", "0" * 40, "../../etc", "/dev/zero", "gaussian", "pissa", "loftq", "antigravity", "é", "\u202e"),
)


def broken(config: Mapping[str, Any], source: random.Random) -> str:
    """Return a configuration with one to three keys removed, added or given another value; or with damaged text."""
    changed = dict(config)
    for _ in range(source.randint(1, 3)):
        key = source.choice([*config, *AdapterConfig.model_fields, "a_key_of_nobody", "", "__class__"])
        if source.random() < 0.15:
            changed.pop(key, None)
        else:
            changed[key] = source.choice(ODD)
    text = json.dumps(changed)
    if source.random() < 0.2:
        at = source.randrange(len(text))
        put = source.choice(
            ["", "}", "[" * 2000, "NaN", "1e999", '"r": 1, ', "\ud83d".encode("utf-8", "replace").decode()]
        )
        text = text[:at] + put + text[at + source.randint(0, 3) :]
    return text


@pytest.mark.parametrize("seed", sampled(range(8), ("0", "1")))
def test_a_broken_configuration_ends_in_an_error_of_this_project(
    seed: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    healthy, base = folders
    adapter, source = Path(shutil.copytree(healthy, tmp_path / "adapter")), random.Random(seed)
    config = json.loads((healthy / CONFIG).read_text())
    for _ in range(12):
        (adapter / CONFIG).write_text(text := broken(config, source))
        for found in used(adapter, base):
            assert found.isprintable() or "\n" in found, text
            assert len(found) < 5_000, text


@pytest.mark.parametrize(
    "value", [["x"] * 200_000, [["a"]] * 100_000, {f"{key:x}": "a" for key in range(80_000)}], ids=type
)
@pytest.mark.parametrize(
    "key",
    sampled(["layer_replication", "rank_pattern", "trainable_token_indices", "a_key_of_nobody"], ["rank_pattern"]),
)
def test_a_megabyte_of_faults_is_one_fault_soon(key: str, value: Any, folders: tuple[Path, Path]) -> None:
    config, start = json.loads((folders[0] / CONFIG).read_text()), time.process_time()
    [fault] = key_faults({**config, key: value})
    assert fault.found.startswith(key)
    assert len(fault.found) < 200
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "a JSON list"),
        (b"\xff{}", "not valid JSON"),
        (b'{"r": 8, "r": 16}', "the key 'r' appears twice"),
        (b'{"r": NaN}', "NaN is not a JSON number"),
        (b'{"r": 1e999}', "too large a number"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "' + b"a" * (1 << 20) + b'"}', "too large"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(
    content: bytes, reason: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(folders[0], tmp_path / "adapter"))
    (adapter / CONFIG).write_bytes(content)
    found = used(adapter, folders[1])
    assert reason in found[0]
    assert all(CONFIG in one for one in found)


def test_no_use_of_an_adapter_imports_a_module_that_its_file_names(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(folders[0], tmp_path / "adapter"))
    (tmp_path / "module_of_the_file.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((adapter / CONFIG).read_text())
    parent = {"base_model_class": "A", "parent_library": "module_of_the_file"}
    named = {"megatron_config": {"a": 1}, "megatron_core": "module_of_the_file", "auto_mapping": parent}
    (adapter / CONFIG).write_text(json.dumps({**config, **named}))
    assert sum("megatron_c" in found for found in used(adapter, folders[1])) == 5
    assert "module_of_the_file" not in sys.modules


def test_a_base_with_an_adapter_in_its_folder_is_not_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(folders[1], tmp_path / "base"))
    shutil.copy(folders[0] / CONFIG, base)
    with pytest.raises(InputError, match="the folder of the base has an adapter"):
        load_adapted(AdapterFolder(folders[0]), BaseFolder(base), "fp32", "cpu")


def test_a_pattern_without_end_stops_no_command(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.chat.reading.files.PATTERN_SECONDS", 0.5)
    adapter = Path(shutil.copytree(folders[0], tmp_path / "adapter"))
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "target_modules": "([a-z._0-9]+)+#"}))
    with pytest.raises(InputError, match=r"more than 0\.5 s"):
        load_adapted(AdapterFolder(adapter), BaseFolder(folders[1]), "fp32", "cpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 60_000}, "rank 60000"),
        ({"rank_pattern": {"q_proj": 900}}, "rank 900"),
        ({"layer_replication": [[0, 900]]}, "900 rep"),
    ],
)
def test_more_than_the_tensors_can_fill_is_not_made(
    change: dict[str, Any], reason: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(folders[0], tmp_path / "adapter"))
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=reason):
        load_adapted(AdapterFolder(adapter), BaseFolder(folders[1]), "fp32", "cpu")


@pytest.mark.parametrize("kind", ["gone", "a folder", "a link out", "a link to nothing", "a pipe"])
def test_half_an_adapter_is_judged_as_an_adapter(kind: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(folders[0], tmp_path / "adapter"))
    (adapter / CONFIG).unlink()
    if kind == "a folder":
        (adapter / CONFIG).mkdir()
    elif kind == "a pipe":
        os.mkfifo(adapter / CONFIG)
    elif kind != "gone":
        (adapter / CONFIG).symlink_to("/etc/hostname" if kind == "a link out" else CONFIG)
    assert recognised(adapter).kind == "adapter"
    assert {finding.rule for finding in cases(AdapterFolder(adapter))["files"]().findings} == {"ML405"}
    assert all(CONFIG in found for found in used(adapter, folders[1]))


def test_patterns_are_counted_and_bad_ones_refused() -> None:
    assert match_counts([], ["a"]) == []
    assert match_counts([r"a.*", r"b", r"ab"], ["ab", "ac"]) == [2, 0, 1]
    with pytest.raises(InputError, match="not a regular expression"):
        match_counts(["("], ["a"])
