"""Go on from an adapter on disk: it is the recipe's, as a whole, or an error names what differs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners import lora

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hub_cache import COMMIT, is_repository
from pytest_mistral_lora.errors import (
    InputError,
    PinError,
    RecipeError,
    TrainingError,
    and_more,
    did_you_mean,
    short_json,
)
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.manifest import Manifest, seal_of
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS, sha256_tensors
from pytest_mistral_lora.training.adapter import (
    PREFIX,
    adapter_tensors,
    lora_config,
    peft_quiet,
    recorded_without_weights,
    without_weights,
)
from pytest_mistral_lora.training.layers import decoder_layers
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.run_folder import missing_start

_PLACE = NOWHERE.within("lora", "start")
_NAME = "default"
_PICKLE = "adapter_model.bin"
_FLOATS = ("float32", "bfloat16", "float16")
"""dtypes whose values float32 holds exactly."""


@dataclass(frozen=True)
class Start:
    """The adapter that a run goes on from, checked without the weights of its base.

    Attributes:
        folder: Its folder.
        written: Its path as the recipe has it.
        manifest: Its manifest; None if another trainer wrote it.
        tensors_sha256: Hash of its tensors, as `records.tensors.sha256_tensors` makes it.
    """

    folder: AdapterFolder
    written: str
    manifest: Manifest | None
    tensors_sha256: str

    @property
    def manifest_sha256(self) -> str | None:
        """Hash of its manifest's bytes; None without a manifest."""
        return None if self.manifest is None else self.folder.manifest_sha256

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the steps of a run that goes on from it, as JSON data."""
        return {"manifest_sha256": self.manifest_sha256, "tensors_sha256": self.tensors_sha256}


def plan_start(recipe: Recipe, base: BaseFolder, layers: Sequence[str]) -> Start | None:
    """Check the adapter that a recipe goes on from, and load no weight of the base.

    Args:
        recipe: The recipe.
        base: Its base on disk; the weights of a Hub base may be missing.
        layers: The result of `planned_layers`.

    Returns:
        The adapter; None if the recipe makes a new one.

    Raises:
        RecipeError: If there is no adapter; if its configuration or its base is not the recipe's; or if a tensor is
            missing, renamed, of another shape, not finite, or has no place.
        InputError: If a file of it cannot be read, is damaged, or describes an adapter that cannot be trained.
    """
    path = recipe.lora.start
    if path is None:
        return None
    _require_adapter(path)
    folder = AdapterFolder(path)
    manifest = folder.manifest
    if manifest is not None:
        _require_as_recorded(folder, manifest)
    _require_same_base(recipe, base, folder, manifest)
    expected = _require_same_adapter(recipe, base, folder, layers)
    _require_tensors(folder, expected)
    return Start(folder, recipe.path_as_written(path), manifest, folder.tensors_sha256)


def _require_adapter(path: Path) -> None:
    if not path.is_dir():
        raise missing_start(path)
    folder, expected = AdapterFolder(path), f"the folder of an adapter: {CONFIG} and {ADAPTER_TENSORS}"
    refuse = partial(RecipeError, place=_PLACE, expected=expected)
    if folder.kind == "merged":
        step = "Name the adapter that it was merged from; or make it the base, base.path, and leave lora.start out."
        raise refuse(f"{path} is a merged model, whose adapter is in its weights", next_step=step)
    if not folder.config_file.exists():
        if (path / "config.json").exists() or folder.model_files:
            step = "To train on it, make it the base, base.path, and leave lora.start out."
            raise refuse(f"{path} is a model and not an adapter", next_step=step)
        # PEFT saves an adapter whose name is not `default` in a folder of that name; trainers save checkpoints
        below = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
        step = f"There is one in {', '.join(below[:3])}: name that folder." if below else ""
        raise refuse(f"{path} has no {CONFIG}", next_step=step)
    if not folder.tensors_file.exists() and (path / _PICKLE).exists():
        load = f"PeftModel.from_pretrained(base, {str(path)!r}).save_pretrained({str(path)!r})"
        step = f"Convert it with PEFT on a machine where its code may run: {load}."
        raise refuse(f"{path / _PICKLE} is a pickle, which can run code and is not loaded", next_step=step)


def _require_as_recorded(folder: AdapterFolder, manifest: Manifest) -> None:
    """Refuse an adapter that is not the one that its manifest records.

    Raises:
        InputError: If the manifest's seal, or the hash of a file or of the tensors, is not the recorded one.
    """
    data, step = manifest.data, "Restore the folder as its run wrote it: mistral-lora verify names all that changed."
    seal = data.get("seal")
    if seal is not None and (found := seal_of(folder.manifest_bytes, seal)) != seal:
        place = Place.of(folder.manifest_file) / "seal"
        raise InputError(f"{seal}, and the file's is {found}", place=place, expected=found, next_step=step)
    recorded = {(CONFIG, folder.config_file): data.get("files", {}).get(CONFIG, {}).get("sha256")}
    recorded[ADAPTER_TENSORS, folder.tensors_file] = data.get("lora", {}).get("tensors_sha256")
    for (name, file), digest in recorded.items():
        now = folder.tensors_sha256 if name == ADAPTER_TENSORS else folder.sha256(name)
        if digest not in (None, now):
            what = "its tensors have" if name == ADAPTER_TENSORS else "it has"
            expected = f"{digest}, as {folder.manifest_file.name} records"
            raise InputError(f"{what} SHA-256 {now}", place=Place.of(file), expected=expected, next_step=step)


def _require_same_base(recipe: Recipe, base: BaseFolder, folder: AdapterFolder, manifest: Manifest | None) -> None:
    """Refuse an adapter of another base; recorded weights decide, and without them names that both have.

    Raises:
        RecipeError: If it was trained on another base, or the base has another configuration now, with which the
            weights compute something else.
        PinError: As for `RecordedBase.require_config`.
    """
    recorded, ours = folder.recorded_base, recipe.base
    step = "Name the base of the adapter in the recipe, or start from an adapter of this base."
    same_commit = ours.repo is not None and (recorded.name, recorded.revision) == (ours.repo, ours.revision)
    theirs, weights = recorded.weights_sha256, None
    named = folder.located_base.folder if theirs is None and recorded.revision is None else None
    if named is not None and named.path.samefile(base.path):
        return  # the configuration names the folder of this very base
    if named is not None:
        theirs = named.weights_sha256
    if theirs is not None and not same_commit and (ours.weights_sha256 or _has_weights(base)):
        weights = ours.weights_sha256 or base.weights_sha256
        if weights != theirs:
            found = f"{folder.path} was trained on {recorded.name}, whose weights have SHA-256 {theirs}; those of "
            found += f"{ours.label} have {weights}"
            raise RecipeError(found, place=NOWHERE / "base", expected="the base of the adapter", next_step=step)
    if not same_commit and weights is None:
        # a path may be that of another machine, and its last name anything: two names of the Hub can be compared
        if ours.repo is not None and is_repository(recorded.name) and recorded.name != ours.repo:
            found, file = f"{folder.path} was trained on {recorded.name}", folder.config_file.name
            other = f"{step} If {ours.repo} has the same weights, correct base_model_name_or_path in {file}."
            raise RecipeError(found, place=NOWHERE.within("base", "repo"), expected=recorded.name, next_step=other)
        is_commit = recorded.revision is not None and COMMIT.fullmatch(recorded.revision)
        if ours.repo is not None and recorded.name == ours.repo and is_commit and recorded.revision != ours.revision:
            found, expected = f"{folder.path} was trained on commit {recorded.revision}", str(recorded.revision)
            raise RecipeError(found, place=NOWHERE.within("base", "revision"), expected=expected, next_step=step)
    if manifest is not None:
        try:
            recorded.require_config(base)
        except PinError:
            raise
        except InputError as error:
            found = f"{error.place}: {error.found}"
            raise RecipeError(found, place=NOWHERE / "base", expected=error.expected, next_step=step) from error


def _has_weights(base: BaseFolder) -> bool:
    return any(base.path.glob("model*.safetensors"))


@dataclass(frozen=True)
class _BuiltAdapter:
    """An adapter as PEFT builds it: the values of each adapted layer, and the shape of each tensor."""

    r: Mapping[str, int]
    alpha: Mapping[str, float]
    tensors: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: Any) -> _BuiltAdapter:
        found = {
            name.removeprefix(PREFIX): module
            for name, module in model.named_modules()
            if isinstance(module, lora.LoraLayer)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT takes a bias of lora_B for the shard of a matrix
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cls(
            {name: module.r[_NAME] for name, module in found.items()},
            {name: module.lora_alpha[_NAME] for name, module in found.items()},
            {name: tuple(tensor.shape) for name, tensor in state.items()},
        )


def _require_same_adapter(
    recipe: Recipe, base: BaseFolder, folder: AdapterFolder, layers: Sequence[str]
) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each tensor of the recipe's adapter, by name, if the one on disk is configured alike.

    Raises:
        RecipeError: With every key of the recipe whose value is not that of the adapter.
        InputError: As for `recorded_without_weights`.
    """
    theirs = _BuiltAdapter.of(recorded_without_weights(folder, base))
    ours = _BuiltAdapter.of(without_weights(base, lora_config(recipe.lora, layers)))
    found = list(_differences(recipe, base, folder, theirs, ours))
    if found:
        # one error with all of them: the recipe is corrected once
        steps = [step for _, _, _, step in found]
        raise RecipeError(
            f"{folder.config_file}: {'; '.join(text for _, text, _, _ in found)}; the recipe has "
            + "; ".join(dict.fromkeys(ours for _, _, ours, _ in found)),
            place=NOWHERE.within("lora", found[0][0]),
            next_step=" ".join(dict.fromkeys(steps)),
        )
    return ours.tensors


