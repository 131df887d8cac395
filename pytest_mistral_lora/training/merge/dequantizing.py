"""Full weights from quantised ones: what the packed numbers of a base, or of a base in training, stand for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_mistral_lora.checkpoint.base import load_base, load_nf4, read_config
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.merge.source import Source


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
