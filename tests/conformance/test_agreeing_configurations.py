"""Each fact of a model's configuration, planted in one of its three files: the check of each pair names it.

The files are those of a Ministral 3: `config.json`, Mistral's own `params.json`, and a GGUF file as converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import model_fields, model_tensors, write_gguf
from ministral_3 import ROPE
from safetensors.numpy import load_file
from small_mistral import write_small_mistral

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.gguf.weights import ComparedWeights, architecture_findings
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.configurations import configurations_agree
from pytest_mistral_lora.records.gguf_file import GgufFile

Data = dict[str, Any]
CONFIG: Data = {
    "model_type": "ministral3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32768,
    "sliding_window": 8192,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
}
PARAMS: Data = {
    "n_layers": 2,
    "dim": 64,
    "hidden_dim": 128,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "norm_eps": 1e-05,
    "vocab_size": 32768,
    "tied_embeddings": False,
    "sliding_window": 8192,
    "rope_theta": 1e6,
    "yarn": {
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta": 32.0,
        "alpha": 1.0,
        "apply_scale": False,
    },
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16384},
}
GGUF: Data = {
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-05,
    "vocab_size": 32768,
    "rope.freq_base": 1e6,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 16384,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 1.0,
    "attention.temperature_scale": 0.1,
    "attention.temperature_length": 16384,
    "attention.sliding_window": 8192,
}


@dataclass(frozen=True)
class Planted:
    """Another value of one fact, in each file that states it.

    Attributes:
        config: The keys of `config.json` with their other values; `rope.` stands before those of the rotary embedding.
        params: The same of `params.json`, with dots within.
        gguf: The same of the GGUF file.
        says: A part of each finding, by the file that it is found in; the last key of the file if it is missing.
    """

    config: Data = field(default_factory=dict)
    params: Data = field(default_factory=dict)
    gguf: Data = field(default_factory=dict)
    says: Mapping[str, str] = field(default_factory=dict)


FACTS = {
    "theta": Planted({"rope.rope_theta": 1e4}, {"rope_theta": 1e4}, {"rope.freq_base": 1e4}),
    "type": Planted(
        {"rope.rope_type": "linear"}, {"yarn": None}, {"rope.scaling.type": "linear"}, {"params": "yarn is missing"}
    ),
    "factor": Planted({"rope.factor": 8.0}, {"yarn.factor": 8.0}, {"rope.scaling.factor": 8.0}),
    "original length": Planted(
        {"rope.original_max_position_embeddings": 8192},
        {"yarn.original_max_position_embeddings": 8192},
        {"rope.scaling.original_context_length": 8192},
    ),
    # three spellings of the number by which cosine and sine are multiplied
    "mscale": Planted({"rope.mscale": 0.5}, says={"config": "mscale_all_dim is 1 beside mscale 0.5"}),
    "mscale_all_dim": Planted({"rope.mscale_all_dim": 0.0}, gguf={"rope.scaling.yarn_log_multiplier": 0.0}),
    "apply_scale": Planted(params={"yarn.apply_scale": True}),
    "llama_4_scaling_beta": Planted(
        {"rope.llama_4_scaling_beta": 0.2}, {"llama_4_scaling.beta": 0.2}, {"attention.temperature_scale": 0.2}
    ),
    "length of llama_4_scaling": Planted(
        params={"llama_4_scaling.original_max_position_embeddings": 8192}, gguf={"attention.temperature_length": 8192}
    ),
    "heads": Planted({"num_attention_heads": 2}, {"n_heads": 2}, {"attention.head_count": 2}),
    "heads of keys": Planted({"num_key_value_heads": 1}, {"n_kv_heads": 1}, {"attention.head_count_kv": 1}),
    "width of heads": Planted({"head_dim": 32}, {"head_dim": 32}, {"attention.key_length": 32}),
    "sliding window": Planted({"sliding_window": 4096}, {"sliding_window": 4096}, {"attention.sliding_window": 4096}),
    # readers of params.json take none for a missing one
    "no window": Planted(params={"sliding_window": None}, says={"params": "sliding_window is missing"}),
    "vocabulary": Planted({"vocab_size": 32000}, {"vocab_size": 32000}, {"vocab_size": 32000}),
    # of a GGUF file the numbers of the head are compared: see the last test
    "tied head": Planted({"tie_word_embeddings": True}, {"tied_embeddings": True}),
}
"""The facts that the three files share, each with another value to plant."""


def changed(data: Data, change: Data) -> Data:
    """Return a file's data with other values; None as a value leaves the key out."""
    found: Data = json.loads(json.dumps(data))
    for path, value in change.items():
        # the keys of a GGUF file have dots
        keys = [path] if path in data else path.replace("rope.", "rope_parameters.", 1).split(".")
        *parents, name = keys
        part = found
        for parent in parents:
            part = part[parent]
        part[name] = value
        if value is None:
            del part[name]
    return found