def _differences(
    recipe: Recipe, base: BaseFolder, folder: AdapterFolder, theirs: _BuiltAdapter, ours: _BuiltAdapter
) -> Iterator[tuple[str, str, str, str]]:
    """Yield each key of a recipe that the adapter contradicts: the key, both values, and what to do."""
    config, wanted = folder.config, recipe.lora
    if theirs.r.keys() != ours.r.keys():
        more, fewer = sorted(theirs.r.keys() - ours.r.keys()), sorted(ours.r.keys() - theirs.r.keys())
        parts = [f"it adapts {more[0]}{and_more(1, len(more))}, which the recipe does not"] if more else []
        parts += [f"it does not adapt {fewer[0]}{and_more(1, len(fewer))}"] if fewer else []
        step = _step_to_layers(base, sorted(theirs.r))
        yield "target_modules", " and ".join(parts), f"the {len(ours.r)} layers of lora.target_modules", step
    shared = [layer for layer in ours.r if layer in theirs.r]
    for key, name, pattern in (("r", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        values, expected = getattr(theirs, key), getattr(ours, key)
        other = [layer for layer in shared if values[layer] != expected[layer]]
        if other:
            found = f"{name} is {values[other[0]]:g} in {other[0]}{and_more(1, len(other))}"
            if len({values[layer] for layer in shared}) > 1:
                found += f", by {pattern}"
                text = short_json(config[pattern])
                # one that is cut off cannot be copied
                of_file = f", which has {len(config[pattern])} entries in {folder.config_file}"
                step = f"Set lora.{key}: {config[name]:g} and lora.{pattern}{of_file if '…' in text else f': {text}'}."
            else:
                step = f"Set lora.{key}: {values[other[0]]:g}{f', without {pattern}' * bool(getattr(wanted, pattern))}."
            by = f" of lora.{pattern}" if expected[other[0]] != getattr(wanted, key) else ""
            yield key, found, f"lora.{key} {expected[other[0]]:g}{by}", step
    for key in ("rslora", "dora"):
        value = bool(config.get(f"use_{key}"))
        if value != getattr(wanted, key):
            now = str(value).lower()
            yield key, f"use_{key} is {now}", f"lora.{key} {str(not value).lower()}", f"Set lora.{key}: {now}."
    saved = sorted(config.get("modules_to_save") or [])
    if saved != sorted(wanted.modules_to_save):
        step = f"Set lora.modules_to_save: [{', '.join(saved)}]."
        yield "modules_to_save", f"modules_to_save is {saved}", f"{sorted(wanted.modules_to_save)}", step
    # whatever other key of PEFT changes a tensor or its effect
    elif theirs.r.keys() == ours.r.keys() and bool(config.get("use_dora")) == wanted.dora:
        for name in sorted(theirs.tensors.keys() ^ ours.tensors.keys())[:1]:
            yield "start", f"it describes {name}", "the tensors of a recipe's adapter", "Start from another adapter."


def _step_to_layers(base: BaseFolder, layers: Sequence[str]) -> str:
    """Return the keys of a recipe that adapt some layers, as a sentence."""
    decoder = f"{base.architecture.layers}."
    if not all(layer.startswith(decoder) for layer in layers):
        return "Start from an adapter of the text's decoder layers alone."
    split = [layer.removeprefix(decoder).partition(".") for layer in layers]
    indices = sorted({int(index) for index, _, _ in split})
    names = sorted({name.rpartition(".")[2] for _, _, name in split})
    if len(layers) != len(indices) * len(names):
        # not the same names in each layer
        return f"Set lora.target_modules: '{'|'.join(map(re.escape, layers))}'."
    step = f"Set lora.target_modules: [{', '.join(names)}]"
    return f"{step}." if len(indices) == decoder_layers(base) else f"{step} and lora.layers_to_transform: {indices}."


def _require_tensors(folder: AdapterFolder, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not, one by one, those of the recipe's adapter.

    Raises:
        RecipeError: With the first tensor, and the number of the others.
    """
    file, infos = folder.tensors_file, folder.tensors
    refuse = partial(RecipeError, place=_PLACE)
    whole = f"the {len(expected)} tensors of the recipe's adapter, and no other"
    odd, missing = sorted(infos.keys() - expected.keys()), sorted(expected.keys() - infos.keys())
    if odd:
        found = f"{file}: {odd[0]} has no place{did_you_mean(odd[0], missing)}{and_more(1, len(odd))}"
        raise refuse(found, expected=whole, next_step="Rename it, or save the adapter again with PEFT.")
    if missing:
        step = "Take the adapter as its trainer saved it: a part of it would begin anew."
        raise refuse(f"{file}: {missing[0]} is missing{and_more(1, len(missing))}", expected=whole, next_step=step)
    for name, shape in expected.items():
        info = infos[name]
        if info.shape != shape:
            text = f"{shape}, of this base and lora.r"
            raise refuse(f"{file}: {name} has shape {info.shape}", expected=text)
        if info.dtype_name not in _FLOATS:
            raise refuse(f"{file}: {name} is {info.dtype_name}", expected=f"one of {', '.join(_FLOATS)}")
    with folder.weights.held_open():
        for name in expected:
            if not torch.isfinite(folder.weights[name]).all():
                step = "Start from an earlier adapter: this one is damaged, or its training failed."
                raise refuse(f"{file}: {name} is not finite", expected="finite numbers", next_step=step)


def load_start(model: Any, start: Start) -> None:
    """Give a new adapter the values of the one that the run goes on from; `model` is changed in place.

    Call it before an engine shards the model. Every value is read back from the model and compared.

    Raises:
        InputError: If the file has changed since it was checked.
        TrainingError: If a tensor of the model is not the file's afterwards.
    """
    stored = start.folder.load_tensors()
    if (found := sha256_tensors(stored)) != start.tensors_sha256:
        place, expected = Place.of(start.folder.tensors_file), f"{start.tensors_sha256}, as when it was checked"
        raise InputError(f"its tensors have SHA-256 {found}", place=place, expected=expected)
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    with peft_quiet():
        set_peft_model_state_dict(model, tensors)
    # PEFT loads what fits, and is silent about the rest
    loaded = adapter_tensors(model)
    for name in sorted(loaded.keys() | tensors.keys()):
        if name not in loaded or name not in tensors or not torch.equal(loaded[name], tensors[name]):
            found = f"{name} is not as in {start.folder.tensors_file} after loading"
            raise TrainingError(found, place=_PLACE, next_step="Please report it, with your version of PEFT.")
