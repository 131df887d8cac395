"""Seal checkpoints, and save a sound adapter with its tokenizer, template, log and manifest, complete or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import TrainerCallback

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.checkpoint.tokenizer_folder import TEMPLATE, TokenizerFiles, own_template
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON
from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.records.data_stats import PROBE, probe_sha256
from pytest_mistral_lora.records.files import finished_folder, listing, set_mode_of_new_file, write_json, write_text
from pytest_mistral_lora.records.manifest import MANIFEST, build
from pytest_mistral_lora.records.notes import note_texts, notes_record
from pytest_mistral_lora.records.restated import TRAINING_LOG
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS, sha256_tensors
from pytest_mistral_lora.training.adapter import expected_names
from pytest_mistral_lora.training.run_folder import LIST, checkpoints, is_complete

_KEPT_CHECKPOINTS = 2
"""The newest checkpoint, and one to fall back to."""


class SealCheckpoint(TrainerCallback):
    """Lists the files of each checkpoint after all processes have written; only then removes an older checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        # Trainer's save_total_limit removes an old checkpoint first: a kill in between would leave no complete one
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            work = Path(args.output_dir)
            checkpoint = work / f"checkpoint-{state.global_step}"
            write_json(checkpoint / LIST, listing(checkpoint))
            complete = [path for path in checkpoints(work) if is_complete(path)]
            for old in complete[:-_KEPT_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)


