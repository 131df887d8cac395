"""Facts about the base, where it is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizers import oracle_file
from pytest_mistral_lora.records.hashing import sha256_file
from pytest_mistral_lora.records.identity import base_weights_sha256
from pytest_mistral_lora.records.merged import is_merged
from pytest_mistral_lora.records.verify.facts import Fact, absent, computed


def base_facts(data: Mapping[str, Any], base: Path | None) -> Iterator[Fact]:
    """Yield what the manifest says of the base checkpoint."""
    recorded = data.get("base_weights_sha256")
    if base is None:
        yield absent("base_weights_sha256", recorded, "no base given")
        return
    if recorded is None:
        yield absent("base_weights_sha256", recorded, "not recorded")
    else:
        yield computed("base_weights_sha256", recorded, lambda: _weights(base, recorded), base)
    file = oracle_file(base)
    if file is not None and "tokenizer" in data:
        yield computed("tokenizer.sha256", data["tokenizer"]["sha256"], lambda: sha256_file(file), file)


def _weights(base: Path, recorded: str) -> str:
    found = base_weights_sha256(base)
    return f"{found}, of a merged model" if found != recorded and is_merged(base) else found
