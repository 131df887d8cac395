"""Tokenizer folders that are broken on purpose."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from derived_tekken import derived_oracle
from gallery import Artifact, mutant
from safetensors.torch import save_file
from transformers import AddedToken, AutoTokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
from pytest_mistral_lora.conformance import tokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer import folder as tokenizer_folder

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
_COMMIT = "a" * 40


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
        checks = tokenizer.checks(Target("checkpoint", folder, oracle_name=artifact["oracle"]), SETTINGS)
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
    _rewrite(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    ids = {f"{name}_token_id": getattr(fast, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    _save(folder / "config.json", {"model_type": "mistral", "vocab_size": TOKENS, **ids})
    _save(folder / "generation_config.json", ids)
    named = {name: getattr(fast, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    _save(folder / "special_tokens_map.json", named)
    return folder


def _read(folder: Path) -> Artifact:
    documents = {name: json.loads((folder / file).read_text()) for name, file in DOCUMENTS.items()}
    fetched = dict.fromkeys(DOCUMENTS.values(), _COMMIT)
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
        "with_default_system": lambda template: DEFAULT + template,
        "without_system": _without_system,
        "bos_post_processor": _post_processor("<s>"),
        "pinned": "3f9c2e1b7a6d4c5080912efab3467dc15e8f20a9",
        "recorded": hashlib.sha256(shipped_tokenizer("spm-v1").read_bytes()).hexdigest(),
    }


def _without_system(template: str) -> str:
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


def _sentencepiece(artifact: Artifact, *, legacy: bool) -> None:
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


def _rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    _save(file, data)


# what does not load


@mutant("ML201 ML209", says="not valid JSON")
def truncated_tokenizer_json(artifact: Artifact) -> None:
    """`tokenizer.json` ends in its middle, as after a broken download."""
    _truncate(artifact["folder"] / "tokenizer.json")


@mutant("ML201 ML209", says="not valid JSON")
def truncated_tekken(artifact: Artifact) -> None:
    """`tekken.json` ends in its middle."""
    _truncate(artifact["folder"] / "tekken.json")


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@mutant("ML201", says="there is no tokenizer")
def no_tokenizer_at_all(artifact: Artifact) -> None:
    """The folder has weights and configuration, and no tokenizer."""
    for name in ("tekken.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (artifact["folder"] / name).unlink()


@mutant("ML201")
def unknown_model_type(artifact: Artifact) -> None:
    """`tokenizer.json` has a model type that the library does not know."""
    artifact["tokenizer_json"]["model"]["type"] = "Unknown"


@mutant("ML201 ML209", says="is a directory")
def directory_for_a_file(artifact: Artifact) -> None:
    """`tekken.json` is a directory."""
    (artifact["folder"] / "tekken.json").unlink()
    (artifact["folder"] / "tekken.json").mkdir()


@mutant("ML201 ML209", says="more than")
def huge_file(artifact: Artifact) -> None:
    """`tokenizer_config.json` has two gigabytes."""
    os.truncate(artifact["folder"] / "tokenizer_config.json", 2 << 30)


@mutant("ML201 ML209", says="not a regular file")
def pipe_for_a_file(artifact: Artifact) -> None:
    """`chat_template.jinja` is a named pipe, which would wait for a writer for ever."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    os.mkfifo(artifact["folder"] / "chat_template.jinja")


@mutant("ML201 ML210", says="links out of the folder")
def link_out_of_the_folder(artifact: Artifact) -> None:
    """`chat_template.json` is a link to a file elsewhere."""
    (artifact["folder"] / "chat_template.json").symlink_to(artifact["elsewhere"])


@mutant("ML201 ML209", says="cannot be read")
def link_to_nothing(artifact: Artifact) -> None:
    """`chat_template.json` is a link to itself."""
    (artifact["folder"] / "chat_template.json").symlink_to("chat_template.json")


@mutant("ML209", says="is not UTF-8")
def invalid_utf8(artifact: Artifact) -> None:
    """`generation_config.json` is not UTF-8."""
    (artifact["folder"] / "generation_config.json").write_bytes(b'{"eos_token_id": 2, "x": "\xff"}')


@mutant("ML209", says="pointer of Git LFS")
def lfs_pointer(artifact: Artifact) -> None:
    """A file is the pointer that Git LFS left."""
    (artifact["folder"] / "chat_template.json").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")


