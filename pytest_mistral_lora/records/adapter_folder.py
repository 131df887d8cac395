"""An adapter or a merged model on disk: the values that its files record, and the base that it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.chat.reading import parse_json
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.devices import PRECISIONS, Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.kept_property import KeptProperty
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON, CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import TensorInfo, Weights
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_config import CONFIG, parse_adapter_config, peft_config, require_supported
from pytest_mistral_lora.records.base_location import LocatedBase, RecordedBase, locate_base, recipe_folder
from pytest_mistral_lora.records.deployment import run_record
from pytest_mistral_lora.records.files import inside, json_text
from pytest_mistral_lora.records.manifest import MANIFEST, NOTES_RECORD, Manifest, is_foreign, validate
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS, load_tensors, sha256_of_weights

if TYPE_CHECKING:
    import torch

BASE_FACTS = ("base", "revision", "base_weights_sha256")
"""Keys that identify the base, in a manifest and in a transcript's `model`."""

FARTHEST: Mapping[str, float] = {"float32": 1e-2, "bfloat16": 1.0, "float16": 1.0}
"""Largest difference of a logit that rounding explains, by the dtype of the merged weights; merges of real weights were
seen to give 1e-4 in float32, and 0.2 in bfloat16 with sums in float32."""


class AdapterFolder:
    """An adapter or a merged model on disk. Each file is read at most once, when it is first needed.

    Attributes:
        path: The folder.
        given_base: The base that the user named; None to look for it.
        may_fetch: Whether a recorded commit of the base may be fetched from the Hub; the suite never fetches.
        manifest_file: `manifest.json`, which may be missing.
        config_file: `adapter_config.json`, which may be missing.
        tensors_file: `adapter_model.safetensors`, which may be missing.
        checkpoint: The folder as a checkpoint: a merged model's own configuration and weights.
    """

    def __init__(self, path: Path, given_base: BaseFolder | None = None, *, may_fetch: bool = False) -> None:
        self.path: Path = path
        self.given_base: BaseFolder | None = given_base
        self.may_fetch: bool = may_fetch
        self.manifest_file: Path = path / MANIFEST
        self.config_file: Path = path / CONFIG
        self.tensors_file: Path = path / ADAPTER_TENSORS
        self.checkpoint: BaseFolder = BaseFolder(path)

    @property
    def has_manifest(self) -> bool:
        """Whether the folder has a manifest, even a broken one or a dangling link, but not one of another tool."""
        try:
            exists = self.manifest_file.exists() or self.manifest_file.is_symlink()
            return exists and not is_foreign(self.manifest_data)
        except InputError:
            return True  # the check of its schema reports it

    @property
    def model_files(self) -> list[Path]:
        """The safetensors files of a full model in the folder, in name order."""
        return sorted(
            file for file in self.path.iterdir() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.name)
        )

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The bytes of the manifest.

        Raises:
            InputError: If the file is missing or too large, or a link leaves the folder.
        """
        inside(self.path, MANIFEST)
        return self.checkpoint.read(MANIFEST)

    @cached_property
    def manifest_data(self) -> Any:
        """The JSON value of the manifest, valid or not.

        Raises:
            InputError: As for `manifest_bytes`, or if the manifest is not JSON.
        """
        return parse_json(self.manifest_bytes, self.manifest_file)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest; None if it is missing, because another trainer wrote the folder.

        Raises:
            InputError: If the manifest is not valid; every violation is listed.
        """
        return validate(self.manifest_data, place=Place.of(self.manifest_file)) if self.has_manifest else None

    @cached_property
    def valid_manifest(self) -> Manifest | None:
        """The manifest; None if it is missing or not valid."""
        try:
            return self.manifest
        except InputError:
            return None

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file that the manifest names, in hex; it is read once for all fields that record it.

        Raises:
            InputError: If it is missing, a link leaves the folder, or it cannot be read.
        """
        if name == CONFIG:
            return sha256_bytes(self._config_bytes)
        inside(self.path, name)
        return self.checkpoint.sha256(name)

    def require_manifest(self) -> Manifest:
        """Return the manifest.

        Raises:
            InputError: If it is missing or not valid.
        """
        return self.manifest or validate(self.manifest_data, place=Place.of(self.manifest_file))

    @cached_property
    def kind(self) -> Literal["adapter", "merged"]:
        """`merged` if the manifest has that kind, even if it is not valid otherwise."""
        # even of an invalid manifest: a wrong key must not put a merged model on a base
        try:
            data = self.manifest_data if self.has_manifest else None
        except InputError:
            data = None
        return "merged" if isinstance(data, dict) and data.get("kind") == "merged" else "adapter"

    def require_adapter(self) -> None:
        """Refuse a merged model.

        Raises:
            InputError: If the manifest has the kind `merged`.
        """
        if self.kind == "merged":
            found = "a merged model (kind merged in its manifest.json): its adapter is in the weights already"
            step = "Name the folder that it was merged from."
            raise InputError(found, place=str(self.path), expected="the folder of an adapter", next_step=step)

    @cached_property
    def manifest_sha256(self) -> str:
        """SHA-256 of the manifest without declarations, in hex: of its bytes, if it has none."""
        manifest = self.valid_manifest
        if manifest is None or NOTES_RECORD not in manifest.data:
            return sha256_bytes(self.manifest_bytes)
        # a file that this package has not written, or that has changed since, counts as it is
        if json_text(self.manifest_data).encode() != self.manifest_bytes:
            return sha256_bytes(self.manifest_bytes)
        return sha256_bytes(json_text(run_record(manifest.data)).encode())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The object of `adapter_config.json`; its keys are not checked: see `lora_config`.

        Raises:
            InputError: If it cannot be read, a link leaves the folder, or as for `parse_adapter_config`.
        """
        return parse_adapter_config(self._config_bytes, self.config_file)

    @property
    def _config_bytes(self) -> bytes:
        inside(self.path, CONFIG)
        return self.checkpoint.read(CONFIG)

    def lora_config(self, modules: Sequence[str]) -> Any:
        """Return the result of `peft_config` for a base with these modules: PEFT never reads the file itself."""
        return peft_config(self.config, modules, Place.of(self.config_file))

    @KeptProperty
    def weights(self) -> Weights:
        """The adapter's tensors; only their header is read until a tensor is needed.

        Raises:
            InputError: If the file is missing, a link leaves the folder, or as for `read_header`.
        """
        return Weights([inside(self.path, ADAPTER_TENSORS)], self.checkpoint.header)

    @KeptProperty
    def model_weights(self) -> Weights:
        """The tensors of a full model in the folder; empty if it has no such file.

        Raises:
            InputError: If a link leaves the folder, or as for `Weights`.
        """
        return Weights([inside(self.path, file.name) for file in self.model_files], self.checkpoint.header)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The header of the adapter's tensors, by tensor name; no weight is read.

        Raises:
            InputError: As for `weights`.
        """
        return self.weights.infos

    def load_tensors(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors by name, on the CPU.

        Raises:
            InputError: As for `weights` and `records.tensors.load_tensors`.
        """
        return load_tensors(self.weights.files[0])

    @cached_property
    def tensors_sha256(self) -> str:
        """Hash of the adapter's tensors, or of the merged model's weights; they are read but not kept.

        Raises:
            InputError: If a file cannot be read.
        """
        return sha256_of_weights(self.checkpoint.file_weights if self.kind == "merged" else self.weights)

    @cached_property
    def recorded_base(self) -> RecordedBase:
        """The base that the manifest records; without a valid manifest, the one that `adapter_config.json` names."""
        if self.valid_manifest is not None:
            data = self.valid_manifest.data
            output = str(data.get("recipe", {}).get("output", ""))
            weights, config = data.get("base_weights_sha256"), data.get("base_config")
            return RecordedBase(data["base"], data["revision"], weights, output, config)
        try:
            name, revision = (self.config.get(key) for key in ("base_model_name_or_path", "revision"))
        except InputError:
            name = revision = None
        name = name if isinstance(name, str) and len(name) <= 4096 else ""
        return RecordedBase(name, revision if isinstance(revision, str) else None)

    @cached_property
    def recorded_start(self) -> AdapterFolder | None:
        """The adapter that the run went on from, at its recorded place, where it may be missing; None for a new one.

        Raises:
            InputError: If the manifest is missing or not valid.
        """
        data = self.require_manifest().data
        start = data.get("lora", {}).get("start")
        if start is None:
            return None
        home = recipe_folder(self.path.resolve(), str(data.get("recipe", {}).get("output", "")))
        return AdapterFolder(home / start["path"])

    @cached_property
    def located_base(self) -> LocatedBase:
        """The base, if it is found: see `locate_base`.

        Raises:
            PinError: As for `locate_base`.
        """
        return locate_base(self.recorded_base, self.path, given=self.given_base, may_fetch=self.may_fetch)

    @cached_property
    def base_record(self) -> AdapterFolder:
        """The base's folder as a record: a merged model may be the base of another adapter.

        Raises:
            InputError: If the base is missing.
            PinError: As for `locate_base`.
        """
        return AdapterFolder(self.located_base.require(self.path).path)

    @property
    def base(self) -> BaseFolder:
        """The base to load; for a merged model, its own folder.

        Raises:
            InputError: If the base is missing.
            PinError: As for `locate_base`.
        """
        return self.checkpoint if self.kind == "merged" else self.located_base.require(self.path)

    @cached_property
    def base_weights_sha256(self) -> str:
        """Hash of the base's weights, which have to be those of the recorded base.

        A merged model is the base only of an adapter whose recorded hash is that of its weights.

        Raises:
            InputError: If the base is missing or has other weights, or if it is a merged model and no hash is recorded.
        """
        recorded, base = self.recorded_base, self.located_base.require(self.path)
        # the location proves nothing of a base that the user named
        weights, of_merged = base.weights_sha256, self.base_record.kind == "merged"
        if weights == recorded.weights_sha256 or (recorded.weights_sha256 is None and not of_merged):
            recorded.require_config(base)
            return weights
        found = f"the weights have SHA-256 {weights}"
        if of_merged:
            found = f"a merged model (kind merged in its manifest.json), which has an adapter in its weights; {found}"
        expected = f"{recorded.name} with {recorded.weights_sha256}" if recorded.weights_sha256 else recorded.name
        raise InputError(
            found,
            place=str(base),
            expected=f"{expected}, which the adapter was trained on",
            next_step="Give that base with --base.",
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A transcript's `model`: the kind, the hash of the tensors, and the base with the hash of its weights.

        Raises:
            InputError: If the tensors are missing, the configuration is not supported, nothing names the base, or as
                for `base_weights_sha256`.
        """
        found = {"kind": self.kind, "tensors_sha256": self.tensors_sha256}
        if self.kind == "merged":
            data = self.require_manifest().data
            return found | {name: data.get(name) for name in BASE_FACTS}
        require_supported(self.config, Place.of(self.config_file))  # checked before the base is read, which takes time
        recorded = self.recorded_base
        if not recorded.name:
            raise InputError("names no base", place=str(self.config_file), next_step="Give the base with --base.")
        values = (recorded.name, recorded.revision, self.base_weights_sha256)
        return found | dict(zip(BASE_FACTS, values, strict=True))

    @property
    def precision(self) -> Precision:
        """The dtype of the base's weights in training, fp32 if it is not recorded; for a merged model, its own.

        Raises:
            InputError: If the manifest is not valid, or a merged model's dtype is not one of full weights.
        """
        data = self.manifest.data if self.manifest is not None else {}
        if self.kind == "adapter":
            precision: Precision = data.get("training", {}).get("precision", "fp32")
            return precision
        dtype = data["parent"]["merge_dtype"]
        if dtype not in PRECISIONS:
            raise InputError(
                f"parent.merge_dtype is {dtype!r}",
                place=str(self.manifest_file),
                expected=f"one of {', '.join(PRECISIONS)}",
            )
        return PRECISIONS[dtype]

    @property
    def quantization(self) -> str | None:
        """`nf4` if the base was in 4 bits in training; None if it was not, and for a merged model."""
        data = self.manifest.data if self.manifest is not None and self.kind == "adapter" else {}
        quantization: str | None = data.get("training", {}).get("quantization")
        return quantization

    @cached_property
    def encoder(self) -> Encoder:
        """The backend of training, with the folder's tokenizer, or the base's if the folder has no tokenizer.

        Raises:
            InputError: If the manifest is not valid, or the base is needed and missing.
        """
        data = self.manifest.data if self.manifest is not None else {}
        # other trainers record no backend: most of their adapters are used through Mistral's own tokenizer
        backend = data.get("tokenizer", {}).get("backend", "mistral-common")
        has_tokenizer = (
            oracle_file(self.path) if backend == "mistral-common" else (self.path / TOKENIZER_JSON).is_file()
        )
        return make_encoder(backend, (self.checkpoint if has_tokenizer else self.base).tokenizer())

    @cached_property
    def recorded_encoder(self) -> Encoder:
        """The backend that the manifest names, with the tokenizer and the template files that it lists.

        Raises:
            InputError: If the manifest is missing or not valid, or a file is missing.
            OSError: If a file cannot be read.
            ValueError: If the template is not UTF-8.
        """
        data = self.require_manifest().data
        if data["tokenizer"]["backend"] == "mistral-common":
            file = inside(self.path, data["tokenizer"]["file"])
            alone = CheckpointTokenizer(file)
            if file.parent == self.path:
                alone.use_files(self.checkpoint.tokenizer_files.alone(file.name))
            return make_encoder("mistral-common", alone)
        # as bytes: line ends are part of the rendering
        template = inside(self.path, data["template"]["file"]).read_bytes().decode()
        return make_encoder(data["tokenizer"]["backend"], self.checkpoint.tokenizer(), template=template)
