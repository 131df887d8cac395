"""Facts about the adapter that a merged model was made of, where it is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import sha256_file, sha256_tensors
from pytest_mistral_lora.records.identity import read_tensors
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify.adapter import TENSORS
from pytest_mistral_lora.records.verify.facts import Fact, absent, computed


def parent_facts(data: Mapping[str, Any], parent: Path | None) -> Iterator[Fact]:
    """Yield what a merged model's manifest says of its adapter."""
    computations = {
        "manifest_sha256": lambda folder: sha256_file(inside(folder, MANIFEST)),
        "tensors_sha256": lambda folder: sha256_tensors(read_tensors(inside(folder, TENSORS))),
    }
    for key, compute in computations.items() if "parent" in data else ():
        name, recorded = f"parent.{key}", data["parent"][key]
        if parent is None:
            yield absent(name, recorded, "no parent given")
        else:
            yield computed(name, recorded, lambda compute=compute: compute(parent), parent)
