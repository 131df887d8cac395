"""Full weights from quantised ones: what the packed numbers of a base, or of a base in training, stand for."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4, read_config
from pytest_mistral_lora.checkpoint.pins import TEXT_FILES
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import (
    finished_folder,
    listing,
    remove_temporaries,
    write_json,
    write_text,
)
from pytest_mistral_lora.records.hashing import sha256_tensors
from pytest_mistral_lora.records.manifest import MANIFEST, build
from pytest_mistral_lora.records.notes import note_texts
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.merge.plan import plan, write_weights, written_size
from pytest_mistral_lora.training.merge.prove import Proof, prove, questions
from pytest_mistral_lora.training.merge.source import (
    BASE_DTYPE,
    Source,
    merge_dtype,
    refuse_quantized,
    require_full_weights,
    weights_of,
)
from pytest_mistral_lora.training.run_metadata import environment
from pytest_mistral_lora.training.work_folder import disk_error, require_writable


@contextmanager
def dequantized(source: Source, output: Path, *, asked: bool) -> Iterator[Path]:
    """Give the folder of the full weights that the adapter is added to: the base's own, or a temporary one.

    Args:
        source: Adapter and base.
        output: The merged folder to be; the temporary one is beside it.
        asked: Whether what quantised weights stand for is wanted.

    Raises:
        InputError: If it is, and neither the base nor its training was quantised, or the base cannot be dequantised.
    """
    if not asked:
        yield source.adapted.base
        return
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        _write_full(source, temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_full(source: Source, folder: Path) -> None:
    base, precision, device = source.adapted.base, source.adapted.precision, source.adapted.device
    packed = bool(read_config(base).get("quantization_config"))
    if not packed and source.quantization is None:
        raise InputError(
            "neither the base nor its training was quantised: its weights are full ones",
            place=str(base),
            next_step="Leave --dequantise out.",
        )
    try:
        model = load_base(base, precision, device) if packed else load_nf4(base, precision, device)
        model = model.dequantize()
    except (ImportError, NotImplementedError, ValueError) as error:  # transformers' own, by method and library
        cause = " ".join(str(error).split())
        raise InputError(f"cannot be dequantised: {cause}", place=str(base), next_step="Give the full base.") from error
    model.save_pretrained(folder)


_SCRATCH = ".proof"
_OWN_PARTS = ("schema_version", "kind", "files", "parent", "seal")
"""Parts of a manifest that are the folder's own; all others are the adapter's."""

_MAKE_ROOM = "Nothing is left there. Make room, or name another output folder."


@dataclass(frozen=True)
class Merged:
    """A merged model that is what base and adapter are.

    Attributes:
        output: Its folder.
        base: The base's folder.
        manifest: Its manifest.
        notes: What a reader should know of it.
    """

    output: Path
    base: Path
    manifest: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the merge as plain JSON data."""
        return {
            "output": str(self.output),
            "base": str(self.base),
            "parent": self.manifest["parent"],
            "notes": list(self.notes),
        }


def merge(
    adapter: Path,
    output: Path,
    base: Path | None = None,
    *,
    dtype: str = BASE_DTYPE,
    golden: Path | None = None,
    dequantize: bool = False,
    device: str = "auto",
    progress: bool = False,
) -> Merged:
    """Add an adapter to its base's weights, prove it, and write the folder of a model that needs neither.

    Sums are in float32, one tensor at a time. Before the folder is there, base and adapter and then the merged model
    answer the same prompts; both are loaded whole, one after the other, in the merged dtype, and compute in float32.

    Args:
        adapter: The adapter's folder, with its manifest; it is not changed.
        output: The folder to make.
        base: The base's folder; by default, the one that the adapter's folder names.
        dtype: dtype of the merged weights: `float32`, `bfloat16`, `float16`, or `base` for the base's own.
        golden: Transcripts whose prompts are asked; by default the adapter's own, or else its rendered row.
        dequantize: Whether to add the adapter to what quantised weights stand for: those of the base, or, of a full
            base, those that the adapter was trained on in 4 bits.
        device: Where the models answer: `auto`, `cpu` or `cuda`.
        progress: Whether to show a bar on stderr.

    Raises:
        InputError: If the folders do not go together, or the output exists; then nothing is written.
        MergeError: If the merged model is not what base and adapter are; then nothing is left.
        DiskError: If the output cannot be written; then nothing is left.
    """
    _check_output(output, adapter, base)
    if base is not None and not dequantize:
        refuse_quantized(base)  # before its weights are hashed, which takes time
    source = Source.find(adapter, base, device=device)
    found = source.adapted.base
    _check_output(output, adapter, found)  # now the base is known where it was not given
    remove_temporaries(output)
    with _explained(output), dequantized(source, output, asked=dequantize) as full:
        weights = weights_of(full)
        require_full_weights(full, weights)
        written = merge_dtype(full, weights, dtype)
        changes = plan(adapter, source.tensors, full, weights)
        adapted = source.on(full, written)
        asked = questions(adapted, golden)
        _check_room(output, written_size(weights, written))
        with finished_folder(output) as folder:
            write_weights(folder, weights, source.tensors, changes, written, progress=progress)
            _write_companions(folder, source, written)
            identity = _identity(source, folder)
            proof = prove(adapted, folder, asked, dtype=written, identity=identity, scratch=folder / _SCRATCH)
            shutil.rmtree(folder / _SCRATCH)
            (folder / TRANSCRIPTS).mkdir()
            for transcript in proof.transcripts:
                transcript.write(folder / TRANSCRIPTS)
            manifest = _write_manifest(folder, source, _parent(source, written, proof, dequantize))
    return Merged(output, found, manifest, tuple(_notes(source, proof, dequantize)))