@mutant("ML209", says="the key 'eos_token_id' appears twice")
def key_twice(artifact: Artifact) -> None:
    """`generation_config.json` has a key twice."""
    (artifact["folder"] / "generation_config.json").write_text('{"eos_token_id": 2, "eos_token_id": 2}')


@mutant("ML209", says="nested too deeply")
def deep_nesting(artifact: Artifact) -> None:
    """A JSON file is nested a hundred thousand levels deep."""
    (artifact["folder"] / "chat_template.json").write_text("[" * 100_000 + "]" * 100_000)


@mutant("ML209", says="its header describes")
def truncated_weights(artifact: Artifact) -> None:
    """`model.safetensors` is shorter than its header says."""
    file = _weights(artifact, TOKENS)
    os.truncate(file, file.stat().st_size - 1)


def _weights(artifact: Artifact, rows: int) -> Path:
    file = Path(artifact["folder"]) / "model.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(rows, 4)}, file)
    return file


@mutant("ML209", says="not a safetensors file")
def weights_with_a_huge_header(artifact: Artifact) -> None:
    """`model.safetensors` claims a header of many gigabytes."""
    (artifact["folder"] / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


# which files there are


@mutant("ML211", says="stands beside tekken.json")
def two_versions_side_by_side(artifact: Artifact) -> None:
    """A SentencePiece file of another version stands beside `tekken.json`."""
    shutil.copy(shipped_tokenizer("spm-v1"), artifact["folder"] / "tokenizer.model.v1")


@mutant("ML211", says="differ")
def unversioned_copy_differs(artifact: Artifact) -> None:
    """`tokenizer.model` has other bytes than `tokenizer.model.v1`."""
    _sentencepiece(artifact, legacy=False)
    shutil.copy(shipped_tokenizer("spm-v2"), artifact["folder"] / "tokenizer.model")


@mutant("ML212", says="files of 2 commits")
def files_of_two_commits(artifact: Artifact) -> None:
    """`tokenizer.json` was fetched at another commit than `config.json`."""
    artifact["fetched"]["tokenizer.json"] = "b" * 40


@mutant("ML212", says="not the file of commit")
def snapshot_with_a_file_of_another_commit(artifact: Artifact) -> None:
    """A snapshot of the Hub's cache links one name to a blob that has another content than its name says."""
    repository = artifact["folder"].parent / "models--owner--name"
    folder, blobs = repository / "snapshots" / _COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(artifact["folder"], folder)
    blob = blobs / ("0" * 64)
    (folder / "tokenizer_config.json").rename(blob)
    (folder / "tokenizer_config.json").symlink_to(f"../../blobs/{blob.name}")
    artifact["folder"] = folder


@mutant("ML207")
def shipped_file_of_other_bytes(artifact: Artifact) -> None:
    """The shipped file is not the one that the goldens were recorded with."""
    artifact["recorded"] = "0" * 64


@mutant("ML208", says="is not a pin")
def branch_for_a_pin(artifact: Artifact) -> None:
    """A recipe pins a branch, which moves."""
    artifact["pinned"] = "main"


# single tokens


@mutant("ML204", "I01", says="pad_token is EOS")
def pad_is_eos(artifact: Artifact) -> None:
    """The tokenizer pads with EOS."""
    artifact["tokenizer_config"]["pad_token"] = "</s>"
    artifact["special_tokens_map"]["pad_token"] = "</s>"


@mutant("ML204", "I01", says="config.json: pad_token_id 2")
def pad_is_eos_in_the_model(artifact: Artifact) -> None:
    """The model's configuration pads with EOS."""
    artifact["config"]["pad_token_id"] = 2


@mutant("ML204", "I01", says="generation_config.json: pad_token_id 2")
def pad_is_eos_at_generation(artifact: Artifact) -> None:
    """The generation configuration pads with one of its EOS ids."""
    artifact["generation_config"].update(pad_token_id=2, eos_token_id=[2])


@mutant("ML202 ML203", says="stands for text")
def pad_is_a_word(artifact: Artifact) -> None:
    """The pad token is a token of ordinary text."""
    artifact["tokenizer_config"]["pad_token"] = "ing"
    artifact["special_tokens_map"]["pad_token"] = "ing"


@mutant("ML203")
def unk_is_inst(artifact: Artifact) -> None:
    """UNK is a control token."""
    artifact["tokenizer_config"]["unk_token"] = "[INST]"
    artifact["special_tokens_map"]["unk_token"] = "[INST]"


@mutant("ML217", says="eos_token_id 4 is not EOS")
def another_eos_at_generation(artifact: Artifact) -> None:
    """Generation stops at `[/INST]`, too."""
    artifact["generation_config"]["eos_token_id"] = [2, 4]


@mutant("ML217", says="is not in the vocabulary")
def pad_beyond_the_vocabulary(artifact: Artifact) -> None:
    """The model's configuration pads with an id that no token has."""
    artifact["config"]["pad_token_id"] = TOKENS


@mutant("ML217", says="bos_token_id 3 is not BOS")
def another_bos_in_the_model(artifact: Artifact) -> None:
    """The model's configuration has another BOS."""
    artifact["config"]["bos_token_id"] = 3


@mutant("ML203 ML213 ML226", says="eos_token is '[/INST]'")
def special_tokens_map_differs(artifact: Artifact) -> None:
    """`special_tokens_map.json` has another EOS."""
    artifact["special_tokens_map"]["eos_token"] = "[/INST]"


@mutant("ML202 ML213", says="has special False")
def flags_differ(artifact: Artifact) -> None:
    """`tokenizer_config.json` has a control token that is not special."""
    tokens = artifact["tokenizer_json"]["added_tokens"]
    table = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}
    table["5"]["special"] = False
    artifact["tokenizer_config"]["added_tokens_decoder"] = table