RENDERED = "rendered_row.json"
_COMPANIONS = (TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Adapter:
    """A trained adapter in memory.

    Attributes:
        tensors: Its tensors by the names of the file, float32 on the CPU.
        initial: The same before the first step.
        layers: The adapted layers, by dotted name.
        config: PEFT's configuration of it.
        saved: The modules that are trained and saved in full, by dotted name.
    """

    tensors: Mapping[str, torch.Tensor]
    initial: Mapping[str, torch.Tensor]
    layers: Sequence[str]
    config: Any
    saved: Sequence[str] = ()


def check_adapter(adapter: Adapter) -> None:
    """Refuse an adapter that would do nothing, or damage the model.

    Raises:
        TrainingError: If a tensor is missing, unexpected, not float32 or not finite, or if a layer did not change.
    """
    expected = expected_names(adapter.layers, dora=adapter.config.use_dora, saved=adapter.saved)
    odd = sorted(adapter.tensors.keys() ^ expected)
    if odd:
        raise TrainingError(f"{odd[0]} is {'missing' if odd[0] in expected else 'not a tensor of the adapter'}")
    for name, tensor in adapter.tensors.items():
        if tensor.dtype != torch.float32:
            raise TrainingError(f"{name} is {tensor.dtype}", expected="float32")
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{name} is not finite", next_step="Nothing is saved. Lower the learning rate.")
        # a new lora_B is zero, so that lora_A gets no gradient in the first step: one step moves lora_B alone
        is_idle = ".lora_A." in name and not adapter.initial[name.replace(".lora_A.", ".lora_B.")].any()
        if not is_idle and (not tensor.any() or torch.equal(tensor, adapter.initial[name])):
            raise TrainingError(
                f"{name} did not move: this layer learned nothing",
                next_step="Nothing is saved. Check training.learning_rate and steps.",
            )


def write_adapter(folder: Path, adapter: Adapter, *, base: str, revision: str | None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, the same bytes for the same adapter.

    Args:
        folder: An existing folder.
        adapter: The adapter.
        base: The base's name in the configuration.
        revision: The base's commit, or None for a local base.
    """
    weights = folder / ADAPTER_TENSORS
    save_file(dict(adapter.tensors), weights, metadata={"format": "pt"})
    set_mode_of_new_file(weights)  # safetensors makes it readable by its owner only
    config = copy.copy(adapter.config)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(folder)
    file = folder / "adapter_config.json"
    data = read_json(file)
    for key in ("target_modules", "modules_to_save"):
        # PEFT writes the list of a set, in an order that changes from process to process
        data[key] = data[key] and sorted(data[key])
    write_json(file, {key: data[key] for key in sorted(data)})


def write_run(
    output: Path,
    adapter: Adapter,
    *,
    encoder: Encoder,
    base_folder: Path,
    first_row: tuple[Row, EncodedRow],
    log: Iterable[Mapping[str, Any]],
    facts: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the folder of a finished run and return its manifest.

    Args:
        output: The folder to make.
        adapter: The trained adapter; it is checked first.
        encoder: The backend of the run.
        base_folder: The base checkpoint, whose tokenizer files are copied.
        first_row: A training row, to be rendered token by token.
        log: Lines of the training log.
        facts: The parts of the manifest that do not come from the folder.
        texts: Content of other files, by their names relative to the folder.

    Raises:
        TrainingError: If the adapter is not sound; then nothing is written.
        InputError: If `output` exists.
    """
    check_adapter(adapter)
    with finished_folder(output) as folder:
        write_adapter(folder, adapter, base=facts["base"], revision=facts["revision"])
        measured = {
            "layers": len(adapter.layers),
            "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
            "tensors_sha256": sha256_tensors(adapter.tensors),
        }
        parts = {**facts, "kind": "adapter", "lora": {**facts["lora"], **measured}}
        parts["tokenizer"] = _write_tokenizer(folder, encoder, base_folder)
        parts["template"] = _write_template(folder, encoder, base_folder)
        write_json(folder / RENDERED, rendered(encoder, *first_row))
        # sorted, as a checkpoint's state keeps them: a resumed run writes the same bytes
        write_text(
            folder / TRAINING_LOG, "".join(json.dumps(line, allow_nan=False, sort_keys=True) + "\n" for line in log)
        )
        for name, text in (texts or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_text(folder / name, text)
        parts |= notes_record(parts)
        for name, text in note_texts(parts).items():
            write_text(folder / name, text)
        manifest = build(**parts, files=listing(folder))
        write_json(folder / MANIFEST, manifest)
    return manifest


def _write_tokenizer(folder: Path, encoder: Encoder, base: Path) -> dict[str, Any]:
    recorded_oracle, copied = oracle_file(base), {encoder.file_name: encoder.file}
    copied |= {recorded_oracle.name: recorded_oracle} if recorded_oracle else {}
    copied |= {name: base / name for name in _COMPANIONS if (base / name).is_file()}
    for name, file in copied.items():
        shutil.copyfile(file, folder / name)  # with the mode that the umask asks for, not that of the base
    by_oracle = recorded_oracle is not None or encoder.backend == "mistral-common"
    recognised = {} if recorded_oracle or not by_oracle else {"x-oracle": encoder.tokenizer.recognition.text}
    return {
        "backend": encoder.backend,
        "version": encoder.tokenizer.oracle.version if by_oracle else None,
        "file": encoder.file_name,
        "sha256": sha256_file(folder / encoder.file_name),
        "files": {name: sha256_file(folder / name) for name in copied},
        "vocab_size": encoder.vocab_size,
        **recognised,
    }


def _write_template(folder: Path, encoder: Encoder, base: Path) -> dict[str, Any]:
    files = encoder.tokenizer.files if encoder.tokenizer.path == base else TokenizerFiles(base)
    # keep every character of the file: Jinja drops the last newline, but the file's hash includes it
    source, text = "checkpoint", files.text(TEMPLATE) or own_template(files)
    if encoder.backend == "chat-template":
        text = encoder.tokenizer.template.source
        source = "checkpoint" if (base / TOKENIZER_JSON).is_file() else "mistral-common"
    elif text is None:
        source, text = "mistral-common", encoder.tokenizer.oracle.chat_template()
    write_text(folder / TEMPLATE, str(text))
    probed = {"probe": PROBE, "probe_sha256": probe_sha256(encoder.encode)}
    return {"source": source, "file": TEMPLATE, "sha256": sha256_file(folder / TEMPLATE), **probed}


def rendered(encoder: Encoder, row: Row, encoded: EncodedRow) -> dict[str, Any]:
    """Return a row with the model's input: its ids, their pieces, labels and spans, as plain JSON data."""
    return {
        **row.to_json(),
        "input_ids": list(encoded.input_ids),
        "pieces": [encoder.piece(token) for token in encoded.input_ids],
        "labels": list(encoded.labels or ()),
        "spans": [span.to_json() for span in encoded.spans],
    }
