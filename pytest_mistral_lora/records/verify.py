"""Recompute the values that a manifest records, and report each as match, mismatch or not available."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.chat.reading import loads_strict
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file, sha256_files
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.base_location import LocatedBase, changed_config, recipe_folder
from pytest_mistral_lora.records.data_stats import GATE, PROBES, probe_sha256, recount_rows
from pytest_mistral_lora.records.deployment import commands_of
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.records.git import is_in_repository
from pytest_mistral_lora.records.manifest import (
    MANIFEST,
    Opener,
    held_files,
    open_data_files,
    retention_files,
    seal_of,
    training_files,
)
from pytest_mistral_lora.records.merged_weights import is_rounded_sum
from pytest_mistral_lora.records.notes import NOTES, note_bytes, note_texts, noted_by
from pytest_mistral_lora.records.parents import facts_of
from pytest_mistral_lora.records.proven import (
    less_proven_than_committed,
    less_proven_than_merged,
)
from pytest_mistral_lora.records.restated import LOGGED, TRAINING_LOG, loss_results, restated
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS, adapted_modules, decoder_indices

State = Literal["match", "mismatch", "not available"]

PROOF = "proof"
"""Name of the result of the comparison with a committed manifest."""

_NOT_OF_A_RUN = (".git", ".gitattributes", ".cache")
"""Entries that Git and the Hub add to a folder; no library loads anything from them."""

_CONFIG_KEYS = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
"""Keys of a manifest's `lora`, with the corresponding keys of `adapter_config.json`."""

_OF_SOURCE = ("container", "rows_sha256", "losses", "left_out")
"""Keys of a data file's `source` that its conversion computes."""


@dataclass(frozen=True)
class FieldCheck:
    """One recorded value, recomputed.

    Attributes:
        name: Its JSON path in the manifest, without `$.`.
        state: Whether the recomputed value is the recorded one.
        recorded: The value in the manifest; None for a file that the manifest does not list.
        found: The recomputed value, or the reason why it is missing.
        place: The artifact that it was computed from; empty if it was not recomputed.
        again: The other place of the manifest that states it; empty if it was recomputed from an artifact.
    """

    name: str
    state: State
    recorded: Any
    found: Any
    place: Place = NOWHERE
    again: str = ""

    @property
    def is_unlisted(self) -> bool:
        """Whether it is about a file that the manifest does not list."""
        return self.recorded is None and self.name.startswith("files.")


