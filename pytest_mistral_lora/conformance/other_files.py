"""Files and folders that are not judged as they are: what each is, and the next step, a command to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.remedies import DATA_SUFFIXES, ROW_SUFFIXES, import_step
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.formats.importers import trainer_answer

if TYPE_CHECKING:
    from pytest_mistral_lora.runners import Trainer

_KNOWN: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"compute_environment"}), "a configuration of accelerate"),
    (frozenset({"distributed_type"}), "a configuration of accelerate"),
    (frozenset({"zero_optimization"}), "a configuration of DeepSpeed"),
    (frozenset({"services"}), "a file of Docker Compose"),
    (frozenset({"jobs", "name"}), "a workflow of GitHub"),
    (frozenset({"schema_version", "checks", "causes"}), "a report of this suite"),
)
_NO_ROWS = "It declares neither rows nor a tokenizer: name those."

_CHECKPOINT_PARTS = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "params.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "model.safetensors.index.json",
        "consolidated.safetensors",
    }
)
_ADAPTER_PARTS = frozenset(
    {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "manifest.json", "DECISION.md"}
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def configuration_answer(path: Path, config: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the name of a YAML or JSON file of another tool, and the next step; None if no tool is known."""
    from pytest_mistral_lora.programs.other_files import configuration_of_a_program

    if answer := trainer_answer(path, config) or configuration_of_a_program(config):
        return answer
    golden = f"pytest --mistral-golden --mistral-golden-dir={shlex.quote(str(path.parent.parent.parent))}"
    if {"case", "row", "completion_ids"} <= config.keys():
        return "a golden transcript", f"Judge it with its adapter: {golden} --mistral-adapter=FOLDER"
    if {"case", "row", "input_ids", "tokenizer"} <= config.keys():
        return "a golden of ids and labels", f"Judge it with its tokenizer: {golden} --mistral-tokenizer=PATH"
    return next(((title, _NO_ROWS) for keys, title in _KNOWN if keys <= config.keys()), None)


def file_answer(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return the name of a file that is recognised by its name or first bytes, and the next step; else None.

    Args:
        path: The file.
        head: Its first bytes.
    """
    from pytest_mistral_lora.programs.other_files import text_of_a_program

    name, suffix, quoted = path.name, path.suffix.lower(), shlex.quote(str(path))
    folder = f"Check its folder: mistral-lora check {shlex.quote(str(path.parent))}"
    if name in _ADAPTER_PARTS:
        return "a part of an adapter or merged model", folder
    if name in _CHECKPOINT_PARTS or suffix == ".safetensors":
        return "a part of a checkpoint", folder
    if suffix in _PICKLES:
        return "a Python pickle, which can run code", "Save it as safetensors."
    text = head.decode("utf-8", "replace")
    if suffix == ".py":
        if name.startswith("test_") or name.endswith("_test.py") or name == "conftest.py" or "\ndef test_" in text:
            return "a pytest file", f"Run it: pytest {quoted}"
        dataset = "--tokenizer PATH --dataset rows.jsonl"
        if trainer := _imported_trainer(text):
            command = f"mistral-lora audit --runner {trainer.name} --config {trainer.name}.yaml {dataset}"
            return f"a script that uses {trainer.title}", f"Judge the rows of its configuration: {command}"
        return "a Python script", f"If it encodes rows, judge them: mistral-lora audit --runner {quoted} {dataset}"
    if answer := text_of_a_program(name, text):
        return answer
    if name in ("pyproject.toml", "pytest.ini", "tox.ini", "setup.cfg"):
        return "a configuration of pytest", f"Run the targets that it names: pytest --mistral-golden -c {quoted}"
    if re.fullmatch(r".*(requirements|constraints).*\.(txt|in|lock)|uv\.lock|poetry\.lock|Pipfile(\.lock)?", name):
        step = "Check what is installed, by the rows and tokenizers that are shipped: mistral-lora check"
        return "a list of packages", step
    if suffix in (".md", ".rst", ".html", ".ipynb", ".log"):
        return "a text for people", "Name the recipe, the rows, the adapter or the tokenizer that it is about."
    return None


def _imported_trainer(script: str) -> Trainer | None:
    """Return the trainer whose module a script imports, among those whose configurations declare rows."""
    from pytest_mistral_lora.runners import TRAINERS

    for trainer in TRAINERS.of_this_package():
        if trainer.importer and re.search(rf"^\s*(from|import)\s+{re.escape(trainer.module)}\b", script, re.MULTILINE):
            return trainer
    return None


_OF_CHECKPOINTS = ("config.json", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v*")


def folder_answer(path: Path) -> tuple[str, str]:
    """Return the name of a folder that is not checked, and the next step."""
    if any(path.glob("*.gguf")):
        file = sorted(path.glob("*.gguf"))[0]
        return "a folder of a GGUF file", f"Check the file: mistral-lora check {shlex.quote(str(file))}"
    if (path / "templates").is_dir() or (path / "transcripts").is_dir():
        command = f"pytest --mistral-golden --mistral-golden-dir={shlex.quote(str(path))} --mistral-tokenizer=PATH"
        return "a folder of goldens", f"Judge by them: {command}"
    recipe = next((file for file in sorted(path.glob("*.y*ml")) if file.name.startswith("recipe")), None)
    if recipe is not None:
        return f"a folder with {recipe.name}", f"Check it: mistral-lora check {shlex.quote(str(recipe))}"
    adapters = sorted(file for depth in ("*", "*/*") for file in path.glob(f"{depth}/adapter_config.json"))
    if adapters:
        # by time, not by name: `checkpoint-100` comes after `checkpoint-20`
        newest = max(adapters, key=lambda file: file.stat().st_mtime_ns).parent
        found = f"a folder with {counted(len(adapters), 'adapter')} below it"
        return found, f"Check one: mistral-lora check {shlex.quote(str(newest))}"
    bases = sorted({file.parent for name in _OF_CHECKPOINTS for file in path.glob(f"*/{name}")})
    if bases:
        found = f"a folder with {counted(len(bases), 'checkpoint')} below it"
        return found, f"Check one: mistral-lora check {shlex.quote(str(bases[0]))}"
    data = sorted(file for file in path.rglob("*") if file.name.endswith(DATA_SUFFIXES) and file.is_file())
    if not data:
        return "", ""
    rows = [str(file) for file in data if file.name.endswith(ROW_SUFFIXES)]
    if rows:
        command = shlex.join(["mistral-lora", "check", *rows[:3]])
        return f"a folder with {len(data)} data files", f"Name files of rows: {command} --tokenizer PATH"
    return f"a folder with {len(data)} data files", import_step(str(data[0]))