def _check_output(output: Path, adapter: Path, base: Path | None) -> None:
    if output.exists():
        raise InputError("exists already", place=str(output), next_step="Remove it or name another output folder.")
    for folder in (adapter, *([base] if base else [])):
        if output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"is inside {folder}, which a merge does not change", place=str(output))
    require_writable(output.parent)


def _check_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        shortage = OSError(errno.ENOSPC, f"the merged weights have {needed / 1e6:,.1f} MB")
        raise disk_error(output, shortage, _MAKE_ROOM)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """Say what to do when the output cannot be written.

    Raises:
        DiskError: If the block ends in an error of the file system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers', of a model that it does not load
        raise disk_error(output, error, _MAKE_ROOM) from error


def _write_companions(folder: Path, source: Source, dtype: str) -> None:
    """Write what makes weights a model: the base's configuration, and the tokenizer that was trained with."""
    adapter, base = source.adapted.adapter, source.adapted.base
    config = {key: value for key, value in read_config(base).items() if key != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_json(folder / "config.json", {**config, key: dtype})
    generation = base / "generation_config.json"
    listed = (name for name in source.manifest["files"] if any(fnmatch(name, one) for one in TEXT_FILES))
    for file in (*([generation] if generation.is_file() else []), *(adapter / name for name in listed)):
        shutil.copyfile(file, folder / file.name)


def _identity(source: Source, folder: Path) -> dict[str, Any]:
    """Return the `model` of the merged model's transcripts."""
    return {
        **source.adapted.identity,
        "kind": "merged",
        "tensors_sha256": sha256_tensors(weights_of(folder)),
    }


def _parent(source: Source, dtype: str, proof: Proof, dequantize: bool) -> dict[str, Any]:
    """Return the manifest's `parent`: the adapter that was merged, and how the two compare."""
    return {
        "manifest_sha256": source.manifest_sha256,
        "tensors_sha256": source.adapted.identity["tensors_sha256"],
        "merge_dtype": dtype,
        "max_abs_logit_difference": proof.max_abs_logit_difference,
        "greedy_equal": proof.greedy_equal,
        "prompts": len(proof.transcripts),
        "near_ties": proof.near_ties,
        "quantization": source.quantization,
        "dequantized": dequantize,
        "device": source.adapted.device,
        "environment": environment(),
    }


def _write_manifest(folder: Path, source: Source, parent: Mapping[str, Any]) -> dict[str, Any]:
    """Write the notes and the manifest: all that the adapter's says, of a merged model, with these files."""
    parts = {key: value for key, value in source.manifest.items() if key not in _OWN_PARTS}
    parts |= {"base_weights_sha256": source.adapted.identity["base_weights_sha256"], "kind": "merged", "parent": parent}
    for name, text in note_texts(parts).items():
        write_text(folder / name, text)
    manifest = build(**parts, files=listing(folder))
    write_json(folder / MANIFEST, manifest)
    return manifest


def _notes(source: Source, proof: Proof, dequantize: bool) -> Iterator[str]:
    if source.quantization and not dequantize:
        yield (
            f"The adapter was trained on the base in {source.quantization}, and is merged into its full weights: the "
            "answers are those of the adapter on the full base. --dequantise merges into the weights of training."
        )
    if proof.near_ties:
        asked = len(proof.transcripts)
        yield f"{proof.near_ties} of {asked} answers differ, from a token on that base and adapter hardly prefer."
