"""Facts about the adapter that a merged model was made of, where it is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import sha256_file, sha256_tensors
from pytest_mistral_lora.records.identity import ADAPTER_TENSORS, read_tensors
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify.facts import Fact, absent, computed


def parent_facts(data: Mapping[str, Any], parent: Path | None) -> Iterator[Fact]:
    """Yield what a merged model's manifest says of its adapter."""
    for key, compute in _COMPUTED.items() if "parent" in data else ():
        name, recorded = f"parent.{key}", data["parent"][key]
        if parent is None:
            yield absent(name, recorded, "no parent given")
        else:
            yield computed(name, recorded, partial(compute, parent), parent)


def _manifest_sha256(adapter: Path) -> str:
    return sha256_file(inside(adapter, MANIFEST))


def _tensors_sha256(adapter: Path) -> str:
    return sha256_tensors(read_tensors(inside(adapter, ADAPTER_TENSORS)))


_COMPUTED = {"manifest_sha256": _manifest_sha256, "tensors_sha256": _tensors_sha256}
