"""Each command reads the recipe, the configuration, the tokenizer, the record and the tensors' headers once."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import run_forked
from tiny_runs import CONVERSATIONS, recipe_data, write_rows

from pytest_mistral_lora.training.run import RunResult

COUNT = """
import contextlib, io, json, os, sys
from collections import Counter

import peft, torch, transformers
from transformers import MistralForCausalLM, PreTrainedModel, Trainer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.training import generate, merge

opened, headers, models = Counter(), Counter(), Counter()
make = PreTrainedModel.__init__


def reads_a_header():
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "read_header":
        frame = frame.f_back
    return frame is not None


def count(event, given):
    # one with an opener of its own is reported by `os.open`, too, which gives no mode
    if event == "open" and isinstance(given[0], str) and given[1] is not None:
        opened[os.path.realpath(given[0])] += 1
        if given[0].endswith(".safetensors") and reads_a_header():
            headers[os.path.basename(os.path.dirname(given[0])), os.path.basename(given[0])] += 1


def count_model(self, *given, **named):
    models[type(self).__name__] += isinstance(self, MistralForCausalLM)
    make(self, *given, **named)


# each command in a process of its own, which has imported the libraries
for name, (folders, words) in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        sys.addaudithook(count)
        PreTrainedModel.__init__ = count_model
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        found = {"code": code, "models": models["MistralForCausalLM"]}
        found["opened"] = {
            kind: {file: opened[os.path.join(folder, file)] for file in os.listdir(folder)}
            for kind, folder in folders.items()
        }
        found["headers"] = {"/".join(place): times for place, times in headers.items()}
        print(json.dumps([name, found]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
COMMANDS = {
    "smoke --rows": ("smoke", "{adapter}", "--base", "{base}", "--rows", "{rows}", "--max-new-tokens", "2"),
    "smoke": ("smoke", "{adapter}", "--base", "{base}"),
    # kept results have the digest of each file that they are read from
    "check": ("check", "{adapter}", "--base", "{base}", "--no-cache"),
    "verify": ("verify", "{adapter}", "--base", "{base}"),
    "merge": ("merge", "{adapter}", "{adapter}-merged", "--base", "{base}"),
    "check merged": ("check", "{adapter}", "{of_merge}", "--base", "{base}", "--no-cache"),
    "train": ("train", "{recipe}"),
    # the recipe with the adapter that the command before has made
    "check recipe": ("check", "{recipe}", "--no-cache"),
}
_OF_RECIPE = ("train", "check recipe")
_OF_FULL_BASE = (*_OF_RECIPE, "check", "check merged")
_LOADS = "transformers loads the tokenizer from a path"
AGAIN = {
    ("train", "config.json"): (
        2,
        "PEFT compares the vocabulary with the base's when transformers saves the last checkpoint: resized embeddings "
        f"would have to be saved, too; and {_LOADS}, whose template the rows are compared with",
    ),
    ("check", "config.json"): (1, _LOADS),
    ("check", "tokenizer.json"): (1, _LOADS),
    ("check", "tokenizer_config.json"): (3, _LOADS),
    ("check merged", "config.json"): (1, _LOADS),
    ("check merged", "tokenizer.json"): (1, _LOADS),
    ("check merged", "tokenizer_config.json"): (3, _LOADS),
    ("check recipe", "config.json"): (1, _LOADS),
    ("check recipe", "tokenizer.json"): (1, _LOADS),
    ("check recipe", "tokenizer_config.json"): (3, _LOADS),
    ("check recipe", "chat_template.jinja"): (1, _LOADS),
}
"""How often a command opens a file of the base once more, and why."""


@dataclass(frozen=True)
class Counted:
    """What a command opened and made.

    Attributes:
        code: The exit code.
        opened: How often it opened each file of its adapter, of its base and beside its recipe.
        headers: How often it read the header of each tensor file, by the last two parts of its path.
        models: The number of models that were made, those without a weight included.
        errors: The errors of all commands.
    """

    code: int
    opened: dict[str, dict[str, int]]
    headers: dict[str, int]
    models: int
    errors: str


@pytest.fixture(scope="module")
def counted(
    run: RunResult, base: Path, full_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Counted]:
    folder = tmp_path_factory.mktemp("commands")
    given = {"rows": write_rows(folder / "rows.jsonl", CONVERSATIONS[:1]), "recipe": folder / "recipe.yaml"}
    given["recipe"].write_text(json.dumps(recipe_data(full_base), default=str))
    commands = {}
    for name, words in COMMANDS.items():
        folders = {"base": str(full_base if name in _OF_FULL_BASE else base)}
        if name in _OF_RECIPE:
            folders |= {"work": str(folder), "adapter": str(folder / "out")}
        elif name == "check merged":
            made = folder / "merge" / "adapter"
            folders |= {"adapter": f"{made}-merged", "of_merge": str(made)}
        else:
            folders["adapter"] = str(shutil.copytree(run.output, folder / name.replace(" ", "") / "adapter"))
        commands[name] = (folders, [word.format(**given, **folders) for word in words])
    done = run_forked([sys.executable, "-c", COUNT, json.dumps(commands)])
    return {name: Counted(**found, errors=done.stderr) for name, found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_the_manifest_is_read_once(name: str, counted: dict[str, Counted]) -> None:
    assert counted[name].code == 0, counted[name].errors
    assert counted[name].opened["adapter"]["manifest.json"] == 1


@pytest.mark.parametrize(
    ("name", "folder", "names"),
    [
        ("check", "adapter", {"manifest.json", "adapter_config.json"}),
        ("check", "base", {"config.json", "tokenizer.json", "tokenizer_config.json"}),
        ("check merged", "adapter", {"manifest.json", "config.json", "tokenizer_config.json"}),
        ("check merged", "of_merge", {"manifest.json", "adapter_config.json"}),
        ("check merged", "base", {"config.json"}),
    ],
)
def test_all_checks_of_a_run_open_each_json_file_once(
    name: str, folder: str, names: set[str], counted: dict[str, Counted]
) -> None:
    assert counted[name].code == 0, counted[name].errors
    opened = {file: times for file, times in counted[name].opened[folder].items() if file.endswith(".json") and times}
    assert names <= opened.keys()
    again = {file: AGAIN.get((name, file), (0, ""))[0] if folder == "base" else 0 for file in opened}
    assert opened == {file: 1 + again[file] for file in opened}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_configuration_of_the_base_is_read_once(name: str, counted: dict[str, Counted]) -> None:
    again, _ = AGAIN.get((name, "config.json"), (0, ""))
    assert counted[name].code == 0, counted[name].errors
    assert counted[name].opened["base"]["config.json"] == 1 + again


@pytest.mark.parametrize("name", COMMANDS)
def test_the_header_of_each_tensor_file_is_read_once(name: str, counted: dict[str, Counted]) -> None:
    headers = counted[name].headers
    assert headers, counted[name].errors
    assert set(headers.values()) == {1}, headers


def test_a_run_makes_one_model_without_weights(counted: dict[str, Counted]) -> None:
    # and the one that it trains
    assert counted["train"].models == 2


def test_a_check_opens_the_recipe_once(counted: dict[str, Counted]) -> None:
    assert counted["check recipe"].code == 0, counted["check recipe"].errors
    assert counted["check recipe"].opened["work"]["recipe.yaml"] == 1


def test_a_check_opens_and_hashes_each_file_of_a_tokenizer_once(counted: dict[str, Counted]) -> None:
    opened = counted["check recipe"].opened
    names = ("tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    of_base = {name: times for name, times in opened["base"].items() if name in names}
    assert {"tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json"} <= of_base.keys()
    again = {name: AGAIN.get(("check recipe", name), (0, ""))[0] for name in of_base}
    assert of_base == {name: 1 + again[name] for name in of_base}
    of_adapter = {name: times for name, times in opened["adapter"].items() if name in names}
    assert "tokenizer.model.v3" in of_adapter
    assert set(of_adapter.values()) == {1}, of_adapter
