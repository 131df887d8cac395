"""Add an adapter to its base's weights: planned, streamed tensor by tensor, and proven before the folder exists."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4
from pytest_mistral_lora.checkpoint.devices import PRECISIONS
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON
from pytest_mistral_lora.errors import InputError, counted, one_line
from pytest_mistral_lora.records.files import clash, finished_folder, listing, unfinished_path, write_json, write_text
from pytest_mistral_lora.records.manifest import MANIFEST, NOTES_RECORD, build
from pytest_mistral_lora.records.notes import note_texts, notes_record
from pytest_mistral_lora.records.tensors import sha256_tensors
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.generate.model_spec import ModelSpec
from pytest_mistral_lora.training.merge.folders import (
    BASE_DTYPE,
    merge_dtype,
    merge_source,
    refuse_quantized,
    require_full_weights,
    write_companions,
)
from pytest_mistral_lora.training.merge.plan import plan_merge, write_weights, written_size
from pytest_mistral_lora.training.merge.proof import Proof, check_sums, proof_questions, prove
from pytest_mistral_lora.training.output_folder import (
    disk_error,
    ensure_writable_folder,
    explain_disk_errors,
    sole_writer,
)
from pytest_mistral_lora.training.run_metadata import environment

_SCRATCH = ".proof"
"""Folder of the proof's logits, inside the unfinished merged folder."""

_OWN_PARTS = ("schema_version", "kind", "files", "parent", NOTES_RECORD, "seal")
"""Parts of a manifest that describe its own folder; a merged model takes all others from its adapter."""

_MAKE_ROOM = "Nothing is left there. Make room, or name another output folder."


