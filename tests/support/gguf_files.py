"""GGUF files as llama.cpp's converter writes them of our tiny models: with the package `gguf`, in a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.recognition import spm_pieces

NORMAL, UNKNOWN, CONTROL, BYTE = (
    int(getattr(gguf.TokenType, name)) for name in ("NORMAL", "UNKNOWN", "CONTROL", "BYTE")
)
_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_NAMES = {
    **{f"self_attn.{own}": name for own, name in _ATTENTION.items()},
    **{f"mlp.{own}_proj": f"ffn_{own}" for own in ("gate", "up", "down")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(_OTHERS)}


def byte_level(token: bytes) -> str:
    """Return a token in the letters of GPT-2's byte-level BPE, as a GGUF file of Tekken has it."""
    return "".join(_LETTERS[byte] for byte in token)


def tokenizer_fields(oracle: Oracle) -> dict[str, Any]:
    """Return the fields of a tokenizer that serves its ids: those of a sound conversion."""
    ids = {"bos_token_id": oracle.bos_id, "eos_token_id": oracle.eos_id, "unknown_token_id": oracle.unk_id}
    types = [CONTROL if number in oracle.control_tokens else NORMAL for number in range(oracle.vocab_size)]
    types[oracle.unk_id] = UNKNOWN if oracle.kind == "spm" else CONTROL
    if oracle.kind == "spm":
        pieces = spm_pieces(oracle.path)
        types = [
            BYTE if len(piece) == 6 and piece.startswith("<0x") else types[number]
            for number, (piece, _) in enumerate(pieces)
        ]
        fields = {
            "model": "llama",
            "pre": "default",
            "tokens": [piece for piece, _ in pieces],
            "scores": [score for _, score in pieces],
            "add_space_prefix": False,
        }
    else:
        letters = [
            oracle.piece(number) if number in oracle.control_tokens else byte_level(token)
            for number, token in enumerate(oracle.vocabulary)
        ]
        fields = {"model": "gpt2", "pre": "tekken", "tokens": letters, "merges": merges(oracle)}
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, "token_type": types, **ids}.items()}


def merges(oracle: Oracle) -> list[str]:
    """Return the merges of a Tekken vocabulary: each token of two tokens that have lower ids."""
    ranks = {token: number for number, token in enumerate(oracle.vocabulary) if number not in oracle.control_tokens}
    found = []
    for token in sorted(ranks, key=lambda one: ranks[one]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        for left, right in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            found.append(f"{byte_level(left)} {byte_level(right)}")
    return found


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows in the order of llama.cpp's rotary embedding: the halves of each head, interleaved."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """Return the name of a tensor of a Mistral checkpoint in a GGUF file."""
    stem, _, end = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{end}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{end}"


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the architecture from a `config.json`."""
    rope = config.get("rope_parameters") or {}
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config.get("rope_theta") or rope["rope_theta"]),
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    return {"general.type": "model", **{f"llama.{key}": value for key, value in fields.items()}}


def model_tensors(
    weights: Mapping[str, np.ndarray[Any, Any]], config: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of a Mistral checkpoint as a GGUF file has them, in float32."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, weight in weights.items():
        count = next((count for part, count in heads.items() if name.endswith(f"{part}.weight")), 0)
        found[gguf_name(name)] = permuted(weight, count) if count else weight
    return found


def write_gguf(
    file: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a GGUF file of the architecture `llama`; vectors stay in float32.

    Args:
        file: The file.
        fields: Its metadata; None leaves a field out.
        tensors: Its tensors, in float32.
        kind: How matrices are stored.
    """
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if kind != gguf.GGMLQuantizationType.F32 and tensor.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an adapter from its `adapter_config.json`."""
    return {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(config["lora_alpha"])}


def adapter_tensors(
    weights: Mapping[str, np.ndarray[Any, Any]], config: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the tensors of an adapter as a GGUF file has them, in float32.

    Args:
        weights: Those of `adapter_model.safetensors`.
        config: The `config.json` of its base.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, weight in weights.items():
        layer, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        count = next((count for part, count in heads.items() if layer.endswith(part) and side == "B"), 0)
        found[f"{gguf_name(f'{layer}.weight')}.lora_{side.lower()}"] = permuted(weight, count) if count else weight
    return found
