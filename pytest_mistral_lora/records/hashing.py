"""Hashes that identify artifacts: bytes, chat rows, tensors, folders.

Each scheme frames its parts with their lengths, so that two different lists can never hash alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.base_model import weight_files
from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.chat.rows import Row


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex, as `sha256sum` prints it.

    Raises:
        InputError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from error


def canonical_json(value: Any) -> bytes:
    """Return JSON in one form only: keys sorted, no spaces, UTF-8, finite numbers.

    Close to RFC 8785 but not it (floats and key order follow Python); Unicode is not normalised, since that would
    change tokens.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_rows(rows: Iterable[Row]) -> str:
    """Return the SHA-256 of chat rows in order: blind to key order and line endings, not to any content."""
    return sha256_parts(map(framed_row, rows))


def sha256_ids(encoded: Iterable[Iterable[int]]) -> str:
    """Return the SHA-256 of sequences of integers (ids or labels), each as length-framed JSON."""
    return sha256_parts(map(framed_ids, encoded))


def sha256_parts(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of bytes that come in parts, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def framed_row(row: Row) -> bytes:
    """Return the bytes that `sha256_rows` hashes for one row."""
    return _framed(canonical_json(row.to_json()))


def framed_ids(sequence: Iterable[int]) -> bytes:
    """Return the bytes that `sha256_ids` hashes for one sequence."""
    return _framed(canonical_json(list(sequence)))


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of named tensors: name, dtype, shape and little-endian bytes, in name order.

    Unlike the hash of a safetensors file, it does not depend on the file's header or metadata.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        digest.update(_framed(canonical_json(header)))
        digest.update(_framed(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()))
    return digest.hexdigest()


def _framed(data: bytes) -> bytes:
    # without the length, the parts "ab", "c" and "a", "bc" would hash alike
    return len(data).to_bytes(8, "little") + data


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
    """Return the result of `sha256_files` for files with these hashes."""
    return digests[0] if len(digests) == 1 else sha256_bytes("".join(f"{digest}\n" for digest in digests).encode())


def base_weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's safetensors files, in name order.

    Raises:
        PinError: If the folder has none.
    """
    return sha256_files(weight_files(folder))


def base_weights_command(folder: Path) -> str:
    """Return a shell command that prints the result of `base_weights_sha256`."""
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
    """Return whether a row is held out: its own content decides, so equal rows are never on both sides of a split."""
    # 13 hex digits are 52 bits: every such integer has an exact float.
    digest = sha256_bytes(canonical_json(row.to_json()))
    return int(digest[:13], 16) / 16**13 < fraction