@mutant("ML213", says="has the id 7")
def added_tokens_differ(artifact: Artifact) -> None:
    """`added_tokens.json` has a token under another id."""
    (artifact["folder"] / "added_tokens.json").write_text('{"[INST]": 7}')


# vocabulary


def _swap(artifact: Artifact, one: str, other: str) -> None:
    vocabulary = artifact["tokenizer_json"]["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


@mutant("ML205 ML214")
def two_tokens_swapped(artifact: Artifact) -> None:
    """Two tokens of the vocabulary have each other's id."""
    _swap(artifact, "ing", "ed")


@mutant("ML205")
def one_merge_missing(artifact: Artifact) -> None:
    """A merge is missing, and the model does not look whole words up."""
    model = artifact["tokenizer_json"]["model"]
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) != "ing"]
    model["ignore_merges"] = False


@mutant("ML205", "I09", says="gets other ids")
def wrong_split_pattern(artifact: Artifact) -> None:
    """The pre-tokenizer splits by the pattern of another model family."""
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    artifact["tokenizer_json"]["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}


@mutant("ML205", "I23")
def space_after_control_tokens(artifact: Artifact) -> None:
    """`legacy=True`, the default of the class: every control token is followed by a space."""
    _sentencepiece(artifact, legacy=True)


@mutant("ML205")
def merges_by_id(artifact: Artifact) -> None:
    """The merges are in the order of ids, as `LlamaTokenizer` of transformers 5 makes them of a `.model`."""

    def reorder(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])

    _sentencepiece(artifact, legacy=False)
    _rewrite(artifact["folder"] / "tokenizer.json", reorder)


@mutant("ML202 ML205", "I08", says="has rstrip")
def spaces_around_inst_are_swallowed(artifact: Artifact) -> None:
    """`[INST]` takes the space after it with it, so that a template's space is lost."""
    artifact["tokenizer_json"]["added_tokens"][3].update(rstrip=True)