@dataclass(frozen=True)
class MergedModel:
    """A merged model, proven equal to base and adapter within the rounding of its dtype.

    Attributes:
        output: Its folder.
        base: The base's folder.
        manifest: Its manifest.
        notes: Remarks for the user, as sentences.
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
    display: RunDisplay | None = None,
) -> MergedModel:
    """Add an adapter to its base's weights, prove the sum, and write the folder of a model that needs neither.

    Sums are in float64, one tensor at a time, and rounded once. Before the folder exists, each element of its weights
    is compared with that sum. Base and adapter, and then the merged model, answer the same prompts. Both are loaded
    whole, one after the other, in the merged dtype, and compute in float32.

    Args:
        adapter: The adapter's folder, with its manifest; it is not changed.
        output: The folder to make.
        base: The base's folder; by default, the one that the adapter's folder records.
        dtype: dtype of the merged weights: `float32`, `bfloat16`, `float16`, or `base` for the base's own.
        golden: Transcripts with the prompts of the proof; by default the adapter's own, or else its rendered row.
        dequantize: Whether to add the adapter to dequantised weights: of a quantised base, or of a full base that was
            quantised in training.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        display: Display of the progress; None to show nothing.

    Raises:
        InputError: If the folders do not go together, or the output exists; then nothing is written.
        MergeError: If the merged model differs from base and adapter; then nothing is left.
        DiskError: If the output cannot be written; then nothing is left.
    """
    display = display or RunDisplay()
    _check_output(output, adapter, base)
    display.phase("reading base and adapter")
    named = BaseFolder(base) if base is not None else None
    if named is not None and not dequantize:
        refuse_quantized(named)  # before its weights are hashed, which takes time
    spec = merge_source(adapter, named, device=device)
    _check_output(output, adapter, spec.base.path)  # again: the base is known now
    # FP8 weights are dequantised wherever they are read: there is more to do only if training rounded them to 4 bits
    dequantize = dequantize and (spec.quantization is not None or not spec.base.facts.is_fp8)
    with (
        sole_writer(output),
        explain_disk_errors(output, _MAKE_ROOM),
        dequantized(spec, output, wanted=dequantize) as full,
    ):
        weights = require_full_weights(full)
        written = merge_dtype(full, weights, dtype)
        tensors = spec.folder.weights
        changes = plan_merge(spec.folder, full)
        questions = proof_questions(spec.folder, golden)
        needed = written_size(weights, written)
        if shutil.disk_usage(output.parent).free < needed:
            # before the work, which takes minutes for a large model
            shortage = OSError(errno.ENOSPC, f"the merged weights have {needed / 1e6:,.1f} MB")
            raise disk_error(output, shortage, _MAKE_ROOM)
        with finished_folder(output) as folder:
            display.phase(f"writing the merged weights in {written}")
            write_weights(folder, weights, tensors, changes, written, display)
            merged = BaseFolder(folder)
            display.phase("comparing each weight with its exact sum")
            check_sums(merged.file_weights, weights, spec.folder)
            write_companions(folder, merged.file_weights, spec, written)
            tensors_sha256 = sha256_tensors(merged.file_weights)
            identity = {**spec.identity, "kind": "merged", "tensors_sha256": tensors_sha256}
            display.phase(f"comparing answers to {counted(len(questions), 'prompt')} with those of base and adapter")
            in_full = replace(spec, base=full, precision=PRECISIONS[written], quantization=None)
            proof = prove(in_full, merged, questions, dtype=written, identity=identity, scratch=folder / _SCRATCH)
            shutil.rmtree(folder / _SCRATCH)
            (folder / TRANSCRIPTS).mkdir()
            for transcript in proof.transcripts:
                transcript.write(folder / TRANSCRIPTS)
            manifest = _write_manifest(folder, spec, proof, written, dequantize)
    return MergedModel(output, spec.base.path, manifest, tuple(_notes(spec, proof, dequantize)))


@contextmanager
def dequantized(spec: ModelSpec, output: Path, *, wanted: bool) -> Iterator[BaseFolder]:
    """Yield the full weights that the adapter is added to: the base's own, or a temporary one.

    Args:
        spec: Adapter and base.
        output: The merged folder to be made; the temporary folder is beside it.
        wanted: Whether to add the adapter to the dequantised weights.

    Raises:
        InputError: If `wanted` is set but neither the base nor its training was quantised, or if the base cannot be
            dequantised.
    """
    base, precision, device = spec.base, spec.precision, spec.device
    if not wanted:
        yield base
        return
    temporary = unfinished_path(output)
    temporary.mkdir()
    try:
        packed = base.facts.is_packed
        if not packed and spec.quantization is None:
            raise InputError(
                "neither the base nor its training was quantised: its weights are full ones",
                place=str(base),
                next_step="Leave --dequantise out.",
            )
        try:
            # a full base that was trained on in 4 bits is quantised first: the adapter learned to correct those weights
            model = load_base(base, precision, device, packed=True) if packed else load_nf4(base, precision, device)
            model = model.dequantize()
        except (ImportError, NotImplementedError, ValueError) as error:  # transformers' own, by method and library
            found = f"cannot be dequantised: {one_line(error)}"
            raise InputError(found, place=str(base), next_step="Give the full base.") from error
        model.save_pretrained(temporary)
        del model
        yield BaseFolder(temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_output(output: Path, adapter: Path, base: Path | None) -> None:
    if output.exists():
        raise InputError("exists already", place=str(output), next_step="Remove it or name another output folder.")
    for folder in (adapter, *([base] if base else [])):
        if clash(output, folder) in ("is", "is inside"):
            raise InputError(f"is inside {folder}, which a merge does not change", place=str(output))
    ensure_writable_folder(output.parent)


def _write_manifest(folder: Path, spec: ModelSpec, proof: Proof, dtype: str, dequantize: bool) -> dict[str, Any]:
    """Write the notes and the manifest: the adapter's own, with the merged files and their `parent`."""
    identity = spec.identity
    parent = {
        "manifest_sha256": spec.folder.manifest_sha256,
        "tensors_sha256": identity["tensors_sha256"],
        "merge_dtype": dtype,
        "correctly_rounded": True,  # else check_sums would have ended the merge
        "max_abs_logit_difference": proof.max_abs_logit_difference,
        "greedy_equal": proof.greedy_equal,
        "prompts": len(proof.transcripts),
        "near_ties": proof.near_ties,
        "quantization": spec.quantization,
        "dequantized": dequantize,
        "device": spec.device,
        "environment": environment(),
    }
    parts = {key: value for key, value in spec.folder.require_manifest().data.items() if key not in _OWN_PARTS}
    parts |= {"base_weights_sha256": identity["base_weights_sha256"], "kind": "merged", "parent": parent}
    if "tokenizer" in parts:
        # a key may have been added to the tokenizer's configuration; an adapter without one has both files now
        names = (*parts["tokenizer"]["files"], TOKENIZER_JSON, "tokenizer_config.json", "tokenizer.model")
        digests = {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}
        parts["tokenizer"] = {**parts["tokenizer"], "files": digests}
    parts |= notes_record(parts)
    for name, text in note_texts(parts).items():
        write_text(folder / name, text)
    # last: it lists every other file with its hash
    manifest = build(**parts, files=listing(folder))
    write_json(folder / MANIFEST, manifest)
    return manifest


def _notes(spec: ModelSpec, proof: Proof, dequantize: bool) -> Iterator[str]:
    if spec.quantization and not dequantize:
        yield (
            f"The adapter was trained on the base in {spec.quantization}, and is merged into its full weights: the "
            "answers are those of the adapter on the full base. --dequantise merges into the weights of training."
        )
    routing = proof.routing
    if routing.moved:
        yield (
            f"Rounding moves {routing.moved} of {routing.choices} choices of experts, to others that base and adapter "
            "rate nearly as high; with their choices, the logits are theirs. --dtype float32 moves least."
        )
    if proof.near_ties:
        count = len(proof.transcripts)
        tie = "token" if not routing.moved else "token, or a choice of experts,"
        yield f"{proof.near_ties} of {count} answers differ, from a {tie} on that base and adapter hardly prefer."
