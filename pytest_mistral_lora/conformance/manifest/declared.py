"""What a manifest declares, held against what can be seen of it: kind, dtypes, template, base, merge."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.weights import DTYPES
from pytest_mistral_lora.conformance.adapter.files import CONFIG, TENSORS, model_files, read_header, read_object
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.merged import FARTHEST

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")

Data = Mapping[str, Any]


def kind_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield a kind that is not what the folder holds: an adapter and a merged model must never be confused."""
    place = str(folder / MANIFEST)
    adapter = (folder / TENSORS).exists() or (folder / CONFIG).exists()
    model = bool(model_files(folder))
    if data["kind"] == "adapter" and model and not adapter:
        yield Finding("ML707", "kind is adapter, and the folder holds a full model", place, "merged")
    if data["kind"] == "merged" and adapter and not model:
        yield Finding("ML707", "kind is merged, and the folder holds an adapter", place, "adapter")
    if data["kind"] == "merged" and "lora" in data and "parent" not in data:
        yield Finding("ML707", "kind is merged, without a parent", place, "the adapter that was merged")
    if data["kind"] == "adapter" and "parent" in data:
        yield Finding("ML707", "kind is adapter, with the parent of a merged model", place, "merged")


def tensor_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield tensors of another dtype than the run declares."""
    declared = data.get("training", {}).get("adapter_dtype") if data["kind"] == "adapter" else None
    files = [TENSORS]
    if data["kind"] == "merged":
        declared, files = data.get("parent", {}).get("merge_dtype"), [file.name for file in model_files(folder)]
    expected = DTYPES.get(str(declared))
    for name in files if expected else []:
        try:
            dtypes = {info.dtype for info in read_header(inside(folder, name)).values()}
        except InputError:
            continue  # the facts say so
        if dtypes - {expected}:
            found = f"{name} is in {' and '.join(sorted(dtypes))}"
            yield Finding("ML709", found, str(folder / name), f"{declared}, as the manifest says")


def base_findings(base: Path, data: Data, folder: Path) -> Iterator[Finding]:
    """Yield what the run declares of its base and is not so: attention window, vocabulary."""
    from pytest_mistral_lora.checkpoint.base import read_config

    config, place = read_config(base), str(base / "config.json")
    if "sliding_window" in data.get("training", {}):
        recorded, window = data["training"]["sliding_window"], config.get("sliding_window")
        if recorded != window:
            found = f"sliding_window is {window}"
            yield Finding("ML709", found, place, f"{recorded}, as {folder / MANIFEST} says")
    size, rows = data.get("tokenizer", {}).get("vocab_size"), config.get("vocab_size")
    if isinstance(size, int) and isinstance(rows, int) and size > rows:
        found = f"vocab_size is {rows}, and the tokenizer has {size} ids"
        yield Finding("ML709", found, place, "at least as many embeddings as ids")


def merge_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield what a merged model's manifest says against it."""
    parent = data.get("parent") if data["kind"] == "merged" else None
    if parent is None:
        return
    place, dtype = str(folder / MANIFEST), parent["merge_dtype"]
    if dtype not in DTYPES:
        yield Finding("ML710", f"merged in {dtype}", place, "float32, bfloat16 or float16")
    farthest = parent.get("max_abs_logit_difference", 0.0)
    if farthest > FARTHEST.get(dtype, 1.0):
        found = f"logits are up to {farthest:.3g} from those of base and adapter"
        yield Finding("ML710", found, place, f"at most {FARTHEST.get(dtype, 1.0):g}")
    if parent.get("greedy_equal") is False and not parent.get("near_ties"):
        yield Finding("ML710", "it answers otherwise than base and adapter", place, "equal answers")


def template_findings(folder: Path, data: Data) -> Iterator[Finding]:
    """Yield each other place of the folder that stores another template than the one that was trained with.

    Marks of generation blocks do not count: they change no byte of the text.
    """
    if "template" not in data:
        return
    name = data["template"]["file"]
    try:
        trained = _without_marks(inside(folder, name).read_bytes().decode())
    except (InputError, OSError, ValueError):
        return  # the facts say so
    for file in ("tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        text = _stored_template(folder, file) if file != name else None
        if text is not None and _without_marks(text) != trained:
            digest = hashlib.sha256(text.encode()).hexdigest()
            found = f"another chat template, with SHA-256 {digest}"
            yield Finding("ML705", found, str(folder / file), f"that of {name}, which was trained with")


def _without_marks(template: str) -> str:
    return _GENERATION.sub("", template)


def _stored_template(folder: Path, name: str) -> str | None:
    try:
        if name.endswith(".jinja"):
            return inside(folder, name).read_bytes().decode()
        template = read_object(folder, name).get("chat_template")
    except (InputError, OSError, ValueError):
        return None
    return template if isinstance(template, str) else None