def recompute_field(name: str, recorded: Any, compute: Callable[[], Any], place: Place | Path) -> FieldCheck:
    """Compare a recorded value with the result of `compute`; if that raises, it is a mismatch."""
    place = Place.of(place)
    try:
        found = compute()
    # a damaged artifact can raise anything
    except (MistralLoraError, OSError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        return FieldCheck(name, "mismatch", recorded, f"cannot be computed: {error}", place)
    return FieldCheck(name, "match" if found == recorded else "mismatch", recorded, found, place)


def unavailable_field(name: str, recorded: Any, why: str) -> FieldCheck:
    """Report a recorded value that cannot be recomputed, because its source is missing."""
    return FieldCheck(name, "not available", recorded, why)


def verify(
    adapter: Path | AdapterFolder,
    *,
    base: Path | LocatedBase | None = None,
    dataset: Path | Sequence[Path] | None = None,
    parent: Path | None = None,
    open_file: Opener | None = None,
) -> list[FieldCheck]:
    """Recompute every value of a folder's manifest whose source is available.

    Args:
        adapter: An adapter or merged folder with `manifest.json`.
        base: The base checkpoint, or the result of looking for it; without it, values of the base are not available.
        dataset: The training files in recipe order, or a folder that holds them; without it, values of the rows are
            not available.
        parent: The adapter that a merged folder was made from; without it, values of the adapter are not available.
        open_file: `formats.sources.recorded_file`; without it, values of rows that were converted are not available.

    Raises:
        InputError: If the manifest is missing or not valid.
    """
    folder = adapter if isinstance(adapter, AdapterFolder) else AdapterFolder(adapter)
    if not isinstance(base, LocatedBase):
        base = LocatedBase(BaseFolder(base)) if base else LocatedBase(None, "no base given")
    data = folder.require_manifest().data
    # from cheap to expensive: a damaged file is listed before a damaged set of rows
    fields = [
        *folder_fields(folder),
        *_evaluation_fields(folder),
        *_history_fields(folder),
        *_start_fields(folder),
        *_base_fields(data, base),
        *_parent_fields(folder, base, parent),
    ]
    if data["kind"] == "adapter":
        fields += adapter_fields(folder)
    fields += _dataset_fields(folder, dataset, open_file)
    return [*fields, *_restated_fields(folder, fields)]


def folder_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    """Recompute the values of the folder itself: files, notes, tokenizer, template and the seal."""
    data, path = folder.require_manifest().data, folder.path
    if "seal" in data:
        seal = partial(seal_of, folder.manifest_bytes, data["seal"])
        yield recompute_field("seal", data["seal"], seal, folder.manifest_file)
    for name, entry in data.get("files", {}).items():
        text = partial(note_bytes, path, name) if name in NOTES else None
        size = (lambda text=text: len(text())) if text else (lambda name=name: inside(path, name).stat().st_size)
        digest = partial(_listed_sha256, folder, name)
        yield recompute_field(f"files.{name}.sha256", entry["sha256"], digest, path / name)
        yield recompute_field(f"files.{name}.size", entry["size"], size, path / name)
    listed = {MANIFEST, *data.get("files", ())}
    for file in sorted(path.rglob("*")) if "files" in data else ():
        below = file.relative_to(path)
        is_file = not file.is_dir() or file.is_symlink()  # a link to a folder can lead anywhere
        if is_file and below.as_posix() not in listed and below.parts[0] not in _NOT_OF_A_RUN:
            yield FieldCheck(f"files.{below.as_posix()}", "mismatch", None, "is not listed", Place.of(file))
    # shows a value that was changed in the manifest and its seal, but not in the notes made from it
    for name, note in note_texts(data).items():
        if name not in data.get("files", {}):
            continue
        field, recorded, made_by = f"files.{name}.text", data["files"][name]["sha256"], noted_by(data)
        if made_by == __version__:
            yield recompute_field(field, recorded, partial(sha256_bytes, note.encode()), folder.manifest_file)
        else:
            yield unavailable_field(field, recorded, f"made by version {made_by}; this is {__version__}")
    yield from _tokenizer_fields(folder)


def _evaluation_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    """Recompute the results of the training log, and the hashes of files that the user's commands left."""
    data = folder.require_manifest().data
    log = folder.path / TRAINING_LOG
    for number, result in enumerate(data.get("evaluation", ()) if log.is_file() else ()):
        # the entry of the run itself: results of generated answers have other names
        for name in LOGGED.intersection(result["results"]):
            compute = partial(_logged_result, folder, name)
            field = f"evaluation[{number}].results.{name}"
            yield recompute_field(field, result["results"][name], compute, log)
    home = recipe_folder(folder.path.resolve(), folder.recorded_base.output)
    for number, command in enumerate(commands_of(data)):
        for name, entry in command["files"].items():
            field = f"evaluation.yours[{number}].files.{name}"
            if entry is None:
                yield unavailable_field(field, None, "was not there when the notes were made: mistral-lora note")
            elif not (home / name).exists():
                yield unavailable_field(field, entry["sha256"], f"is not in {home}")
            else:
                digest = partial(lambda name: sha256_file(inside(home, name)), name)
                yield recompute_field(field, entry["sha256"], digest, home / name)


def _logged_result(folder: AdapterFolder, name: str) -> float:
    log = [loads_strict(line) for line in inside(folder.path, TRAINING_LOG).read_text(encoding="utf-8").splitlines()]
    return loss_results(log)[name]


def _history_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    """Compare what the manifest proves with what its committed version in Git proved."""
    if not is_in_repository(folder.path):
        return
    try:
        commit, lost = less_proven_than_committed(folder)
    except LookupError as error:
        yield unavailable_field(PROOF, None, str(error.args[0]))
        return
    recorded = f"in commit {commit}"
    found = f"less is proven than before: {'; '.join(lost)}" if lost else "no less than before"
    yield FieldCheck(PROOF, "mismatch" if lost else "match", recorded, found, Place.of(folder.manifest_file))


START = "lora.start"
"""Beginning of the names of the values of the adapter that a run went on from."""


def _start_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    """Recompute the hashes of the adapter that the run went on from, if it is where the recipe had it."""
    recorded, start = folder.require_manifest().data.get("lora", {}).get("start"), folder.recorded_start
    if recorded is None or start is None:
        return
    hashed = {
        "manifest_sha256": (start.manifest_file, lambda: start.manifest_sha256),
        "tensors_sha256": (start.tensors_file, lambda: start.tensors_sha256),
        "config_sha256": (start.config_file, lambda: start.sha256(CONFIG)),
    }
    for key, (file, compute) in hashed.items():
        if recorded.get(key) is None:
            continue
        name = f"{START}.{key}"
        if os.path.lexists(file):  # false also for what is no path: the record may hold any text
            yield recompute_field(name, recorded[key], compute, file)
        else:
            yield unavailable_field(name, recorded[key], f"the adapter that the run went on from is gone: no {file}")
    if recorded["manifest_sha256"] is not None and start.valid_manifest is not None:
        now = facts_of(start.valid_manifest.data)
        for key in now:
            yield recompute_field(f"{START}.{key}", recorded[key], partial(now.__getitem__, key), start.manifest_file)
        yield from _listed_fields(START, start, but=(CONFIG,))


def _listed_fields(name: str, parent: AdapterFolder, *, but: Sequence[str] = ()) -> Iterator[FieldCheck]:
    """Recompute the hashes that a parent's manifest lists: of its configuration, its notes, its tokenizer.

    The record of the run has the hash of that manifest, which so covers these files. Tensors have a hash of their own.

    Args:
        name: The part of the manifest that is about the parent.
        parent: Its folder, with a valid manifest.
        but: Files that the part hashes itself.
    """
    listed = parent.require_manifest().data.get("files", {})
    for file in (file for file in listed if file not in but and file != ADAPTER_TENSORS):
        field, digest = f"{name}.files.{file}", listed[file]["sha256"]
        if not os.path.lexists(parent.path / file):
            yield unavailable_field(field, digest, f"no {parent.path / file}")
        else:
            compute = partial(_listed_sha256, parent, file)
            yield recompute_field(field, digest, compute, parent.path / file)


def _listed_sha256(folder: AdapterFolder, name: str) -> str:
    # a note counts without its author's section, which may be rewritten at any time
    return sha256_bytes(note_bytes(folder.path, name)) if name in NOTES else folder.sha256(name)


def _tokenizer_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    data, path = folder.require_manifest().data, folder.path
    tokenizer, template = data.get("tokenizer"), data.get("template")
    if tokenizer:
        file = path / tokenizer["file"]
        digests = {"sha256": (tokenizer["file"], tokenizer["sha256"])}
        digests |= {f"files.{name}": (name, digest) for name, digest in tokenizer.get("files", {}).items()}
        for key, (name, digest) in digests.items():
            yield recompute_field(f"tokenizer.{key}", digest, partial(folder.sha256, name), path / name)
        for key in ("version", "vocab_size") if tokenizer["backend"] == "mistral-common" else ():
            found = partial(lambda key: getattr(folder.recorded_encoder.tokenizer.oracle, key), key)
            yield recompute_field(f"tokenizer.{key}", tokenizer[key], found, file)
    if template:
        digest, file = partial(folder.sha256, template["file"]), path / template["file"]
        yield recompute_field("template.sha256", template["sha256"], digest, file)
        if "probe_sha256" not in template:
            return
        name, recorded, probe = "template.probe_sha256", template["probe_sha256"], template["probe"]
        if probe not in PROBES:
            yield unavailable_field(name, recorded, f"this version has no probe {probe!r}")
        else:
            place = path / data["tokenizer"]["file"]
            yield recompute_field(name, recorded, lambda: probe_sha256(folder.recorded_encoder.encode, probe), place)


def adapter_fields(folder: AdapterFolder) -> Iterator[FieldCheck]:
    """Recompute the values of `adapter_model.safetensors` and `adapter_config.json`."""
    data, config = folder.require_manifest().data, folder.config_file
    lora = data.get("lora")
    if lora is None:
        yield unavailable_field("lora.tensors_sha256", None, "not recorded")
    else:
        computed: dict[str, Callable[[], Any]] = {
            "tensors_sha256": lambda: folder.tensors_sha256,
            "layers": lambda: len(adapted_modules(folder.tensors)),
            "modules": lambda: adapted_modules(folder.tensors),
            "layers_to_transform": lambda: decoder_indices(folder.tensors),
            "parameters": lambda: sum(info.size for info in folder.tensors.values()),
        }
        for key in filter(lora.__contains__, computed):
            yield recompute_field(f"lora.{key}", lora[key], computed[key], folder.tensors_file)
    for name, key in (("base", "base_model_name_or_path"), ("revision", "revision")):
        yield recompute_field(name, data[name], partial(lambda key: folder.config[key], key), config)
    for name, key in _CONFIG_KEYS.items():
        if lora is not None and name in lora:
            yield recompute_field(f"lora.{name}", lora[name], partial(lambda key: folder.config[key], key), config)
    for key in ("rank_pattern", "alpha_pattern"):
        if lora is not None and key in lora:
            yield recompute_field(f"lora.{key}", lora[key], partial(lambda key: folder.config[key], key), config)
    for key in ("target_modules", "modules_to_save"):
        if lora is not None and key in lora:
            names = partial(lambda key: sorted(folder.config[key] or []), key)
            yield recompute_field(f"lora.{key}", lora[key], names, config)


def _base_fields(data: Mapping[str, Any], base: LocatedBase) -> Iterator[FieldCheck]:
    recorded = data.get("base_weights_sha256")
    folder = base.folder
    if folder is None or recorded is None:
        yield unavailable_field("base_weights_sha256", recorded, base.missing or "not recorded")
    else:
        weights = partial(_weights_of_base, folder, recorded)
        yield recompute_field("base_weights_sha256", recorded, weights, folder.path)
    config = data.get("base_config")
    if folder is None or config is None:
        yield unavailable_field("base_config", config, base.missing or "not recorded")
    else:
        now = partial(lambda folder: changed_config(config, folder.canonical_config), folder)
        whole = recompute_field("base_config", config, now, folder.config_file)
        differing = [key for key in config if isinstance(whole.found, dict) and whole.found[key] != config[key]]
        for key in differing:
            yield replace(whole, name=f"base_config.{key}", recorded=config[key], found=whole.found[key])
        if not differing:
            yield whole
    file = oracle_file(folder.path) if folder is not None else None
    if file is not None and folder is not None and "tokenizer" in data:
        digest = partial(folder.tokenizer_files.sha256, file.name)
        yield recompute_field("tokenizer.base_sha256", data["tokenizer"]["sha256"], digest, file)


def _weights_of_base(base: BaseFolder, recorded: str) -> str:
    found = base.weights_sha256
    # the adapter would be applied to its own merge: say so, since two hashes would not explain it
    of_merged = found != recorded and AdapterFolder(base.path).kind == "merged"
    return f"{found}, of a merged model" if of_merged else found


def _parent_fields(folder: AdapterFolder, base: LocatedBase, parent: Path | None) -> Iterator[FieldCheck]:
    recorded, full = folder.require_manifest().data.get("parent", {}), base.folder
    adapter = None if parent is None else AdapterFolder(parent)
    for key in filter(recorded.__contains__, ("manifest_sha256", "tensors_sha256", "correctly_rounded")):
        name, sums = f"parent.{key}", key == "correctly_rounded"
        if adapter is None:
            yield unavailable_field(name, recorded[key], "no parent given")
        elif not sums:
            yield recompute_field(name, recorded[key], partial(getattr, adapter, key), adapter.path)
        elif full is None or recorded.get("dequantized"):
            yield unavailable_field(name, recorded[key], base.missing or "the base in 4 bits was dequantised")
        else:
            is_sum = partial(is_rounded_sum, folder, full, adapter)
            yield recompute_field(name, recorded[key], is_sum, folder.path)
    manifest = adapter.valid_manifest if adapter is not None and recorded else None
    lost = less_proven_than_merged(folder.require_manifest().data, manifest.data) if manifest is not None else []
    if manifest is not None and adapter is not None:
        yield from _listed_fields("parent", adapter)
    if manifest is not None and lost:
        version = f"schema version {manifest.version}; "
        found = f"less is proven than before: {version}{'; '.join(lost)}"
        yield FieldCheck(f"parent.{PROOF}", "mismatch", "in the manifest of the merged model", found, Place.of(parent))


def _dataset_fields(
    folder: AdapterFolder, dataset: Path | Sequence[Path] | None, open_file: Opener | None
) -> Iterator[FieldCheck]:
    data = folder.require_manifest().data
    judgement = data.get("dataset", {}).get("judgement")
    if judgement is not None and not judgement["judged"]:
        yield unavailable_field("dataset.judgement", judgement, "the rows were not judged: trained with --unjudged")
    if dataset is None:
        yield unavailable_field("dataset_sha256", data["dataset_sha256"], "no dataset given")
        return
    train = training_files(data, dataset)
    place = Place.of(", ".join(map(str, train)))
    yield recompute_field("dataset_sha256", data["dataset_sha256"], lambda: sha256_files(train), place)
    if "dataset" not in data:
        return
    eval_paths, entries, eval_entries = (
        held_files(data, dataset),
        data["dataset"]["files"],
        data["dataset"]["eval_files"],
    )
    retained_paths = retention_files(data, dataset)
    retained_entries = data["dataset"].get("retention", {}).get("files", ())
    yield from _hash_fields("dataset.files", entries, train)
    yield from _hash_fields("dataset.eval_files", eval_entries, eval_paths)
    yield from _hash_fields("dataset.retention.files", retained_entries, retained_paths)
    recorded = data["dataset"]["rows_sha256"]
    if open_file is None and any("source" in entry for entry in (*entries, *eval_entries, *retained_entries)):
        yield unavailable_field("dataset.rows_sha256", recorded, "rows were converted, and there is no `open_file`")
        return
    files = open_data_files(data, train, entries, open_file)
    held_out = None if eval_paths is None else open_data_files(data, eval_paths, eval_entries, open_file)
    yield from _row_fields("dataset.files", entries, files)
    retained = None if retained_paths is None else open_data_files(data, retained_paths, retained_entries, open_file)
    yield from _row_fields("dataset.eval_files", eval_entries, held_out or ())
    yield from _row_fields("dataset.retention.files", retained_entries, retained or ())
    if "masking" not in data or "training" not in data:
        yield unavailable_field("dataset.rows_sha256", recorded, "how rows were encoded is not recorded")
        return
    # every row is read and encoded again, by the recorded policies
    for name, found in recount_rows(folder, files, held_out, retained):
        recorded = _recorded_value(data, name)
        if recorded is None:
            continue  # an older manifest, which records less
        if isinstance(found, Exception):
            yield FieldCheck(name, "mismatch", recorded, str(found), place)
        else:
            yield FieldCheck(name, "match" if found == recorded else "mismatch", recorded, found, place)


def _recorded_value(data: Mapping[str, Any], name: str) -> Any:
    """Return the value of a manifest at the name that `recount_rows` yields; None if it records none."""
    if name.startswith(GATE):
        gate = Gate.recorded_in(data)
        lines = [] if gate is None else [line for line in gate.lines if line.name == name.removeprefix(GATE)]
        return {key: getattr(lines[0], key) for key in ("rows", "conversations", "tokens")} if lines else None
    recorded: Any = data
    for key in name.split("."):
        recorded = recorded.get(key) if isinstance(recorded, Mapping) else None
    return recorded


def _restated_fields(folder: AdapterFolder, fields: Sequence[FieldCheck]) -> Iterator[FieldCheck]:
    """Compare the facts that the manifest states twice, but for those that an artifact has disproved already."""
    computed, place = {field.name: field.state for field in fields}, Place.of(folder.manifest_file)
    for fact in restated(folder.require_manifest().data):
        of_artifact = computed.get(fact.name)
        # what a comparison with an artifact says of a value is more than that the record agrees with itself; and of a
        # sum that an artifact confirms, a part is wrong that it disproves
        is_said = of_artifact is not None if fact.agree else of_artifact == "mismatch"
        if not is_said and not (of_artifact == "match" and fact.is_sum):
            state: State = "match" if fact.agree else "mismatch"
            yield FieldCheck(fact.name, state, fact.recorded, fact.found, place, again=fact.again)


def _hash_fields(name: str, entries: Sequence[Mapping[str, Any]], paths: Sequence[Path] | None) -> Iterator[FieldCheck]:
    for index, entry in enumerate(entries):
        field = f"{name}[{index}].sha256"
        if paths is None:
            yield unavailable_field(field, entry["sha256"], "no folder of data files given")
        elif index < len(paths):
            yield recompute_field(field, entry["sha256"], partial(sha256_file, paths[index]), paths[index])


def _row_fields(name: str, entries: Sequence[Mapping[str, Any]], files: Sequence[DataFile]) -> Iterator[FieldCheck]:
    for index, (entry, file) in enumerate(zip(entries, files, strict=False)):
        count = partial(lambda file: sum(1 for _ in read_rows(file)), file)
        yield recompute_field(f"{name}[{index}].rows", entry["rows"], count, file.path)
        for key in _OF_SOURCE if file.source is not None else ():
            # facts of the pass that counted the rows
            fact = partial(lambda file, key: file.source.facts()[key], file, key)
            yield recompute_field(f"{name}[{index}].source.{key}", entry["source"][key], fact, file.path)
