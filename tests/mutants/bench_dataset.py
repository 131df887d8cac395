"""The bench of the subject `dataset`: a recipe with its rows."""

from __future__ import annotations

import json
import shutil
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from derived_tekken import derived_tokenizer
from gallery import Artifact

from pytest_mistral_lora.chat.kinds.fim.encoder import FimEncoder
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.dataset.checks import checks
from pytest_mistral_lora.conformance.dataset.recipe import recipe_checks
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, Target

CALL_ID = "a1B2c3D4e"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def said(*texts: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


def _with_tools() -> dict[str, Any]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": CALL_ID, "content": "mild and dry"},
        {"role": "assistant", "content": "It is mild and dry in Rome."},
    ]
    return {"messages": messages, "tools": TOOLS}


ROWS = [
    said("What is the capital of France?", "Paris is the capital of France."),
    said("Say hello in German.", "Guten Tag!", system="You are terse."),
    said("How many legs has a spider?", "Eight.", "And an ant?", "An ant has six."),
    said("Name a prime number.", "Seven is prime."),
    _with_tools(),
]
HELD_OUT = [said("Which colour is the sky?", "Blue, on a clear day."), said("What is ice?", "Frozen water.")]


@cache
def shared_tokenizer() -> CheckpointTokenizer:
    return CheckpointTokenizer(shipped_tokenizer("spm-v3"))


@cache
def newer_tokenizer(name: str) -> CheckpointTokenizer:
    tokenizer = CheckpointTokenizer(derived_tokenizer(name, words=0))
    tokenizer.fast.chat_template = tokenizer.oracle.chat_template()
    return tokenizer


SPACED = "spm-v3, with a space before each completion"


@cache
def spaced_tokenizer() -> CheckpointTokenizer:
    """Return a tokenizer that encodes a completion as a text of its own."""
    # a copy, because a file's oracle is shared
    copy = Path(mkdtemp()) / "tokenizer.model.v3"
    shutil.copy(shipped_tokenizer("spm-v3"), copy)
    tokenizer = CheckpointTokenizer(copy)
    tokenizer.fast.chat_template = sound_template()
    oracle = tokenizer.oracle
    # mypy: the method of one object is replaced
    FimEncoder.of(oracle)._completion_ids = oracle.encode_text  # type: ignore[method-assign]
    return tokenizer


def gap(number: int, *, prompt: str = "", suffix: str | None = None, completion: str = "") -> dict[str, str]:
    """Return a fill-in-the-middle row, whose texts differ from those of another number."""
    return {
        "prompt": prompt or f"def area_{number}(width, height):\n    ",
        "suffix": f"\n    return area_{number} + border\n" if suffix is None else suffix,
        "completion": completion or f"area_{number} = width * height * {number}",
    }


def use_tokenizer(artifact: Artifact, name: str) -> None:
    """Give the recipe a derived tokenizer, with a base of its size."""
    artifact["tokenizer"] = name
    artifact["config"]["vocab_size"] = newer_tokenizer(name).oracle.vocab_size


@cache
def sound_template() -> str:
    return str(shared_tokenizer().oracle.chat_template())


class _Recipe(RecipeTarget):
    """A recipe whose tokenizer is loaded once for all mutants; its base is a configuration without weights."""

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        if self.name == SPACED:
            return spaced_tokenizer()
        return newer_tokenizer(self.name) if self.name.startswith("derived-") else shared_tokenizer()

    @cached_property
    def base_folder(self) -> BaseFolder:
        _ = self.recipe  # a recipe that cannot be read names no base
        assert self.path
        return BaseFolder(self.path.parent / "base")


CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": None,
}


class Bench:
    subject = "dataset"

    def make(self, folder: Path) -> Artifact:
        recipe = {
            "base": {"repo": "a/b", "revision": "0" * 40},
            "data": {"train": ["rows.jsonl"], "eval": ["held-out.jsonl"]},
            "training": {"steps": 1, "max_length": 256},
            "output": "out",
        }
        plain = json.dumps([ROWS, HELD_OUT, recipe])
        rows, held_out, recipe = json.loads(plain)
        return {
            "rows": rows,
            "held_out": held_out,
            "recipe": recipe,
            "config": dict(CONFIG),
            "template": {"source": sound_template()},
            "tokenizer": "spm-v3",
            "alone": False,
            "folder": folder,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        folder = artifact["folder"]
        write_rows(folder / "rows.jsonl", artifact["rows"])
        write_rows(folder / "held-out.jsonl", artifact["held_out"])
        text = artifact["recipe"] if isinstance(artifact["recipe"], str) else yaml.safe_dump(artifact["recipe"])
        (folder / "recipe.yaml").write_text(text)
        (folder / "base").mkdir(exist_ok=True)
        (folder / "base" / "config.json").write_text(json.dumps(artifact["config"]))
        shared_tokenizer().fast.chat_template = artifact["template"]["source"]
        vars(shared_tokenizer()).pop("template", None)  # it is kept, and would be the template of the mutant before
        target = _Recipe(artifact["tokenizer"], folder / "recipe.yaml")
        settings = Settings(1, None, "cpu", True, (), False, Path(mkdtemp(dir=folder)))
        if artifact["alone"]:
            rows = DatasetTarget("rows", folder / "rows.jsonl", judge=Target.of_loaded(shared_tokenizer()))
            return [finding for check in checks(rows, settings) for finding in check.run().findings]
        return [
            finding
            for subject in (recipe_checks, checks)
            for check in subject(target, settings)
            for finding in check.run().findings
        ]


def write_rows(path: Path, rows: list[Any]) -> None:
    if path.exists() or path.is_symlink():
        return
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


BENCH = Bench()


def turn_of(artifact: Artifact, row: int = 0, message: int = 0) -> dict[str, Any]:
    turn: dict[str, Any] = artifact["rows"][row]["messages"][message]
    return turn


def set_training(artifact: Artifact, **settings: Any) -> None:
    artifact["recipe"]["training"] |= settings


def parameters_of(artifact: Artifact) -> dict[str, Any]:
    parameters: dict[str, Any] = artifact["rows"][4]["tools"][0]["function"]["parameters"]
    return parameters


def arguments_of(artifact: Artifact) -> dict[str, Any]:
    arguments: dict[str, Any] = turn_of(artifact, 4, 1)["tool_calls"][0]["function"]["arguments"]
    return arguments
