"""GGUF files of a merged model and of its adapter, sound and broken on purpose."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from bench_merged import plain_merge
from gallery import Artifact, mutant
from gguf_files import (
    NORMAL,
    adapter_fields,
    adapter_tensors,
    model_fields,
    model_tensors,
    tokenizer_fields,
    write_gguf,
)
from safetensors.torch import load_file, save_file
from trained import WEIGHTS, copied

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Settings, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import GgufTarget

FIELD = "tokenizer.ggml."


@cache
def oracle(name: str = "spm-v3") -> Oracle:
    return Oracle(shipped_tokenizer(name))


@cache
def tokenizer(name: str = "spm-v3") -> dict[str, Any]:
    return {**tokenizer_fields(oracle(name)), "tokenizer.chat_template": oracle(name).chat_template()}


def numbers(folder: Path, name: str = WEIGHTS) -> dict[str, Any]:
    """Return the tensors of a safetensors file in float32."""
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / name).items()}


class GgufBench:
    """Makes the GGUF files of a merged model and of its adapter, and judges them."""

    subject = "gguf"

    def make(self, folder: Path) -> Artifact:
        """Copy base, adapter and merged model below a folder, with what a converter writes of them."""
        source = plain_merge()
        for name in ("base", "lora", "merged"):
            copied(source / name, folder / name)
        config = json.loads((folder / "merged" / "config.json").read_text())
        lora = json.loads((folder / "lora" / "adapter_config.json").read_text())
        return {
            "folder": folder,
            "config": config,
            "fields": {**model_fields(config), **tokenizer()},
            "tensors": model_tensors(numbers(folder / "merged"), config),
            "before": model_tensors(numbers(folder / "base"), config),
            "kind": "F32",
            "compared": True,
            "adapter_config": lora,
            "adapter_fields": adapter_fields(lora),
            "adapter_tensors": adapter_tensors(numbers(folder / "lora", "adapter_model.safetensors"), config),
            "bytes": lambda data: data,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Write both files, and run every check of the subject on them."""
        folder = artifact["folder"]
        kind = gguf.GGMLQuantizationType[artifact["kind"]]
        model = write_gguf(folder / "merged.gguf", artifact["fields"], artifact["tensors"], kind=kind)
        model.write_bytes(artifact["bytes"](model.read_bytes()))
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(artifact["adapter_config"]))
        adapter = write_gguf(folder / "lora.gguf", artifact["adapter_fields"], artifact["adapter_tensors"])
        folders = (folder / "lora", folder / "merged")
        targets = [GgufTarget(one.name, one, base=folder / "base", folders=folders) for one in (model, adapter)]
        if not artifact["compared"]:
            targets = [GgufTarget(model.name, model)]
        settings = Settings(20, None, "cpu", True, (), False, folder)
        return [finding for check in collect(targets, settings) for finding in check.run().findings]


BENCH = GgufBench()


def setting(artifact: Artifact, name: str, value: Any) -> None:
    """Change a field of the tokenizer; None leaves it out."""
    artifact["fields"] = {**artifact["fields"], FIELD + name: value}


def changed(artifact: Artifact, name: str, number: int, value: Any) -> None:
    """Change an entry of a list of the tokenizer."""
    values = list(artifact["fields"][FIELD + name])
    values[number] = value
    setting(artifact, name, values)


def swapped(artifact: Artifact, name: str, first: int, second: int) -> None:
    values = list(artifact["fields"][FIELD + name])
    values[first], values[second] = values[second], values[first]
    setting(artifact, name, values)


def take_tekken(artifact: Artifact) -> None:
    """Put a Tekken tokenizer in place of SentencePiece's: the vocabulary is no longer the folder's."""
    plain = {key: value for key, value in artifact["fields"].items() if not key.startswith(FIELD)}
    artifact["fields"] = {**plain, **tokenizer("tekken-240718")}


def as_transformers(rows: Any, heads: int) -> Any:
    """Return rows in llama.cpp's order in that of transformers."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def small_change(artifact: Artifact) -> None:
    """Merge a hundredth of the adapter, and store all numbers in 8 bits, whose error is as large as the change."""
    folder, config = artifact["folder"], artifact["config"]
    before, after = (load_file(folder / name / WEIGHTS) for name in ("base", "merged"))
    merged = {name: before[name].float() + 0.01 * (one.float() - before[name].float()) for name, one in after.items()}
    (folder / "merged" / WEIGHTS).unlink()
    save_file(merged, folder / "merged" / WEIGHTS)
    artifact["tensors"] = model_tensors({name: one.numpy() for name, one in merged.items()}, config)
    artifact["kind"] = "Q8_0"


@mutant("ML912", "N90", says="a second space")
def no_space_setting(artifact: Artifact) -> None:
    """tokenizer_config.json had no add_prefix_space: the converter leaves the field out, and the default is true."""
    setting(artifact, "add_space_prefix", None)


@mutant("ML912", "N90")
def space_prefix(artifact: Artifact) -> None:
    """add_space_prefix is true."""
    setting(artifact, "add_space_prefix", True)


@mutant("ML912", "N91", says="scores are wrong")
def no_scores(artifact: Artifact) -> None:
    """The folder had no tokenizer.model: every score is -1000, and every control token from id 3 on is text."""
    size = oracle().vocab_size
    setting(artifact, "scores", [-1000.0] * size)
    types = list(artifact["fields"][FIELD + "token_type"])
    setting(artifact, "token_type", [types[n] if n < 3 or types[n] == 6 else NORMAL for n in range(size)])


@mutant("ML912", says="scores are wrong, the first is that of")
def two_scores_swapped(artifact: Artifact) -> None:
    """Two pieces have each other's score."""
    swapped(artifact, "scores", 1500, 1600)


