"""What the hashes of a manifest are computed from: base weights, data files, adapter tensors; and the split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base import weight_files
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.hashing import canonical_json, sha256_bytes, sha256_file

if TYPE_CHECKING:
    import torch


ADAPTER_TENSORS = "adapter_model.safetensors"
"""The file of an adapter's tensors, as PEFT names it."""


def sha256_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one file's bytes, or of several files: over their hex digests in order, one a line.

    For several, `sha256sum FILES | cut -d" " -f1 | sha256sum` prints the same.

    Raises:
        InputError: If a file cannot be read.
    """
    return joint_sha256([sha256_file(path) for path in paths])


def joint_sha256(digests: Sequence[str]) -> str:
    """Return what `sha256_files` returns for files whose own hashes are known."""
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(f"{digest}\n" for digest in digests).encode())


def base_weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's safetensors files, in name order.

    Raises:
        PinError: If the folder has none.
    """
    return sha256_files(weight_files(folder))


def base_weights_command(folder: Path) -> str:
    """Return a shell command that prints what `base_weights_sha256` returns."""
    several = "" if (folder / "model.safetensors").is_file() else ' | cut -d" " -f1 | sha256sum'
    return f"sha256sum {folder}/model*.safetensors{several}"


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU.

    Raises:
        InputError: If it is not a safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"not a safetensors file: {error}", place=str(file)) from error
    return tensors


def is_held_out(row: Row, fraction: float) -> bool:
    """Say on which side of a split a row is: its own content decides, so equal rows are never on both sides."""
    digest = sha256_bytes(canonical_json(row.to_json()))
    return int(digest[:13], 16) / 16**13 < fraction