@mutant("ML202 ML205")
def swapped_control_tokens(artifact: Artifact) -> None:
    """`[INST]` and `[/INST]` have each other's id."""
    names = {"[INST]": "[/INST]", "[/INST]": "[INST]"}
    for token in artifact["tokenizer_json"]["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _swap(artifact, "[INST]", "[/INST]")


@mutant("ML202 ML205", says="is not special")
def control_token_as_text(artifact: Artifact) -> None:
    """`[INST]` is an ordinary token of the vocabulary."""
    tokens = artifact["tokenizer_json"]["added_tokens"]
    tokens[:] = [token for token in tokens if token["content"] != "[INST]"]


@mutant("ML202 ML205 ML214", says="… and")
def another_version(artifact: Artifact) -> None:
    """Mistral's file is of another version than `tokenizer.json`."""
    _sentencepiece(artifact, legacy=False)
    (artifact["folder"] / "tokenizer.model.v1").unlink()
    shutil.copy(shipped_tokenizer("spm-v2"), artifact["folder"] / "tokenizer.model.v2")


@mutant("ML202 ML214")
def one_token_more(artifact: Artifact) -> None:
    """A special token was added."""
    fast = AutoTokenizer.from_pretrained(artifact["folder"], **({"mistral_format": False} if VERSION_5 else {}))
    fast.add_tokens([AddedToken("<|im_start|>", special=True)])
    fast.save_pretrained(artifact["folder"])
    artifact["config"]["vocab_size"] = TOKENS + 1


@mutant("ML215", "I38", says="and the tokenizer has")
def vocabulary_without_rows(artifact: Artifact) -> None:
    """The model has fewer rows than the tokenizer has tokens."""
    artifact["config"]["vocab_size"] = TOKENS - 2
    _weights(artifact, TOKENS - 2)


@mutant("ML215 ML216", "I38", says="vocab_size")
def resized_embeddings(artifact: Artifact) -> None:
    """The embeddings were resized for two tokens that the configuration does not have."""
    _weights(artifact, TOKENS + 2)


@mutant("ML216", "I38", says="more than the")
def rows_without_tokens(artifact: Artifact) -> None:
    """Embeddings and configuration have two rows that no token uses."""
    artifact["config"]["vocab_size"] = TOKENS + 2
    _weights(artifact, TOKENS + 2)


# classes


@mutant(CHANGES_IDS, "I24")
def class_that_changes_ids(artifact: Artifact) -> None:
    """The class in `tokenizer_config.json` splits text in its own way."""
    (artifact["folder"] / "config.json").unlink()  # by its model type, transformers would know better
    artifact["tokenizer_config"]["tokenizer_class"] = "GPT2Tokenizer"


@mutant(UNKNOWN_CLASS, "I25", says="is not a class of transformers")
def class_that_is_unknown(artifact: Artifact) -> None:
    """`tokenizer_config.json` names a class that this transformers does not have."""
    artifact["tokenizer_config"]["tokenizer_class"] = "TokenizersBackendOfTomorrow"


@mutant("ML218", says="auto_map")
def class_from_the_repository(artifact: Artifact) -> None:
    """`tokenizer_config.json` asks for Python code of the repository."""
    artifact["tokenizer_config"]["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


@mutant("ML201 ML228", "I11", says="encodes as letters")
def class_that_only_encodes(artifact: Artifact) -> None:
    """`tokenizer_config.json` names mistral-common's backend, which reads a rendered `[INST]` as letters."""
    artifact["tokenizer_config"]["tokenizer_class"] = "MistralCommonBackend" if VERSION_5 else "MistralCommonTokenizer"


@mutant("ML205 ML226 ML228", "I11", says="is encoded as letters")
def control_tokens_are_split(artifact: Artifact) -> None:
    """`split_special_tokens` makes letters of every control token."""
    artifact["tokenizer_config"]["split_special_tokens"] = True


@mutant("ML206", says="the chat template changes")
def template_with_carriage_returns(artifact: Artifact) -> None:
    """A template with carriage returns loses them when it is saved to a file and read as text."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    artifact["tokenizer_config"]["chat_template"] = artifact["template"].replace("\n", "\r\n")


# templates


@mutant("ML220", "I26", says="is not that of chat_template.jinja")
def template_differs_between_places(artifact: Artifact) -> None:
    """`tokenizer_config.json` has kept an old template."""
    artifact["tokenizer_config"]["chat_template"] = artifact["template"].replace("[INST]", "[INST] ")


@mutant("ML220", "I26")
def additional_default_differs(artifact: Artifact) -> None:
    """The additional templates include a default that differs."""
    more = artifact["folder"] / "additional_chat_templates"
    more.mkdir()
    (more / "default.jinja").write_text(artifact["template"] + "{# another #}")


@mutant("ML220", says="no default")
def no_default_template(artifact: Artifact) -> None:
    """There is a template for tools, and no default."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    artifact["tokenizer_config"]["chat_template"] = [{"name": "tool_use", "template": artifact["template"]}]


@mutant("ML201 ML209", says="'../../out'")
def template_name_leads_out(artifact: Artifact) -> None:
    """A named template would be saved outside the folder."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    named = [{"name": name, "template": artifact["template"]} for name in ("default", "../../out")]
    artifact["tokenizer_config"]["chat_template"] = named


@mutant("ML221", says="steps")
def endless_loop(artifact: Artifact) -> None:
    """Nested loops run for years."""
    artifact["template"] = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@mutant("ML221", says="text")
def enormous_text(artifact: Artifact) -> None:
    """The template makes a text of many gigabytes."""
    artifact["template"] = "{{ 'x' * 10 ** 11 }}" + artifact["template"]


@mutant("ML221", says="__class__")
def unsafe_attributes(artifact: Artifact) -> None:
    """The template reaches for Python's classes."""
    artifact["template"] += "{% if false %}{{ ''.__class__.__mro__ }}{% endif %}"


@mutant("ML221", says="another template")
def include(artifact: Artifact) -> None:
    """The template loads another one."""
    artifact["template"] += "{% if false %}{% include 'other.jinja' %}{% endif %}"


@mutant("ML222", says="is not a template")
def syntax_error(artifact: Artifact) -> None:
    """The template is cut in a tag."""
    artifact["template"] += "{% if"


@mutant("ML222", says="cannot render")
def refuses_everything(artifact: Artifact) -> None:
    """The template refuses a plain question."""
    artifact["template"] = "{{ raise_exception('not today') }}"


@mutant("ML222", says="prints closing_words")
def missing_variable(artifact: Artifact) -> None:
    """The template prints a variable that nothing gives."""
    artifact["template"] += "{{ closing_words }}"


@mutant("ML223", says="strftime_now")
def clock(artifact: Artifact) -> None:
    """The template reads the clock."""
    artifact["template"] = TODAY + artifact["template"]


@mutant("ML224 ML226", says="sailor")
def default_system_prompt(artifact: Artifact) -> None:
    """The template writes a system prompt of its own where a row has none."""
    artifact["template"] = DEFAULT + artifact["template"]


@mutant("ML205", says="model.dropout is 1.0")
def merges_are_left_to_chance(artifact: Artifact) -> None:
    """The dropout of a training of the tokenizer is saved: each text gets other ids each time."""
    artifact["tokenizer_json"]["model"]["dropout"] = 1.0


@mutant("ML222", "I60", says="the chat template is empty")
def empty_template(artifact: Artifact) -> None:
    """The chat template is a file without a letter."""
    artifact["template"] = ""


_CUT = "{% set messages = messages[-10:] if messages | length > 10 else messages %}"
_SHORTENED = (
    "{% set new = namespace(messages=[]) %}{% for m in messages %}"
    "{% set new.messages = new.messages + [dict(m, content=m.content[:9999])] %}{% endfor %}"
    "{% set messages = new.messages %}"
)


@mutant("ML225", "I12", says="'Question 0' is left out of a conversation of 48 messages")
def long_conversation_is_cut(artifact: Artifact) -> None:
    """The template keeps the last ten messages."""
    artifact["template"] = _CUT + artifact["template"]


@mutant("ML225", "I12", says="is left out of a question of 60,000 letters")
def long_text_is_cut(artifact: Artifact) -> None:
    """The template keeps the beginning of a text."""
    artifact["template"] = _SHORTENED + artifact["template"]


@mutant("ML225", "N10", says="is left out of an answer with a thought in tags")
def thoughts_are_dropped(artifact: Artifact) -> None:
    """The template leaves thoughts out of answers, as those of other families do."""
    artifact["template"] = (
        _SHORTENED.replace("m.content[:9999]", "m.content.split('</think>')[-1]") + artifact["template"]
    )


@mutant("ML225", "I12", says="is left out")
def system_prompt_dropped(artifact: Artifact) -> None:
    """The template leaves the system prompt out if the row ends with an answer."""
    artifact["template"] = _without_system(artifact["template"])


@mutant("ML203 ML226", "I60", says="writes bos_token")
def bos_is_not_set(artifact: Artifact) -> None:
    """BOS and EOS are not set, and the template writes them as nothing."""
    artifact["tokenizer_config"].update(bos_token=None, eos_token=None)
    (artifact["folder"] / "special_tokens_map.json").unlink()


@mutant("ML226", says="ends with")
def template_without_eos(artifact: Artifact) -> None:
    """The template does not close an answer."""
    artifact["template"] = artifact["template"].replace("eos_token", "'' ")


@mutant("ML226 ML227", "I03", says="encoding a rendered text adds")
def two_bos_in_the_template(artifact: Artifact) -> None:
    """The template writes BOS twice, and the tokenizer a third."""
    artifact["template"] = "{{- bos_token }}" + artifact["template"]
    artifact["tokenizer_json"]["post_processor"] = artifact["bos_post_processor"]


@mutant("ML227", "I03", says="encoding a rendered text adds 1 tokens")
def bos_again_by_the_tokenizer(artifact: Artifact) -> None:
    """The tokenizer puts BOS before every text, rendered conversations too."""
    artifact["tokenizer_json"]["post_processor"] = artifact["bos_post_processor"]


def _padding(**values: Any) -> dict[str, Any]:
    pad = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 11, "pad_type_id": 0, "pad_token": "<pad>"}
    return {"strategy": "BatchLongest", **pad, **values}


def _truncation(max_length: int) -> dict[str, Any]:
    return {"direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": 0}


@mutant("ML231", "N35", says="cut at 512 tokens")
def truncation_is_saved(artifact: Artifact) -> None:
    """The truncation of a training run is saved."""
    artifact["tokenizer_json"]["truncation"] = _truncation(512)


@mutant("ML231", "N35", says="cut at 8 tokens")
def short_truncation_is_saved(artifact: Artifact) -> None:
    """A truncation that cuts even the probes is saved, and is the only fault."""
    artifact["tokenizer_json"]["truncation"] = _truncation(8)


@mutant("ML231", "N35", says="cut at 32768 tokens")
def long_truncation_is_saved(artifact: Artifact) -> None:
    """A truncation that no test prompt reaches is saved."""
    artifact["tokenizer_json"]["truncation"] = _truncation(32768)


@mutant("ML231", "N35", says="padded to {'Fixed': 512}")
def fixed_padding_is_saved(artifact: Artifact) -> None:
    """Every text is padded to one length."""
    artifact["tokenizer_json"]["padding"] = _padding(strategy={"Fixed": 512})


@mutant("ML231", "N35", says="padded to a multiple of 8")
def padding_to_a_multiple_is_saved(artifact: Artifact) -> None:
    """Every text is padded to a multiple."""
    artifact["tokenizer_json"]["padding"] = _padding(pad_to_multiple_of=8)


@mutant("ML231 ML232", "N35")
def truncation_and_padding_are_saved(artifact: Artifact) -> None:
    """A batch of a training run left both settings in the file."""
    artifact["tokenizer_json"] |= {"truncation": _truncation(2048), "padding": _padding()}


@mutant("ML232", "N35", says="longest text of a batch")
def padding_of_batches_is_saved(artifact: Artifact) -> None:
    """The padding of batches is saved."""
    artifact["tokenizer_json"]["padding"] = _padding()


@mutant("ML233", says="there is no chat template")
def template_is_not_copied(artifact: Artifact) -> None:
    """The tokenizer is copied without its template."""
    (artifact["folder"] / "chat_template.jinja").unlink()


# Folders as transformers and trainers save them, without Mistral's own file


@mutant("ML229", "N70", says="which is the closest one")
def unknown_vocabulary(artifact: Artifact) -> None:
    """No tokenizer that is known has the vocabulary."""
    (artifact["folder"] / "tekken.json").unlink()


@mutant("ML230", says="of 32,768 ids are the same")
def another_family_is_named(artifact: Artifact) -> None:
    """The oracle that is named is a SentencePiece one."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = "spm-v3"


@mutant("ML230", says="but id 1500 is")
def a_named_oracle_has_another_token(artifact: Artifact) -> None:
    """The oracle that is named fits but for two tokens."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    vocabulary = artifact["tokenizer_json"]["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[1500]], vocabulary[by_id[1501]] = 1501, 1500


