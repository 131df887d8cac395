"""The bench of the subject `tokenizer`: a checkpoint folder with a small Tekken tokenizer."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from gallery import Artifact

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer import folder as tokenizer_folder
from pytest_mistral_lora.conformance.tokenizer.checks import checks as tokenizer_checks

VERSION_5 = hasattr(transformers, "TokenizersBackend")
UNKNOWN_CLASS = "ML218" if VERSION_5 else "ML201 ML218"
CHANGES_IDS = "ML205 ML218" if VERSION_5 else ""
"""What fires on a swapped class: transformers 4 takes tokenizer.json as it stands, whatever the class."""

TOKENS = 3072
"""Tokens of the bench's vocabulary: the first of a shipped Tekken vocabulary, which are a vocabulary of their own."""

DOCUMENTS = {
    "tokenizer_json": "tokenizer.json",
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens_map": "special_tokens_map.json",
    "config": "config.json",
    "generation_config": "generation_config.json",
}
COMMIT = "a" * 40


class TokenizerBench:
    """A checkpoint folder with a derived Tekken tokenizer: small, so that it loads fast."""

    subject = "tokenizer"

    def make(self, folder: Path) -> Artifact:
        """Copy the sound folder, and read its documents."""
        checkpoint = Path(shutil.copytree(_pristine(), folder / "checkpoint"))
        shutil.copy(checkpoint / "tekken.json", folder / "tekken.json")
        named = {"oracle": None, "own_tekken": folder / "tekken.json"}
        return {"folder": checkpoint, **named, **_read(checkpoint), **_tools(folder)}

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Write the documents back where they were changed, and run every check."""
        folder = artifact["folder"]
        _write(folder, artifact)
        checks = tokenizer_checks(Target("checkpoint", folder, oracle_name=artifact["oracle"]), SETTINGS)
        findings = [finding for check in checks for finding in check.run().findings]
        findings += tokenizer_folder.shipped_bytes(Target("spm-v1"), artifact["recorded"])
        return findings + _judge_pin(artifact["pinned"])


BENCH = TokenizerBench()
SETTINGS = Settings(1, None, "cpu", True, (), False, Path())
TODAY = "{% set today = strftime_now('%d %B %Y') %}"
DEFAULT = "{% if messages[0].role != 'system' %}{{ '[INST] Answer like a sailor. [/INST]' }}{% endif %}"


def _judge_pin(revision: str) -> list[Finding]:
    def judge() -> Result:
        check_revision(revision)
        return Result()

    return list(Check(Target("checkpoint"), "tokenizer", "file", judge).run().findings)


@functools.cache
def _pristine() -> Path:
    """A checkpoint folder as transformers saves it, with Mistral's own file beside it."""
    folder = Path(tempfile.mkdtemp(prefix="bench-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tekken = json.loads(shipped_tokenizer("tekken-240718").read_text(encoding="utf-8"))
    tekken["config"]["default_vocab_size"] = TOKENS
    tekken["vocab"] = tekken["vocab"][: TOKENS - tekken["config"]["default_num_special_tokens"]]
    _save(folder / "tekken.json", tekken)
    fast = CheckpointTokenizer(folder / "tekken.json").fast
    fast.save_pretrained(folder)
    # transformers 4 repeats there what tokenizer.json has
    rewrite(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    ids = {f"{name}_token_id": getattr(fast, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    _save(folder / "config.json", {"model_type": "mistral", "vocab_size": TOKENS, **ids})
    _save(folder / "generation_config.json", ids)
    named = {name: getattr(fast, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    _save(folder / "special_tokens_map.json", named)
    return folder


def _read(folder: Path) -> Artifact:
    documents = {name: json.loads((folder / file).read_text()) for name, file in DOCUMENTS.items()}
    fetched = dict.fromkeys(DOCUMENTS.values(), COMMIT)
    return {**documents, "template": (folder / "chat_template.jinja").read_text(), "fetched": fetched}


def _write(folder: Path, artifact: Artifact) -> None:
    """Write what was changed, and only that: a file may have been broken as a file."""
    for name, value in _read(_pristine()).items():
        if artifact[name] == value:
            continue
        if name == "template":
            (folder / "chat_template.jinja").write_text(artifact[name])
        elif name == "fetched":
            for file, commit in artifact[name].items():
                note = folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{commit}\n{'0' * 40}\n0.0\n")
        else:
            _save(folder / DOCUMENTS[name], artifact[name])


def _tools(folder: Path) -> Artifact:
    elsewhere = folder / "elsewhere.json"
    elsewhere.write_text("{}")
    return {
        "elsewhere": elsewhere,
        "shipped": lambda name: shipped_tokenizer(name).read_bytes(),
        "with_own_prompt": with_own_prompt,
        "without_system": without_system,
        "bos_post_processor": _post_processor("<s>"),
        "pinned": "3f9c2e1b7a6d4c5080912efab3467dc15e8f20a9",
        "recorded": hashlib.sha256(shipped_tokenizer("spm-v1").read_bytes()).hexdigest(),
    }


def with_own_prompt(template: str, prompt: str) -> str:
    """Return the template that mistral-common generates with a system prompt of its own."""
    none = "set default_system_message = ''"
    assert none in template
    return template.replace(none, f"set default_system_message = '{prompt}'")


def without_system(template: str) -> str:
    """Forget the system prompt where the last message is an answer, as old templates do that wait for a last user."""
    condition = "{% if messages[-1].role == 'assistant' and messages[0].role == 'system' %}"
    return f"{condition}{{% set messages = messages[1:] %}}{{% endif %}}{template}"


def _post_processor(literal: str) -> dict[str, Any]:
    token = {"SpecialToken": {"id": literal, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {literal: {"id": literal, "ids": [1], "tokens": [literal]}},
    }


def _save(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def sentencepiece(artifact: Artifact, *, legacy: bool) -> None:
    """Put a SentencePiece checkpoint in place of the Tekken one."""
    folder = artifact["folder"] = artifact["folder"].parent / "sentencepiece"
    folder.mkdir()
    shutil.copy(shipped_tokenizer("spm-v1"), folder / "tokenizer.model.v1")
    fast = CheckpointTokenizer(folder / "tokenizer.model.v1").fast
    fast.save_pretrained(folder)
    if legacy:
        bare = folder.parent / "bare"
        bare.mkdir()
        shutil.copy(shipped_tokenizer("spm-v1"), bare / "tokenizer.model")
        loader = getattr(transformers, "TokenizersBackend", transformers.LlamaTokenizerFast)
        loader.from_pretrained(bare, legacy=True, add_bos_token=False).save_pretrained(folder)
    artifact.update(_read(_pristine()))


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    _save(file, data)
