"""Files for llama.cpp and Ollama: folders for llama.cpp's converters, and a Modelfile's TEMPLATE.

The folders keep every score, every space and the scale of an adapter. The TEMPLATE is mistral-common's prompt of rows
of texts in Go's template language. A prompt with tools has no exact template: Ollama hands templates a tool as JSON
with its keys in another order and without spaces, or as values whose order is lost. The template therefore names no
tools, so that Ollama either refuses a request with tools, or (from 2026 on) renders it by the Jinja template in the
GGUF file.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.versions import VERSIONS
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    SPECIAL_TOKENS,
    SPM_MODEL,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, convert
from pytest_mistral_lora.checkpoint.weights import weight_files
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS

MODEL, ADAPTER = "model", "adapter"
"""The folders that the two converters read."""


def write_model(folder: Path, base: Path, tokenizer: Path, template: Path | None) -> None:
    """Write a folder with the weights of a base, as links, and the tokenizer and template of training.

    Args:
        folder: The folder to make.
        base: The folder of the weights.
        tokenizer: The folder of the tokenizer.
        template: The chat template; None for mistral-common's own.

    Raises:
        NoOracleError: If the tokenizer is not Mistral's.
    """
    folder.mkdir()
    home = folder.parent.resolve()
    for file in (*weight_files(base), *base.glob("model*.safetensors.index.json")):
        target = file.resolve()
        # weights within the export move with it
        link = Path("..") / target.relative_to(home) if target.is_relative_to(home) else target
        try:
            (folder / file.name).symlink_to(link)
        except OSError:  # a file system without links
            shutil.copyfile(file, folder / file.name)
    for name in (MODEL_CONFIG, GENERATION_CONFIG):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    # not tekken.json: transformers 5 would choose mistral-common's backend, whose vocabulary the converter cannot list
    for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    oracle = CheckpointTokenizer(tokenizer).oracle
    converted = convert(oracle)
    if not ((folder / TOKENIZER_JSON).is_file() and (folder / TOKENIZER_CONFIG).is_file()):
        converted.save_pretrained(folder)
    config = read_json(folder / TOKENIZER_CONFIG)
    config.pop("chat_template", None)
    # a class that transformers 4 and 5 both have: converters are pinned to either
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if oracle.kind == "spm":
        # without tokenizer.model a vocabulary has no scores; without `false`, each control token gets a space
        shutil.copyfile(oracle.path, folder / SPM_MODEL)
        config["add_prefix_space"] = False
    write_json(folder / TOKENIZER_CONFIG, config)
    text = template.read_bytes().decode() if template is not None else oracle.chat_template()
    write_text(folder / TEMPLATE, text)


def write_adapter(folder: Path, adapter: AdapterFolder) -> None:
    """Write an adapter whose scale is alpha / rank, the only scale that llama.cpp computes."""
    folder.mkdir()
    config = dict(adapter.config)
    if config.get("use_rslora"):
        # alpha / sqrt(rank), as the quotient of an alpha and the rank
        config |= {"lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]), "use_rslora": False}
    write_json(folder / CONFIG, config)
    shutil.copyfile(adapter.tensors_file, folder / ADAPTER_TENSORS)


# The first loop finds the user's turn that the system prompt is put into: the first one, or the last one. A turn is all
# messages of the user up to the next answer, because mistral-common joins them, across system messages.
_TURN = """\
{{- $turn := -1 }}{{ $open := false }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}{{ if not $open }}%(when)s{{ $turn = $i }}%(end)s{{ end }}{{ $open = true }}
{{- else if eq $m.Role "assistant" }}{{ $open = false }}{{ end }}
{{- end }}
{{- $open = false }}
"""
_ROWS = """\
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}
{{- if $open }}{{ "\\n\\n" }}{{ $m.Content }}
{{- else }}{{ "%(begin)s" }}%(system)s%(text)s{{ end }}{{ $open = true }}
{{- else if eq $m.Role "assistant" }}{{ if $open }}{{ "%(close)s" }}{{ $open = false }}{{ end }}
{{- %(answer)s }}{{ "</s>" }}%(other)s{{ end }}
{{- end }}
{{- if $open }}{{ "%(close)s" }}{{ end }}"""


def go_template(oracle: Oracle) -> str:
    """Return the TEMPLATE of a tokenizer; BOS is left to the server.

    Raises:
        InputError: If its version has no template that is exact on rows of texts.
    """
    facts, space = oracle.facts, " " if oracle.kind == "spm" else ""
    if facts.settings:
        known = [older.name.removeprefix("v") for older in VERSIONS if not older.settings]
        raise InputError(
            f"no Go template is known to render version {facts.name} as mistral-common does",
            place=str(oracle.path),
            expected=f"a tokenizer of version {known[0]} to {known[-1]}",
            next_step="Serve it by llama.cpp or vLLM: --to llamacpp, --to vllm.",
        )
    if facts.system_in == "first-user-turn":
        # v1, whose markers are text with spaces
        return _in_turn(first=True, begin=" [INST] ", close=" [/INST]", space="", before_answer=" ")
    if facts.system_in == "last-user-turn":
        return _in_turn(first=False, begin="[INST]", close="[/INST]", space=space, before_answer=space)
    # system prompts are separate messages
    text = _text("$m.Content", space)
    other = f'{{{{ else if eq $m.Role "system" }}}}{{{{ "[SYSTEM_PROMPT]" }}}}{text}{{{{ "[/SYSTEM_PROMPT]" }}}}'
    parts = {"begin": "[INST]", "close": "[/INST]", "system": "", "text": text, "other": other}
    parts["answer"] = text.removeprefix("{{ ").removesuffix(" }}")
    return "{{- $open := false }}\n" + _ROWS % parts


def _in_turn(*, first: bool, begin: str, close: str, space: str, before_answer: str) -> str:
    """Return the template of a version that puts the system prompt before a turn of the user."""
    when, end = ("{{ if lt $turn 0 }}", "{{ end }}") if first else ("", "")
    system = (
        f'{{{{ if and $.System (eq $i $turn) }}}}{_spaced("$.System", space)}{{{{ "\\n\\n" }}}}{{{{ $m.Content }}}}'
    )
    text = f"{{{{ else }}}}{_text('$m.Content', space)}{{{{ end }}}}"
    parts = {"begin": begin, "close": close, "system": system, "text": text, "other": ""}
    parts["answer"] = _text("$m.Content", before_answer).removeprefix("{{ ").removesuffix(" }}")
    return _TURN % {"when": when, "end": end} + _ROWS % parts


def _spaced(value: str, space: str) -> str:
    return f'{{{{ "{space}" }}}}{{{{ {value} }}}}' if space else f"{{{{ {value} }}}}"


def _text(value: str, space: str) -> str:
    # an empty text has no token, and so no space before it
    return f"{{{{ if {value} }}}}{_spaced(value, space)}{{{{ end }}}}"
