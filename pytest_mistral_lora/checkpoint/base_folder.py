"""A base on disk: its configuration, class, weights, hash and tokenizer, each read once a command."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading import in_utf8, parse_json, read_bounded
from pytest_mistral_lora.checkpoint.architectures import (
    ALL,
    Architecture,
    architecture_of,
)
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights, fp8_layout, quantization_facts
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file, sha256_files
from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.checkpoint.tokenizer_folder import (
    GENERATION_CONFIG,
    MODEL_CONFIG,
    TokenizerFiles,
    read_regular,
)
from pytest_mistral_lora.checkpoint.weights import INDEX, TensorInfo, Weights, read_header, read_index, weight_files
from pytest_mistral_lora.errors import (
    InputError,
    MistralLoraError,
    PinError,
    is_out_of_memory,
    one_line,
    short_json,
)
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

_COUNTS = ("num_hidden_layers", "num_local_experts", "n_routed_experts")
_MOST_MODULES = 1000  # more than any model has: a billion layers or experts would be made one by one

_CANONICAL_KEYS = (
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "vocab_size",
    "sliding_window",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "num_local_experts",
    "num_experts_per_tok",
    "bos_token_id",
    "eos_token_id",
)

_OTHER_FILES = "configuration_files"
"""Key of `config.json` that makes transformers read another file in its place, chosen by the installed version."""


class BaseFolder:
    """A checkpoint on disk. Each of its files is read at most once, when it is first needed.

    A command makes one for the path that it is given, and passes it on. A file that changes while the command runs does
    not change its results.

    Attributes:
        path: The folder.
        config_file: `config.json`, which may be missing.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.config_file: Path = path / MODEL_CONFIG
        self._contents: dict[str, bytes] = {}
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._hashes: dict[str, str] = {}

    def __str__(self) -> str:
        return str(self.path)

    def keep(self, name: str, content: bytes) -> None:
        """Take the bytes of a file of the folder that have been read already, so that it is opened once."""
        self._contents[name] = content

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file of the folder, which serve its hash, too.

        Raises:
            InputError: As for `read_bounded`.
        """
        if name not in self._contents:
            self._contents[name] = read_bounded(self.path / name)
        return self._contents[name]

    def read_json(self, name: str) -> Any:
        """Return the value of a small JSON file of the folder.

        Raises:
            InputError: As for `read`, or if it is not JSON.
        """
        return parse_json(self.read(name), self.path / name)

    @KeptProperty
    def config(self) -> Mapping[str, Any]:
        """The object of `config.json`.

        Raises:
            PinError: If the file is missing or is not a JSON object.
        """
        if not self.config_file.is_file() and (self.path / "params.json").is_file():
            raise PinError(
                "params.json, and no config.json: a checkpoint in Mistral's own format, which transformers does not "
                "load",
                place=str(self.path),
                expected="a checkpoint folder with config.json and model*.safetensors",
                next_step="Use a copy of the model in transformers' format, or convert it with transformers' "
                "convert_mistral_weights_to_hf.py.",
            )
        try:
            data = self.read_json(MODEL_CONFIG)
        except InputError as error:
            raise PinError(error.found, place=str(self.config_file), expected="a checkpoint folder") from error
        if not isinstance(data, dict):
            raise PinError("is not a JSON object", place=str(self.config_file), expected="a checkpoint folder")
        return data

    @property
    def facts(self) -> ModelFacts:
        """The facts of `config.json`.

        Raises:
            PinError: As for `config`.
        """
        return ModelFacts(self.config)

    @KeptProperty
    def architecture(self) -> Architecture:
        """The class of the model.

        Raises:
            PinError: As for `config`, if this project does not know the class, or if this version of transformers does
                not have it.
        """
        place = Place.of(self.config_file)
        try:
            architecture = architecture_of(self.config)
            architecture.model_class(place)
        except ValueError as error:
            raise PinError(f"the model is {error}", place=place, expected=f"one of {', '.join(ALL)}") from error
        return architecture

    @property
    def vocab_size(self) -> int:
        """The number of ids of the model, as its configuration declares.

        Raises:
            PinError: As for `config`.
        """
        from transformers import MistralConfig

        declared = self.facts.vocabulary
        return declared if isinstance(declared, int) else int(MistralConfig().vocab_size)

    @KeptProperty
    def is_tied(self) -> bool:
        """Whether the checkpoint keeps its embeddings and its head as one tensor.

        For a wrapper, the tensors decide, not its flags: some releases have no flag, and transformers' default differs
        from level to level (vllm-project/vllm#51063).

        Raises:
            PinError: As for `config`.
            InputError: As for `read_header`.
        """
        files = sorted(self.path.glob("model*.safetensors")) if self.facts.is_wrapped else []
        if files:
            return not any(name.endswith("lm_head.weight") for file in files for name in self.header(file))
        return any(self.facts.ties.values())

    def header(self, file: Path) -> Mapping[str, TensorInfo]:
        """Return the header of a safetensors file of the folder.

        Raises:
            InputError: As for `read_header`.
        """
        if file not in self._headers:
            self._headers[file] = read_header(file)
        return self._headers[file]

    @KeptProperty
    def file_weights(self) -> Weights:
        """The tensors of the hashed files, whether or not transformers loads these files.

        Raises:
            PinError: If the folder has no weights.
            InputError: As for `Weights`.
        """
        return Weights(weight_files(self.path), self.header)

    @KeptProperty
    def stored_weights(self) -> Weights:
        """The tensors as stored, if transformers loads these files.

        Raises:
            PinError: As for `file_weights`, or if transformers would load other files.
            InputError: As for `Weights`.
        """
        stored = self.file_weights
        named, names = self.config.get("transformers_weights"), [file.name for file in stored.files]
        if named is not None:
            found = f"transformers_weights is {short_json(named)}, which transformers loads in place of {names[0]}"
            raise PinError(found, place=str(self.config_file), expected="no such key")
        # https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_utils.py: a lone file goes
        # first, then every file that the index names, in any folder
        if names == ["model.safetensors"]:
            return stored
        index = self.path / INDEX
        if not index.is_file():
            raise PinError(f"no {INDEX}, by which transformers finds {', '.join(names[:3])}", place=str(self.path))
        listed = sorted(set(self.index.values()))
        if listed != names:
            found = f"names the files {', '.join(map(short_json, listed[:3]))}"
            raise PinError(found, place=str(index), expected=f"those of the folder: {', '.join(names[:3])}")
        return stored

    @KeptProperty
    def index(self) -> Mapping[str, str]:
        """The name of each tensor's file, as the index gives it; the file may be missing.

        Raises:
            InputError: As for `read_index`.
        """
        return read_index(self.path / INDEX)

    @KeptProperty
    def weights(self) -> Weights:
        """The tensors in full precision; those of an FP8 checkpoint are dequantised as they are read.

        Raises:
            PinError: As for `stored_weights` and `fp8_layout`.
            InputError: As for `Weights`.
        """
        stored = self.stored_weights
        layout = fp8_layout(self.config, stored, Place.of(self.config_file))
        if layout is None:
            return stored
        return DequantizedWeights(stored, layout, self.facts.dtype or "bfloat16")

    @KeptProperty
    def weights_sha256(self) -> str:
        """The SHA-256 of the safetensors files, in name order; every byte is read, which takes time.

        Raises:
            PinError: If the folder has no weights.
            InputError: If a file cannot be read.
        """
        return sha256_files(weight_files(self.path))

    @KeptProperty
    def canonical_config(self) -> Mapping[str, Any]:
        """The values of `config.json` that decide the model's numbers, or the token that ends an answer.

        Their form does not depend on the version of transformers that wrote the file: with its defaults, the rotary
        embedding as one mapping, and without dtype and version.

        Raises:
            PinError: As for `config`, or if transformers cannot read the file.
        """
        place = Place.of(self.config_file)
        layers = self.facts.text.get("num_hidden_layers", 1)
        if type(layers) is not int or not 0 < layers <= _MOST_MODULES:
            raise PinError(f"num_hidden_layers is {layers!r}"[:200], place=place, expected=f"1 to {_MOST_MODULES}")
        try:
            found = _canonical(self._automatic_config())
            if self.facts.is_fp8:
                found["quantization"] = quantization_facts(self.config, place)
            # plain JSON, as in the manifest: a configuration may hold tuples
            plain: dict[str, Any] = json.loads(json.dumps(found, sort_keys=True))
        except PinError:
            raise
        except Exception as error:  # a value of a wrong type can fail anywhere
            raise PinError(f"transformers cannot read it: {one_line(error)}", place=place) from error
        return plain

    def _automatic_config(self) -> Any:
        """Return the configuration that transformers' AutoConfig makes of the file, without reading the file again."""
        from transformers import CONFIG_MAPPING, AutoConfig

        kind = self.config.get("model_type")
        # https://github.com/huggingface/transformers/blob/main/src/transformers/models/auto/configuration_auto.py
        if kind == "mistral" and "layer_types" in self.config:
            kind = "ministral"
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING or _OTHER_FILES in self.config:
            with in_utf8(self.path) as named:
                return AutoConfig.from_pretrained(named, trust_remote_code=False, local_files_only=True)
        return CONFIG_MAPPING[kind].from_dict({**copy.deepcopy(self.config), "model_type": kind})

    def model_config(self) -> Any:
        """Return a new configuration of the class in transformers; you may change it.

        Raises:
            PinError: As for `architecture`.
        """
        config_class = self.architecture.model_class().config_class
        if _OTHER_FILES in self.config:
            with in_utf8(self.path) as named:
                config = config_class.from_pretrained(named)
        else:
            config = config_class.from_dict(copy.deepcopy(self.config))
        # transformers fetches and runs code from the Hub for a value such as owner/name; the default is sdpa
        config._attn_implementation = None
        return config

    def empty_model(self) -> Any:
        """Return the model without weights; you may change it. Its parameters are on torch's device `meta`.

        Raises:
            PinError: As for `architecture`, or if the configuration does not make a model.
        """
        return copy.deepcopy(self._empty_model)

    @KeptProperty
    def _empty_model(self) -> Any:
        import torch

        model_class = self.architecture.model_class()
        with self.making_model():
            config = self.model_config()
            for part in (config.get_text_config(), getattr(config, "vision_config", None)):
                for key in _COUNTS:
                    if getattr(part, key, 0) > _MOST_MODULES:
                        raise ValueError(f"{key} is {getattr(part, key)}")
            # a 7B base in float32 takes 29 GB: only its module names and shapes are needed here
            with torch.device("meta"):
                return model_class(config)

    @contextmanager
    def making_model(self) -> Iterator[None]:
        """Turn errors of transformers and torch into ours: they raise many kinds for a value of a wrong type or size.

        Raises:
            PinError: If the block cannot make a model of the folder.
        """
        try:
            yield
        except (MistralLoraError, ImportError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise PinError(
                f"no model can be made of it: {type(error).__name__}: {one_line(error)}",
                place=str(self.config_file),
                expected=f"the configuration of a {self.architecture.title}, and its weights",
            ) from error

    @cached_property
    def tokenizer_files(self) -> TokenizerFiles:
        """The files that decide how text becomes ids."""
        return TokenizerFiles(self.path, self._read)

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file of the folder, in hex; the bytes of a tokenizer file serve its later readers.

        Args:
            name: The path of the file below the folder, which leads nowhere else.

        Raises:
            InputError: If the file cannot be read.
        """
        if name in self.tokenizer_files.names:
            return self.tokenizer_files.sha256(name)
        if name not in self._hashes:
            content = self._contents.get(name)
            self._hashes[name] = sha256_file(self.path / name) if content is None else sha256_bytes(content)
        return self._hashes[name]

    def _read(self, file: Path) -> bytes:
        is_small = file.name in (MODEL_CONFIG, GENERATION_CONFIG)
        return self.read(file.name) if is_small and file.parent == self.path else read_regular(file)

    def tokenizer(self, declared: str | None = None) -> CheckpointTokenizer:
        """Return the tokenizer of the folder, which shares its files.

        Args:
            declared: The oracle that a setting names for a folder without a Mistral tokenizer file; see
                `CheckpointTokenizer`.

        Raises:
            TokenizerError: If the folder is missing.
        """
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        found = CheckpointTokenizer(self.path, declared)
        found.use_files(self.tokenizer_files)
        return found


def _canonical(whole: Any) -> dict[str, Any]:
    """Return the values of transformers' configuration that decide numbers and ends of answers."""
    text = whole.get_text_config()
    found = {key: getattr(text, key) for key in _CANONICAL_KEYS if hasattr(text, key)}
    if found.get("head_dim") is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    found["rope"] = ModelFacts(text).rope_values
    found["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    return found
