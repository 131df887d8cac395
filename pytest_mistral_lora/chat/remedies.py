"""The next step, a command to paste: for data that must be converted first, and for files of other tools."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.container import ARRAY, PARQUET, VALUES, Container
from pytest_mistral_lora.chat.foreign_fields import CALL, CONTENT, FLAGS, MEDIA_PARTS, OTHER_ROLES, THOUGHTS
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.places import Place, file_of

_ENCODED = "encoded.jsonl"
_UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc"}


def import_step(path: str) -> str:
    """Return the sentence with the command that converts a file."""
    # never overwrite the source
    to = "converted.jsonl" if Path(path).name == "rows.jsonl" else "rows.jsonl"
    return f"Convert it: mistral-lora import {shlex.quote(path) if path else 'FILE'} --to {to}"


def import_command(origin: Place, *options: str) -> str:
    """Return the command that converts the file of a row.

    Args:
        origin: The place of the row; empty for a row made in code.
        options: Options of the command.
    """
    path = file_of(origin)
    return " ".join([import_step(path).removeprefix("Convert it: "), *options])


_MEANT = {
    **dict.fromkeys(("agent", "ai", "bot", "chatbot", "llm", "machine", "reply", "response"), "assistant"),
    **dict.fromkeys(("client", "customer", "person", "prompt", "prompter", "question"), "user"),
}
"""Names of roles that no format has, and the role that a user means by each."""


def role_step(role: Any, origin: Place, roles: Collection[str]) -> str:
    """Return the sentence on a wrong role: its conversion if another format has it, or the role that is meant.

    Args:
        role: The role.
        origin: The place of the row.
        roles: The right roles.

    Returns:
        The sentence; empty if no role is similar.
    """
    if not isinstance(role, str):
        return ""
    if role not in OTHER_ROLES:
        meant = _MEANT.get(role.strip().lower()) or next(iter(difflib.get_close_matches(role.lower(), roles, n=1)), "")
        return f"Did you mean {meant!r}?" if meant else ""
    ours = "assistant" if OTHER_ROLES[role] == CALL else OTHER_ROLES[role]
    return f"To make it {ours!r}: {import_command(origin)}"


def field_step(name: Any, origin: Place, known: Collection[str]) -> str:
    """Return the sentence on the conversion of a field of a message, or on leaving it out.

    Args:
        name: The field.
        origin: The place of the row.
        known: The fields that a message of its role may have; a name like one of them is misspelt, and not left out.
    """
    fields = {
        tuple(FLAGS): "`weight`",
        THOUGHTS: "a thinking chunk",
        (*CONTENT, "refusal"): "`content`",
        (CALL,): "`tool_calls`",
    }
    ours = next((to for names, to in fields.items() if name in names and to != f"`{name}`"), "")
    if ours:
        return f"To turn it into {ours}: {import_command(origin)}"
    if name == "weight":
        return "Only answers have a weight: leave it out."
    if name in MEDIA_PARTS:
        return media_step(origin)
    if not isinstance(name, str) or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8):
        return ""
    kind = "names" if name == "name" else "message-keys"
    return f"To leave it out: {import_command(origin, '--lossy', kind)}"


def media_step(origin: Place) -> str:
    """Return the sentence on images, audio and video."""
    return f"This suite checks and trains text. To leave it out: {import_command(origin, '--lossy media')}"


def json_step(fault: str) -> str:
    """Return the sentence on a line that is not JSON, or has a refused number; empty if the fault is clear enough."""
    if "not a JSON number" in fault or "too large a number" in fault:
        return "Write null, or leave the key out."
    return "Write each row with json.dumps, on a line of its own." if fault.startswith("not valid JSON") else ""


def utf8_step(path: Path) -> str:
    """Return the sentence on a file that is not in UTF-8."""
    source, saved = shlex.quote(str(path)), shlex.quote(f"utf8-{path.name}")
    return f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {source} > {saved}"


AGAIN = "Fetch or write the file again."


def unpack_step(compression: str, path: Path) -> str:
    """Return the sentence that decompresses a file, or decodes it."""
    if not compression:
        return "Save it as UTF-8."
    return f"Unpack it: {_UNPACK[compression]} {shlex.quote(str(path))} > {shlex.quote(path.stem)}"


def unreadable(error: Exception, path: Path) -> InputError:
    """Return the error for a file that cannot be read to its end."""
    if isinstance(error, UnicodeDecodeError):
        return InputError(f"not valid {error.encoding}: {error.reason}", place=str(path), next_step=utf8_step(path))
    # an error that a library raises itself has no errno
    if isinstance(error, OSError) and error.errno:
        return InputError(f"cannot be read: {error.strerror}", place=str(path))
    return InputError(f"the compressed data is damaged: {error}", place=str(path), next_step=AGAIN)


def encoded_step(container: Container | None, path: Path) -> str:
    """Return the sentence on encoded rows that are not JSON Lines in UTF-8.

    `mistral-lora import` converts chat rows only.

    Args:
        container: How the file holds them; None for a folder, as trainers prepare them.
        path: The file or folder.
    """
    quoted, reader = shlex.quote(str(path)), "load_from_disk"
    if container is not None:
        if container.compression:
            return f"Unpack it: {_UNPACK[container.compression]} {quoted} > {_ENCODED}"
        if container.encoding:
            return f"Save it as UTF-8: iconv -f {container.encoding} -t utf-8 {quoted} > {_ENCODED}"
        if container.name in (ARRAY, VALUES):
            each = ".[]" if container.name == ARRAY else "."
            return f"Write one object a line: jq -c '{each}' {quoted} > {_ENCODED}"
        if container.name != PARQUET and "Arrow" not in container.name:
            return "Write it as JSON Lines in UTF-8."
        reader = "Dataset.from_parquet" if container.name == PARQUET else "Dataset.from_file"
    code = f'import datasets; datasets.{reader}({json.dumps(str(path))}).to_json("{_ENCODED}")'
    return f"Write one object a line: python -c {shlex.quote(code)}"


_TRAINERS: Mapping[str, tuple[str, frozenset[str]]] = {
    "Axolotl": (
        "base_model",
        frozenset({"datasets", "adapter", "sequence_len", "micro_batch_size", "rl", "val_set_size"}),
    ),
    "LLaMA-Factory": (
        "model_name_or_path",
        frozenset({"dataset", "stage", "finetuning_type", "template", "dataset_dir", "cutoff_len", "tokenized_path"}),
    ),
    "TRL": (
        "model_name_or_path",
        frozenset({"dataset_name", "datasets", "use_peft", "lora_r", "learning_rate", "bf16", "max_steps"}),
    ),
}
"""The trainers whose configuration is read: the key of its model, and keys that identify it (one is enough)."""

_OTHERS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"compute_environment"}), "a configuration of accelerate"),
    (frozenset({"distributed_type"}), "a configuration of accelerate"),
    (frozenset({"zero_optimization"}), "a configuration of DeepSpeed"),
    (frozenset({"merge_method"}), "a configuration of mergekit"),
    (frozenset({"services"}), "a file of Docker Compose"),
    (frozenset({"jobs", "name"}), "a workflow of GitHub"),
    (frozenset({"schema_version", "checks", "causes"}), "a report of this suite"),
)
_NO_ROWS_OF = "It declares neither rows nor a tokenizer: name those."

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

ROW_SUFFIXES = (".jsonl", ".ndjson")
"""Suffixes of files with one row a line."""
DATA_SUFFIXES = (*ROW_SUFFIXES, ".json", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst", ".bz2", ".xz")
"""Suffixes of files that hold records."""


def configuration_answer(path: Path, config: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return the name of a YAML or JSON file of another tool, and the next step; None if no tool is known."""
    quoted = shlex.quote(str(path))
    for trainer, (model, keys) in _TRAINERS.items():
        if model in config and keys & config.keys():
            base = config[model]
            is_here = isinstance(base, str) and Path(base).is_dir()
            command = f"mistral-lora audit --runner {trainer.lower().replace('-', '')} --config {quoted} --tokenizer "
            command += shlex.quote(base) if is_here else "PATH"
            named = "" if is_here or not isinstance(base, str) else f", with the folder of {base:.80} as PATH"
            step = f"Judge its rows{named}: {command}. Convert its data: mistral-lora import {quoted} --to rows.jsonl"
            return f"a configuration of {trainer}", step
    if any(isinstance(value, Mapping) and "_component_" in value for value in config.values()):
        step = "Have it write the rows that it feeds, and judge them: mistral-lora audit encoded.jsonl --tokenizer PATH"
        return "a configuration of torchtune", step
    entries = [value for value in config.values() if isinstance(value, Mapping)]
    if entries and len(entries) == len(config) and any({"file_name", "hf_hub_url"} & entry.keys() for entry in entries):
        name = next((key for key, value in config.items() if "file_name" in value), next(iter(config)))
        step = (
            f"Convert a data set of it: mistral-lora import {quoted} --dataset {shlex.quote(str(name))} --to rows.jsonl"
        )
        return "a dataset_info.json of LLaMA-Factory", step
    golden = f"pytest --mistral-golden --mistral-golden-dir={shlex.quote(str(path.parent.parent.parent))}"
    if {"case", "row", "completion_ids"} <= config.keys():
        return "a golden transcript", f"Judge it with its adapter: {golden} --mistral-adapter=FOLDER"
    if {"case", "row", "input_ids", "tokenizer"} <= config.keys():
        return "a golden of ids and labels", f"Judge it with its tokenizer: {golden} --mistral-tokenizer=PATH"
    return next(((title, _NO_ROWS_OF) for keys, title in _OTHERS if keys <= config.keys()), None)


