"""GGUF files with other weights, sizes or bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_gguf import small_change
from gallery import Artifact, mutant


def as_transformers(rows: Any, heads: int) -> Any:
    """Return rows in llama.cpp's order in that of transformers."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@mutant("ML914", says="a scale of")
def another_alpha(artifact: Artifact) -> None:
    """The adapter is twice as strong."""
    artifact["adapter_fields"]["adapter.lora.alpha"] *= 2


@mutant("ML914", says="alpha is missing")
def no_alpha(artifact: Artifact) -> None:
    """The file has no alpha."""
    artifact["adapter_fields"]["adapter.lora.alpha"] = None


@mutant("ML914", says="alpha is '16'")
def alpha_that_is_a_text(artifact: Artifact) -> None:
    """The file has alpha as a text."""
    artifact["adapter_fields"]["adapter.lora.alpha"] = "16"


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


def stretch(artifact: Artifact, factor: float, **more: float) -> None:
    """Give the checkpoint a rotary embedding of YaRN with the factor 4 and `more`, and the file one with a factor."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e6} | more
    file = artifact["folder"] / "merged" / "config.json"
    file.write_text(json.dumps({**artifact["config"], "rope_parameters": rope}))
    fields = {"type": "yarn", "factor": factor, "original_context_length": 1024}
    artifact["fields"] |= {f"llama.rope.scaling.{key}": value for key, value in fields.items()}


@mutant("ML917", "N200", "N201", says="yarn_log_multiplier is 1: cosine and sine are multiplied by 1")
def another_attention_factor(artifact: Artifact) -> None:
    """The file has the mscale_all_dim of another release, with which readers do not multiply cosine and sine."""
    stretch(artifact, factor=4.0)
    artifact["fields"]["llama.rope.scaling.yarn_log_multiplier"] = 1.0


@mutant("ML917", "N202", says="attention.temperature_scale is missing")
def queries_are_not_scaled(artifact: Artifact) -> None:
    """The file lost the scaling of queries by their position."""
    stretch(artifact, factor=4.0, llama_4_scaling_beta=0.1)


@mutant("ML917", says="llama.rope.scaling.type is 'yarn'")
def scaling_that_the_model_does_not_have(artifact: Artifact) -> None:
    """The file stretches the rotary embedding, and the checkpoint does not."""
    stretch(artifact, factor=4.0)
    (artifact["folder"] / "merged" / "config.json").write_text(json.dumps(artifact["config"]))


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


@mutant("ML916 ML918", says="holds no tensor")
def no_tensor(artifact: Artifact) -> None:
    """The file has its fields, and no tensor."""
    artifact["tensors"] = {}


@mutant("ML914", says="blk.0.attn_v.weight.lora_a has shape")
def adapter_of_another_rank(artifact: Artifact) -> None:
    """A matrix of the adapter has another rank."""
    name = "blk.0.attn_v.weight.lora_a"
    artifact["adapter_tensors"][name] = artifact["adapter_tensors"][name][:2]


@mutant("ML916", says="output_norm.bias is not in")
def one_tensor_too_many(artifact: Artifact) -> None:
    """The file has a tensor that the model does not have."""
    artifact["tensors"] = {**artifact["tensors"], "output_norm.bias": np.zeros(32, dtype=np.float32)}


@mutant("ML916", says="blk.0.attn_v.weight has shape")
def matrix_of_another_shape(artifact: Artifact) -> None:
    """A matrix has fewer rows than the model's."""
    name = "blk.0.attn_v.weight"
    artifact["tensors"] = {**artifact["tensors"], name: artifact["tensors"][name][:8]}


def _with_entry(data: bytes, name: bytes, change: Callable[[int, tuple[int, ...]], bytes]) -> bytes:
    """Return a file whose entry of a tensor is another: `change` gets its type and its dimensions."""
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (count,) = struct.unpack_from("<I", data, at)
    dimensions = struct.unpack_from(f"<{count}Q", data, at + 4)
    (kind,) = struct.unpack_from("<I", data, at + 4 + 8 * count)
    return data[:at] + change(kind, dimensions) + data[at + 8 + 8 * count :]


@mutant("ML918", says="'output_norm.weight' of 0 dimensions")
def tensor_of_no_dimensions(artifact: Artifact) -> None:
    """A tensor has no dimensions: it is one number, in a place of many."""
    artifact["bytes"] = lambda data: _with_entry(
        data, b"output_norm.weight", lambda kind, shape: struct.pack("<II", 0, kind)
    )


@mutant("ML918", says="'output_norm.weight' of type 99")
def tensor_of_an_unknown_type(artifact: Artifact) -> None:
    """A tensor has a type that ggml does not have."""
    artifact["bytes"] = lambda data: _with_entry(
        data, b"output_norm.weight", lambda kind, shape: struct.pack(f"<I{len(shape)}QI", len(shape), *shape, 99)
    )
