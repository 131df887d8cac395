"""Merged models whose files, names or shapes are not a whole model."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch
from bench_merged import EMBEDDINGS, HEAD, K1, Q1, plain_merge
from gallery import Artifact, mutant
from safetensors.torch import load_file, save_file
from trained import WEIGHTS


@mutant("ML413", says="the file is the base's, and a server")
def consolidated_file_of_the_base(artifact: Artifact) -> None:
    """The merge was written into a copy of the base's folder, in which Mistral's own file is the base's still."""
    for one in ("folder", "base"):
        save_file(artifact["before"], artifact[one] / "consolidated.safetensors")


def write_consolidated(artifact: Artifact, numbers: str, dtype: torch.dtype | None = None, **changed: Any) -> None:
    """Write the tensors under `numbers` in Mistral's own format, as Mistral converts them.

    Args:
        artifact: The bench's artifact.
        numbers: `tensors` for the merged model's, `before` for the base's.
        dtype: Their precision; None for that of the model.
        changed: Tensors to put in place of those of the format.
    """
    config, found = artifact["config"], {}
    for name, tensor in artifact[numbers].items():
        parts = name.removeprefix("model.").split(".")
        plain = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}.get(parts[0])
        if plain is None:
            inner = ".".join(parts[2:-1])
            plain = f"layers.{parts[1]}.{MISTRAL_NAMES[inner]}"
            if inner in HEADS:
                heads = config[HEADS[inner]]
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        found[f"{plain}.weight"] = tensor.to(dtype or tensor.dtype).contiguous().clone()
    save_file({**found, **changed}, artifact["folder"] / "consolidated.safetensors")


MISTRAL_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


@mutant("ML443", "N203", says="is not model.layers.")
def consolidated_weights_of_the_base(artifact: Artifact) -> None:
    """Mistral's own file has the base's numbers."""
    write_consolidated(artifact, "before")


@mutant("ML443", "N203", says="is not model.layers.")
def consolidated_weights_of_the_base_in_another_precision(artifact: Artifact) -> None:
    """Mistral's own file has the base's numbers, and another precision than the merged model."""
    write_consolidated(artifact, "before", dtype=torch.float32)


@mutant("ML443", "N203", says="has shape (1,)")
def consolidated_weights_of_another_size(artifact: Artifact) -> None:
    """A tensor in Mistral's own file has another shape."""
    write_consolidated(artifact, "tensors", **{"layers.0.attention.wo.weight": torch.ones(1)})


@mutant("ML412", says="model.embed_tokens.weight of the base is missing")
def names_of_another_library(artifact: Artifact) -> None:
    """The names have another prefix, so that no layer can be compared with the base's."""
    artifact["tensors"] = {
        name.replace("model.", "transformer."): tensor for name, tensor in artifact["tensors"].items()
    }


@mutant("ML402", "I46", says=f"{Q1} is not finite")
def weight_not_finite(artifact: Artifact) -> None:
    """A merged weight has a NaN."""
    artifact["tensors"][Q1][3, 5] = torch.nan


@mutant("ML402", "I46", says=f"{EMBEDDINGS} is not finite")
def embedding_infinite(artifact: Artifact) -> None:
    """A number of the embeddings is infinite."""
    artifact["tensors"][EMBEDDINGS][7, 0] = torch.inf


@mutant("ML405", "I16", says="cut off")
def weights_cut_off(artifact: Artifact) -> None:
    """The copy of the weights ended early."""
    file = artifact["folder"] / WEIGHTS
    data = file.read_bytes()[:-100]
    file.unlink()
    file.write_bytes(data)


@mutant("ML405", says="of 2 shards")
def shards_without_an_index(artifact: Artifact) -> None:
    """The index of a sharded model was not copied."""
    shard(artifact)


@mutant("ML405", says="model-00001-of-00002.safetensors")
def index_of_other_shards(artifact: Artifact) -> None:
    """The index names another shard for a tensor than the one that holds it."""
    index = shard(artifact)
    index["weight_map"][Q1] = "model-00003-of-00003.safetensors"
    (artifact["folder"] / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shard(artifact: Artifact) -> dict[str, dict[str, str]]:
    """Write the weights as two shards, and return their index."""
    folder, names = artifact["folder"], sorted(artifact["tensors"])
    (folder / WEIGHTS).unlink()
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: artifact["tensors"][name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    # the bench writes the tensors only if they differ from those of the merge
    return {"weight_map": where}


@mutant("ML412", says=f"{K1} of the base is missing")
def tensor_missing(artifact: Artifact) -> None:
    """A tensor of the base was not saved."""
    del artifact["tensors"][K1]


@mutant("ML412", says="q_proj.base_layer.weight is not in the base")
def saved_without_unload(artifact: Artifact) -> None:
    """The model was saved with PEFT's wrappers in its names."""
    artifact["tensors"][Q1.replace(".weight", ".base_layer.weight")] = artifact["tensors"].pop(Q1)


@mutant("ML412 ML435", "I38", says="lm_head.weight has shape")
def head_resized(artifact: Artifact) -> None:
    """The head has more rows than the configuration's vocabulary."""
    artifact["tensors"][HEAD] = torch.cat([artifact["tensors"][HEAD], artifact["tensors"][HEAD][:2]])


@mutant("ML418", "I61", says="once more")
def adapter_left_beside(artifact: Artifact) -> None:
    """The folder has a manifest of a merged model, and the adapter, which transformers puts on it again."""
    from trained import trained

    # a folder with both is taken for a merged model by its manifest alone
    for file in artifact["folder"].iterdir():
        file.unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained().adapter / name, artifact["folder"] / name)
    for file in trained().merged.iterdir():
        if file.is_file():
            shutil.copy(file, artifact["folder"] / file.name)
    artifact["base"] = trained().base
    artifact["config"] = json.loads((artifact["folder"] / "config.json").read_text())
    artifact["tokenizer_config"] = json.loads((artifact["folder"] / "tokenizer_config.json").read_text())
    artifact["tensors"] = load_file(plain_merge() / "merged" / WEIGHTS)


@mutant("ML421", "I15", says="quantised")
def quantised(artifact: Artifact) -> None:
    """The adapter was merged into quantised weights."""
    artifact["config"]["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@mutant("ML405", "N40", says="holds no tensor")
def no_tensor_at_all(artifact: Artifact) -> None:
    """The weights were not gathered before the save."""
    artifact["tensors"] = {}


@mutant("ML437", says="BF16")
def saved_in_another_dtype(artifact: Artifact) -> None:
    """The merged model was saved in float32."""
    artifact["tensors"] = {name: tensor.float() for name, tensor in artifact["tensors"].items()}