def file_answer(path: Path, head: bytes) -> tuple[str, str] | None:
    """Return the name of a file that is recognised by its name or first bytes, and the next step; else None.

    Args:
        path: The file.
        head: Its first bytes.
    """
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
        if re.search(r"^\s*(from|import)\s+trl\b", text, re.MULTILINE):
            step = f"Judge the rows of its configuration: mistral-lora audit --runner trl --config trl.yaml {dataset}"
            return "a script that uses TRL", step
        return "a Python script", f"If it encodes rows, judge them: mistral-lora audit --runner {quoted} {dataset}"
    made_of = re.search(r"^\s*FROM\s+(\S+)", text, re.MULTILINE)
    if made_of and (name.startswith("Modelfile") or re.search(r"^(TEMPLATE|PARAMETER|ADAPTER)\s", text, re.MULTILINE)):
        served = shlex.quote(made_of[1]) if Path(made_of[1]).is_dir() else "FOLDER"
        return "a Modelfile of Ollama", f"Check the folder of the model that it serves: mistral-lora check {served}"
    if name in ("pyproject.toml", "pytest.ini", "tox.ini", "setup.cfg"):
        return "a configuration of pytest", f"Run the targets that it names: pytest --mistral-golden -c {quoted}"
    if re.fullmatch(r".*(requirements|constraints).*\.(txt|in|lock)|uv\.lock|poetry\.lock|Pipfile(\.lock)?", name):
        step = "Check what is installed, by the rows and tokenizers that are shipped: mistral-lora check"
        return "a list of packages", step
    if suffix in (".md", ".rst", ".html", ".ipynb", ".log"):
        return "a text for people", "Name the recipe, the rows, the adapter or the tokenizer that it is about."
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