@mutant("ML912")
def scores_left_out(artifact: Artifact) -> None:
    """There are no scores at all."""
    setting(artifact, "scores", None)


@mutant("ML912", says="ids stand for other bytes")
def two_tokens_swapped(artifact: Artifact) -> None:
    """Two pieces have each other's id."""
    swapped(artifact, "tokens", 1500, 1600)


@mutant("ML912", says="(id 3): user defined")
def marker_is_user_defined(artifact: Artifact) -> None:
    """[INST] is a user defined token: a text that spells it becomes the marker."""
    changed(artifact, "token_type", 3, 4)


@mutant("ML912", says="have a wrong type")
def word_is_control(artifact: Artifact) -> None:
    """A word is a control token, which no text becomes."""
    changed(artifact, "token_type", 1500, 3)


@mutant("ML912", says="have a wrong type")
def byte_is_text(artifact: Artifact) -> None:
    """The token of a byte is text."""
    changed(artifact, "token_type", 900, NORMAL)


@mutant("ML912")
def no_types(artifact: Artifact) -> None:
    """There are no token types."""
    setting(artifact, "token_type", None)


@mutant("ML912", says="eos_token_id is 0")
def eos_is_unk(artifact: Artifact) -> None:
    """EOS is <unk>: no answer ends."""
    setting(artifact, "eos_token_id", 0)


@mutant("ML912", says="add_bos_token is false")
def no_bos(artifact: Artifact) -> None:
    """The file says not to put <s> before a prompt."""
    setting(artifact, "add_bos_token", False)


@mutant("ML912", says="add_eos_token is true")
def prompt_ends(artifact: Artifact) -> None:
    """The file says to put </s> behind a prompt."""
    setting(artifact, "add_eos_token", True)


@mutant("ML912", says="tokenizer.ggml.model is 't5'")
def unigram(artifact: Artifact) -> None:
    """The vocabulary is declared as a Unigram model's."""
    setting(artifact, "model", "t5")


@mutant("ML912", says="1 tokens more")
def one_token_more(artifact: Artifact) -> None:
    """A fine-tune added a token."""
    for name, value in (("tokens", "<|im_start|>"), ("scores", 0.0), ("token_type", 4)):
        setting(artifact, name, [*artifact["fields"][FIELD + name], value])


@mutant("ML912 ML913 ML915", says="'llama', the kind of")
def another_tokenizer_named(artifact: Artifact) -> None:
    """The file has a Tekken vocabulary, and its folder SentencePiece's."""
    take_tekken(artifact)


@mutant("ML912 ML915", says="'pixtral'")
def splitter_of_llama_3(artifact: Artifact) -> None:
    """The converter took Tekken for Pixtral, whose texts llama.cpp splits as Llama 3 does."""
    artifact["compared"] = False
    take_tekken(artifact)
    setting(artifact, "pre", "pixtral")


@mutant("ML913", "N92", says="not a template")
def name_for_a_template(artifact: Artifact) -> None:
    """The converter wrote the name of a template that llama.cpp knows."""
    artifact["fields"]["tokenizer.chat_template"] = "mistral-v3"


@mutant("ML913", says="ChatML")
def no_template(artifact: Artifact) -> None:
    """There is no template."""
    artifact["fields"]["tokenizer.chat_template"] = None


@mutant("ML913", says="differs from mistral-common")
def template_without_a_space(artifact: Artifact) -> None:
    """The template leaves the space behind [INST] out."""
    text = artifact["fields"]["tokenizer.chat_template"]
    assert "[INST] " in text
    artifact["fields"]["tokenizer.chat_template"] = text.replace("[INST] ", "[INST]")


