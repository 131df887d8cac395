"""Manifests beside another base, or another configuration of it."""

from __future__ import annotations

import json

import torch
from bench_manifest import COMMIT, TOKENIZER, _edit, _other_tokenizer
from gallery import Artifact, mutant
from trained import WEIGHTS, replace_weights


@mutant("ML703", "I19", says="revision is None")
def revision_missing_in_the_configuration(artifact: Artifact) -> None:
    """The manifest has the commit, and PEFT wrote none."""
    artifact["manifest"]["revision"] = COMMIT


@mutant("ML703", "I19", says="revision is main")
def configuration_of_another_revision(artifact: Artifact) -> None:
    """The configuration has the revision main."""
    _edit(artifact, lambda config: config.update(revision="main"))


@mutant("ML703", "I19", says="base is mistralai")
def configuration_of_another_base(artifact: Artifact) -> None:
    """The configuration names another base."""
    _edit(artifact, lambda config: config.update(base_model_name_or_path="mistralai/Mistral-7B-v0.1"))


@mutant("ML703", "I19", "I61", says="base_weights_sha256 is")
def base_merged_before(artifact: Artifact) -> None:
    """The available base is the model that the adapter was merged into."""
    (artifact["base"] / WEIGHTS).unlink()
    (artifact["base"] / WEIGHTS).hardlink_to(artifact["merged"] / WEIGHTS)


@mutant("ML703", "I19", says="base_weights_sha256 is")
def base_of_another_commit(artifact: Artifact) -> None:
    """One number of the base has changed."""
    replace_weights(artifact["base"] / WEIGHTS, **{"model.norm.weight": torch.full((128,), 2.0)})


@mutant("ML705", "I51", says="base")
def tokenizer_of_the_base_exchanged(artifact: Artifact) -> None:
    """The available base has another tokenizer."""
    (artifact["base"] / TOKENIZER).write_bytes(_other_tokenizer().read_bytes())


@mutant("ML711", "I57", says="sliding_window is 4096")
def window_of_the_base_edited(artifact: Artifact) -> None:
    """The base's configuration has an attention window that the run did not have."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": 4096}))


@mutant("ML711", "I38", says="vocab_size is 32000")
def base_with_fewer_embeddings(artifact: Artifact) -> None:
    """The base's configuration has fewer embeddings than the tokenizer has ids."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 32000}))


def _configured(artifact: Artifact, **values: object) -> None:
    """Edit the base's config.json."""
    file = artifact["base"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@mutant("ML711", says="base_config.sliding_window is 4096")
def window_of_the_base_lost(artifact: Artifact) -> None:
    """The base's configuration lost its null window, and transformers takes its default."""
    file = artifact["base"] / "config.json"
    data = json.loads(file.read_text())
    del data["sliding_window"]
    file.write_text(json.dumps(data))


@mutant("ML711", says="base_config.rms_norm_eps is 1e-05")
def epsilon_of_the_base_edited(artifact: Artifact) -> None:
    """The base has another epsilon than in training."""
    _configured(artifact, rms_norm_eps=1e-5)


@mutant("ML711", says="base_config.hidden_act is gelu")
def activation_of_the_base_edited(artifact: Artifact) -> None:
    """The base has another activation than in training."""
    _configured(artifact, hidden_act="gelu")


@mutant("ML711", says="base_config.rope is")
def rotary_base_edited(artifact: Artifact) -> None:
    """The base's rotary embedding turns at another rate."""
    _configured(artifact, rope_parameters={"rope_theta": 1e6 + 1, "rope_type": "default"})


@mutant("ML711", says="base_config.eos_token_id is 3")
def end_of_the_base_edited(artifact: Artifact) -> None:
    """The base ends with another token than in training."""
    _configured(artifact, eos_token_id=3)