@mutant("ML230", "N70", says="gets the ids")
def a_named_oracle_gives_other_ids(artifact: Artifact) -> None:
    """The oracle that is named has the vocabulary, and a normalizer changes the ids."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    artifact["tokenizer_json"]["normalizer"] = {"type": "Lowercase"}


@mutant("ML226", "N70", says="ends with")
def template_without_eos_and_a_named_oracle(artifact: Artifact) -> None:
    """A folder without Mistral's own file is judged by the oracle that is named."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = str(artifact["own_tekken"])
    artifact["template"] = artifact["template"].replace("{{- eos_token }}", "")


@mutant("ML226", says="ends with")
def template_without_eos_beside_tekken_alone(artifact: Artifact) -> None:
    """The folder has a template and Mistral's own file, and nothing that transformers loads as it is."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (artifact["folder"] / name).unlink()
    template = artifact["template"].replace("{{- eos_token }}", "")
    (artifact["folder"] / "chat_template.jinja").write_text(template)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _chatml(artifact: Artifact, template: str = CHATML) -> None:
    """Give the folder a layout of its own, and declare that no Mistral tokenizer applies."""
    (artifact["folder"] / "tekken.json").unlink()
    artifact["oracle"] = "none"
    artifact["template"] = template


@mutant("ML226", "N32", says="is followed by '<|im_end|>")
def chatml_without_its_tokens(artifact: Artifact) -> None:
    """ChatML is written with a tokenizer that has no such tokens, and EOS is another one."""
    _chatml(artifact)


@mutant("ML226", "N32", says="is followed by ''")
def own_layout_without_an_end(artifact: Artifact) -> None:
    """A layout of its own closes no answer."""
    _chatml(artifact, CHATML.replace("<|im_end|>\n", ""))


@mutant("ML226 ML234", says="the prompt of a question ends with")
def prompt_of_another_layout(artifact: Artifact) -> None:
    """The prompt opens the answer in another way than the conversation does."""
    _chatml(artifact, CHATML.replace("<|im_start|>assistant", "<|assistant|>"))


@mutant("ML234")
def heading_in_the_prompt_alone(artifact: Artifact) -> None:
    """The generation prompt has a heading that no answer has."""
    artifact["template"] += "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def chatml_derivative(folder: Path) -> None:
    """Make the folder a ChatML derivative: tokens of its own, EOS among them, and its own template."""
    fast = AutoTokenizer.from_pretrained(folder, **({"mistral_format": False} if VERSION_5 else {}))
    fast.add_special_tokens({"additional_special_tokens": [*CHATML_TOKENS]})
    fast.eos_token = CHATML_TOKENS[1]
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    for name in ("config.json", "generation_config.json"):
        _rewrite(folder / name, lambda config: config.update(eos_token_id=fast.eos_token_id))
    _rewrite(folder / "config.json", lambda config: config.update(vocab_size=len(fast)))


def thinking_folder(folder: Path) -> str:
    """Make the folder one of version 11, as transformers saves it, and return the template that is generated for it."""

    def newer(tekken: dict[str, Any]) -> None:
        tekken["config"]["version"] = "v11"
        named = [*derived_oracle("derived-v11", words=0).control_tokens.values()][:34]
        tekken["special_tokens"] = [
            {"rank": rank, "token_str": literal, "is_control": True} for rank, literal in enumerate(named)
        ]

    _rewrite(folder / "tekken.json", newer)
    converted = CheckpointTokenizer(folder / "tekken.json")
    converted.fast.save_pretrained(folder)
    _rewrite(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder", None))
    return converted.oracle.chat_template()


@mutant("ML202 ML203 ML214 ML217 ML226 ML235", "N32", says="renders '<|im_start|>user")
def chatml_with_tekken_left_in(artifact: Artifact) -> None:
    """A ChatML derivative keeps Mistral's own file, which AutoTokenizer takes."""
    chatml_derivative(artifact["folder"])


@mutant("ML234 ML235", says="in its place")
def own_layout_beside_tekken(artifact: Artifact) -> None:
    """A layout of its own, of Mistral's tokens alone, stands beside Mistral's file."""
    artifact["template"] = "{{- bos_token }}" + CHATML + "{{- eos_token }}"


@mutant("ML236", says="has generation blocks")
def training_template_beside_tekken(artifact: Artifact) -> None:
    """The training template is put into a folder with tekken.json."""
    artifact["template"] = training_template(artifact["folder"])


@mutant("ML237", says="as <think> text")
def guessed_thinking(artifact: Artifact) -> None:
    """A model of version 11 has the template that is generated for it, which thinks."""
    thinking_folder(artifact["folder"])