@mutant("ML913")
def template_that_does_not_parse(artifact: Artifact) -> None:
    """The template is cut off."""
    text = artifact["fields"]["tokenizer.chat_template"]
    artifact["fields"]["tokenizer.chat_template"] = text[: len(text) // 2]


@mutant("ML914", says="a scale of")
def another_alpha(artifact: Artifact) -> None:
    """The adapter is twice as strong."""
    artifact["adapter_fields"]["adapter.lora.alpha"] *= 2


@mutant("ML914", says="alpha is missing")
def no_alpha(artifact: Artifact) -> None:
    """The file has no alpha."""
    artifact["adapter_fields"]["adapter.lora.alpha"] = None


@mutant("ML914", says="is missing")
def adapter_without_a_layer(artifact: Artifact) -> None:
    """One matrix is missing."""
    del artifact["adapter_tensors"]["blk.1.attn_q.weight.lora_a"]


@mutant("ML914", says="differs from the safetensors file")
def rows_of_q_in_another_order(artifact: Artifact) -> None:
    """The rows of a query's B are in the order of transformers."""
    name = "blk.1.attn_q.weight.lora_b"
    rows = artifact["adapter_tensors"][name]
    artifact["adapter_tensors"][name] = as_transformers(rows, 4)


@mutant("ML914", says="is not in")
def adapter_of_another_run(artifact: Artifact) -> None:
    """The file has a matrix that the adapter does not have."""
    artifact["adapter_tensors"]["blk.0.ffn_up.weight.lora_a"] = np.ones((4, 32), dtype=np.float32)


@mutant("ML916", says="0.00 of the change")
def base_in_place_of_the_merged_model(artifact: Artifact) -> None:
    """The base was converted, in 8 bits: each number is within their error."""
    small_change(artifact)
    artifact["tensors"] = artifact["before"]


@mutant("ML916", says="of its norm")
def one_matrix_damaged(artifact: Artifact) -> None:
    """A matrix is another's."""
    tensors = artifact["tensors"]
    tensors["blk.1.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"]


@mutant("ML916", says="of its norm")
def rows_of_k_in_another_order(artifact: Artifact) -> None:
    """The rows of the keys are in the order of transformers."""
    rows = artifact["tensors"]["blk.0.attn_k.weight"]
    artifact["tensors"]["blk.0.attn_k.weight"] = as_transformers(rows, 2)


@mutant("ML916", says="is missing")
def one_norm_missing(artifact: Artifact) -> None:
    """A norm is missing."""
    del artifact["tensors"]["blk.1.attn_norm.weight"]


@mutant("ML916", says="output.weight is missing")
def head_missing(artifact: Artifact) -> None:
    """The head is missing, and is not the embeddings, which llama.cpp reads in its place."""
    del artifact["tensors"]["output.weight"]


@mutant("ML916")
def not_a_number(artifact: Artifact) -> None:
    """A number is not finite."""
    artifact["tensors"]["output_norm.weight"] = artifact["tensors"]["output_norm.weight"] * np.nan


@mutant("ML917", says="rope.freq_base is 10000")
def rope_of_another_model(artifact: Artifact) -> None:
    """The base of the rotary embedding is another model's."""
    artifact["fields"]["llama.rope.freq_base"] = 10_000.0


@mutant("ML917")
def no_rope_base(artifact: Artifact) -> None:
    """The base of the rotary embedding is missing: llama.cpp takes its own."""
    artifact["fields"]["llama.rope.freq_base"] = None


@mutant("ML917")
def another_epsilon(artifact: Artifact) -> None:
    """The norms add another epsilon."""
    artifact["fields"]["llama.attention.layer_norm_rms_epsilon"] = 1e-3


@mutant("ML917", says="llama.attention.head_count is 3")
def heads_that_cannot_share_the_rows(artifact: Artifact) -> None:
    """The number of heads is no divisor of the rows."""
    artifact["fields"]["llama.attention.head_count"] = 3


@mutant("ML917", says="llama.rope.scaling.factor is 8")
def another_factor_of_yarn(artifact: Artifact) -> None:
    """The rotary embedding is stretched to another length than the model was trained with."""
    stretch(artifact, factor=8.0)


def stretch(artifact: Artifact, factor: float) -> None:
    """Give the checkpoint a rotary embedding of YaRN with the factor 4, and the file one with a factor."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6}
    file = artifact["folder"] / "merged" / "config.json"
    file.write_text(json.dumps({**artifact["config"], "rope_parameters": rope}))
    fields = {"type": "yarn", "factor": factor, "original_context_length": 1024}
    artifact["fields"] |= {f"llama.rope.scaling.{key}": value for key, value in fields.items()}


@mutant("ML917", says="embedding_length is 32")
def size_that_is_none(artifact: Artifact) -> None:
    """The checkpoint's configuration has a list for a size."""
    file = artifact["folder"] / "merged" / "config.json"
    file.write_text(json.dumps({**artifact["config"], "hidden_size": [32]}))


@mutant("ML918", says="cut off")
def cut_off(artifact: Artifact) -> None:
    """The copy of the file ended early."""
    artifact["bytes"] = lambda data: data[: len(data) // 2]


@mutant("ML918", says="begins with")
def not_a_gguf_file(artifact: Artifact) -> None:
    """The file is an answer of a server."""
    artifact["bytes"] = lambda data: b"<!doctype html>" + data


@mutant("ML918", says="cut off, or claims")
def entries_without_end(artifact: Artifact) -> None:
    """The file claims 2^60 keys."""
    artifact["bytes"] = lambda data: data[:16] + (1 << 60).to_bytes(8, "little") + data[24:]


@mutant("ML918", says="version 1")
def old_version(artifact: Artifact) -> None:
    """The file has the first version of the format."""
    artifact["bytes"] = lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:]


@mutant("ML918", says="empty")
def no_bytes(artifact: Artifact) -> None:
    """The file is empty."""
    artifact["bytes"] = lambda data: b""
