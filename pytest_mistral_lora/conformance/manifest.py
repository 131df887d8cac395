"""Is a manifest valid, and is what it says true of the files beside it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.records import manifest as records
from pytest_mistral_lora.records.files import read_json


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder's manifest."""
    yield Check(target, "manifest", "schema", lambda: Result(tuple(manifest_findings(target.folder))))


def manifest_findings(manifest: str | Path | Mapping[str, Any]) -> Iterator[Finding]:
    """Yield one finding for each violation of the schema.

    Args:
        manifest: A `manifest.json`, the folder that holds one, or its content.

    Raises:
        InputError: If the file cannot be read or is not JSON.
    """
    place, data = "", manifest
    if isinstance(manifest, str | Path):
        path = Path(manifest)
        path = path / records.MANIFEST if path.is_dir() else path
        place, data = f"{path}, ", read_json(path)
    for violation in records.violations(data):
        yield Finding("ML701", violation.found, f"{place}{violation.path}", violation.expected)


def verify_findings(folder: Path, *, base: Path | None, dataset: Sequence[Path] | None) -> Iterator[Finding]:
    """Yield one finding for each recorded fact that is not true of the files."""
    from pytest_mistral_lora.records.verify import verify

    for fact in verify(folder, base=base, dataset=dataset):
        if fact.state == "mismatch":
            yield Finding("ML702", f"{fact.name} is {fact.found}", str(fact.place), str(fact.recorded))