def written(folder: Path, config: Data | None, params: Data | None, gguf: Data) -> Path:
    """Write the files of a model, with its tokenizer, and return the GGUF file."""
    folder.mkdir()
    (folder / "tokenizer.model.v3").symlink_to(shipped_tokenizer("spm-v3"))
    for name, data in (("config.json", config), ("params.json", params)):
        if data is not None:
            (folder / name).write_text(json.dumps(data))
    fields = {f"llama.{key}": value for key, value in gguf.items()}
    return write_gguf(folder / "model.gguf", fields, {"output_norm.weight": np.ones(64, dtype=np.float32)})


def found_in_folder(folder: Path) -> list[str]:
    return [f"{one.rule} {one.found}" for one in configurations_agree(Target("own", folder))]


def found_in_file(file: Path) -> list[str]:
    return [f"{one.rule} {one.found}" for one in architecture_findings(GgufFile(file), BaseFolder(file.parent))]


def test_three_files_of_one_model_agree(tmp_path: Path) -> None:
    file = written(tmp_path / "both", CONFIG, PARAMS, GGUF)
    assert found_in_folder(file.parent) == found_in_file(file) == []
    # a folder in Mistral's format alone
    assert found_in_file(written(tmp_path / "params", None, PARAMS, GGUF)) == []


PLACES = [(name, place) for name, one in FACTS.items() for place in ("config", "params", "gguf") if getattr(one, place)]


@pytest.mark.parametrize(("name", "place"), PLACES, ids=[f"{name} in {place}" for name, place in PLACES])
def test_another_value_of_one_file_is_found_beside_each_other_file(name: str, place: str, tmp_path: Path) -> None:
    planted, files = FACTS[name], {"config": CONFIG, "params": PARAMS, "gguf": GGUF}
    files[place] = changed(files[place], getattr(planted, place))
    own = [*getattr(planted, place)][-1].rpartition(".")[2]
    file = written(tmp_path / "both", files["config"], files["params"], files["gguf"])
    in_folder, in_file = found_in_folder(file.parent), found_in_file(file)
    alone = found_in_file(written(tmp_path / "params", None, files["params"], files["gguf"]))
    by_pair = {("config", "params"): in_folder, ("config", "gguf"): in_file, ("params", "gguf"): alone}
    for pair, findings in by_pair.items():
        is_asked = place in pair and not (name == "tied head" and "gguf" in pair)
        rule = "ML917" if "gguf" in pair else "ML243"
        assert bool(findings) is is_asked, (pair, findings)
        assert all(one.startswith(rule) for one in findings), (pair, findings)
        # each finding names the key of the file that it is found in
        if pair[1] == place:
            assert any(planted.says.get(place, own) in one for one in findings), (pair, findings)


def test_a_head_of_its_own_in_the_file_of_a_tied_model_is_found(tmp_path: Path) -> None:
    base = write_small_mistral(tmp_path / "base", tie_word_embeddings=True, head_dim=8)
    config = json.loads((base / "config.json").read_text())
    weights = load_file(base / "model.safetensors")
    tensors = model_tensors(weights, config)
    assert "output.weight" not in tensors
    for head, expected in ((tensors["token_embd.weight"], []), (-tensors["token_embd.weight"], ["output.weight"])):
        file = write_gguf(tmp_path / "tied.gguf", model_fields(config), {**tensors, "output.weight": head})
        found = list(ComparedWeights(GgufFile(file), BaseFolder(base), None).findings())
        assert [(one.rule, one.found.partition(" ")[0]) for one in found] == [("ML916", name) for name in expected]
