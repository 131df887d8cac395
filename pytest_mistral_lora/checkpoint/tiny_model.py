"""The tiny model: a real checkpoint of each trained class, small enough to learn by heart on one CPU thread."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.chunks.chunk_type import ImageSizes
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError, PinError

HIDDEN_SIZE = 128
LAYERS = 2
INITIALIZER_RANGE = 0.2
"""Ten times the usual scale: with 0.02, LoRA cannot steer a frozen random head, and learns nothing."""


_MISTRAL = Architecture(TEXT_MODELS["mistral"])


@dataclass(frozen=True, slots=True)
class TinyKind:
    """A kind of tiny model.

    Attributes:
        architecture: Its class.
        tied: Whether embeddings and head are one tensor.
    """

    architecture: Architecture = _MISTRAL
    tied: bool = False

    def __str__(self) -> str:
        return f"{self.architecture.title}{', tied' * self.tied}"

    @property
    def label(self) -> str:
        """A short name of its class, for files: `wrapped-ministral3-tied`."""
        architecture = self.architecture
        return f"{'wrapped-' * architecture.is_wrapped}{architecture.text.model_type}{'-tied' * self.tied}"

    @classmethod
    def of(cls, base: BaseFolder | None) -> TinyKind:
        """Return the kind of a checkpoint by its class; a bare tokenizer, without `config.json`, has no class.

        Raises:
            PinError: If its class is not trained, or no oracle can judge its training rows.
        """
        if base is None or not base.config_file.is_file():
            return cls()
        kind = cls(base.architecture, base.is_tied)
        if not kind.architecture.text.has_oracle:
            title = kind.architecture.title
            raise PinError(
                f"the model is a {title}, which no tokenizer of Mistral's is an oracle for", place=str(base.config_file)
            )
        return kind

    @classmethod
    def labelled(cls, label: str) -> TinyKind:
        """Return the kind with a label."""
        name = label.removesuffix("-tied")
        text = TEXT_MODELS[name.removeprefix("wrapped-")]
        return cls(Architecture(text, is_wrapped=name.startswith("wrapped-")), label.endswith("-tied"))


def write_tiny_base(
    folder: Path, tokenizer_file: Path, *, seed: int = 0, architecture: Architecture = _MISTRAL, tied: bool = False
) -> Path:
    """Write a seeded tiny checkpoint: `config.json`, `model.safetensors` (float32) and the tokenizer file.

    A model of text and images has a tiny vision tower, and the files of its processor.

    The vocabulary is the tokenizer's own. The same seed and libraries give the same bytes; the caller's random state
    is left unchanged.

    Args:
        folder: The checkpoint folder to make.
        tokenizer_file: A `tekken.json` or a `*.model.vN`.
        seed: Seed of the weights.
        architecture: Its class.
        tied: Whether embeddings and head are one tensor.

    Returns:
        `folder`.

    Raises:
        InputError: If `folder` exists.
        PinError: If this version of transformers does not have the class.
        TokenizerError: If the tokenizer file cannot be loaded.
    """
    import torch
    from safetensors.torch import save_file

    if folder.exists():
        raise InputError("exists already", place=str(folder), next_step="Name a folder that is not there yet.")
    oracle = Oracle(tokenizer_file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # built beside its place and renamed: another process never sees an incomplete checkpoint
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent:
        building = Path(parent) / folder.name
        config = tiny_config(oracle, architecture, tied=tied)
        config.save_pretrained(building)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = architecture.model_class()(config).float()
        if architecture == _MISTRAL and not tied:
            save_file(model.state_dict(), building / "model.safetensors", metadata={"format": "pt"})
        else:
            model.save_pretrained(building)  # the names on disk differ from those in memory
        for name, content in (_processor(oracle) if architecture.is_wrapped else {}).items():
            (building / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # transformers and mistral-common find the file and its version by these names
        suffixes = "".join(oracle.path.suffixes[-2:])
        shutil.copyfile(tokenizer_file, building / (TEKKEN if oracle.kind == "tekken" else f"tokenizer{suffixes}"))
        building.rename(folder)
    return folder


def tiny_config(oracle: Oracle, architecture: Architecture = _MISTRAL, *, tied: bool = False) -> Any:
    """Return the configuration of the tiny model for a tokenizer's vocabulary.

    Raises:
        PinError: If this version of transformers does not have the class.
    """
    import transformers

    model_class, text = architecture.model_class(), architecture.text
    # never EOS: a loss that ignores padding would ignore the end of each turn, too
    unknown = (token for token in range(oracle.vocab_size) if oracle.piece(token) == "<unk>")
    pads = [token for token, literal in oracle.control_tokens.items() if literal == "<pad>"]
    settings = {
        "vocab_size": oracle.vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN_SIZE // 4,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": oracle.bos_id,
        "eos_token_id": oracle.eos_id,
        "pad_token_id": pads[0] if pads else next(unknown),
        "architectures": [text.name],
        # copies: transformers' configuration adds keys to the given dictionary
        **copy.deepcopy(_OWN.get(text.model_type, {})),
    }
    config = getattr(transformers, text.name).config_class(
        **{key: value for key, value in settings.items() if value != ...}
    )
    if not architecture.is_wrapped:
        return config
    sizes = oracle.image_sizes or _SMALL_IMAGES
    return model_class.config_class(
        text_config=config.to_dict(),
        vision_config=_VISION | {"image_size": sizes.longest, "patch_size": sizes.patch},
        spatial_merge_size=sizes.merge,
        tie_word_embeddings=tied,
        architectures=[architecture.name],
        # the weights of the tower and the projector are drawn with the wrapper's own range
        initializer_range=INITIALIZER_RANGE,
    )


_POSITIONS = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""YaRN, and queries that are scaled from position 32 on: rows of a few turns are long enough to show both."""

_OWN: dict[str, dict[str, Any]] = {
    "ministral": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": {"rope_parameters": _POSITIONS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral4": {
        "rope_parameters": _POSITIONS,
        "head_dim": ...,
        "sliding_window": ...,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": HIDDEN_SIZE,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama": {"sliding_window": ...},
}
"""The settings of a class beside the common ones; a value of ... removes a common one."""

_VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
}


_SMALL_IMAGES = ImageSizes(patch=14, longest=28, merge=2)
"""The sizes for a tokenizer that takes no images."""


def _processor(oracle: Oracle) -> dict[str, dict[str, Any]]:
    """Return the files that tell transformers how images become tokens, by name."""
    sizes = oracle.image_sizes or _SMALL_IMAGES
    return {
        "preprocessor_config.json": {
            "image_processor_type": "PixtralImageProcessor",
            "do_resize": True,
            "do_rescale": True,
            "resample": 3,
            "patch_size": sizes.patch,
            "size": {"longest_edge": sizes.longest},
            "rescale_factor": 0.00392156862745098,
        },
        "processor_config.json": {
            "processor_class": "PixtralProcessor",
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "patch_size": sizes.patch,
            "spatial_merge_size": sizes.merge,
        },
    }
