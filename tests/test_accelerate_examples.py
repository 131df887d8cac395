"""The configurations for several GPUs are ones that the installed accelerate takes, and the README starts each."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.devices import check_engine, check_sharded_layers
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe

FOLDER = Path(__file__).parents[1] / "examples" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "two-nodes": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what a process gets that this configuration starts."""
    given = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", "recipe.yaml"]
    settings, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    settings.deepspeed_fields_from_accelerate_config = ""
    deepspeed = TYPES[name] == DistributedType.DEEPSPEED
    variables = prepare_deepspeed_cmd_env(settings)[1] if deepspeed else prepare_multi_gpu_env(settings)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


def test_there_is_one_for_each_way() -> None:
    assert {file.stem for file in FILES} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_takes_the_configuration(name: str) -> None:
    config = load(name)
    assert config.distributed_type == TYPES[name]
    assert config.mixed_precision == "no"
    assert config.num_processes % config.num_machines == 0
    known = {action.dest for action in launch_command_parser()._actions}
    # accelerate itself takes any key in these sections
    assert {*config.fsdp_config, *config.deepspeed_config} <= known


def recipe(**sections: dict[str, Any]) -> Recipe:
    base = {"repo": "mistralai/Mistral-7B-v0.3", "revision": "a" * 40, **sections.get("base", {})}
    training = {"steps": 1, "device": "cpu", **sections.get("training", {})}
    return parse_recipe({"base": base, "data": {"train": ["rows.jsonl"]}, "training": training, "output": "out"})


@pytest.mark.parametrize("name", ["fsdp2", "two-nodes"])
def test_fsdp_is_what_the_trainer_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(name, monkeypatch)
    check_engine(recipe())
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="fsdp_version: 1; expected fsdp_version: 2"):
        check_engine(recipe())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(InputError, match="activation_checkpointing: true in the recipe"):
        check_engine(recipe())


@pytest.mark.parametrize("name", ["fsdp2", "two-nodes"])
def test_fsdp_shards_the_layers_of_any_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(name, monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model._no_split_modules = {"Linear"}
    check_sharded_layers(model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Linear, MistralDecoderLayer")
    said = r"fsdp_transformer_layer_cls_to_wrap: MistralDecoderLayer; .* such as Linear\. Leave the key out"
    with pytest.raises(InputError, match=said):
        check_sharded_layers(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_sharded_layers(model)


def test_sharding_in_fp16_or_of_a_base_in_4_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment("fsdp2", monkeypatch)
    with pytest.raises(InputError, match="fp16 with fsdp; expected bf16"):
        check_engine(recipe(training={"precision": "fp16"}))
    with pytest.raises(InputError, match="nf4 with fsdp"):
        check_engine(recipe(base={"quantization": "nf4"}))


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_is_of_the_stage_and_refused_without_a_gpu(
    name: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(name, monkeypatch)
    assert os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert "ACCELERATE_GRADIENT_CLIPPING" not in os.environ  # so the recipe's max_grad_norm decides
    with pytest.raises(InputError, match="DeepSpeed on a CPU; expected GPUs"):
        check_engine(recipe())


@pytest.mark.parametrize("name", TYPES)
def test_the_readme_starts_it(name: str) -> None:
    lines = re.findall(rf"^\$ (accelerate launch .*{name}\.yaml .*)$", README, flags=re.MULTILINE)
    assert lines
    for line in lines:
        given = launch_command_parser().parse_args(shlex.split(line)[2:])
        assert given.module
        assert given.training_script == "pytest_mistral_lora.training"
        assert (FOLDER.parents[1] / given.config_file).is_file()
