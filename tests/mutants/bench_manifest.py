"""The bench of the subject `manifest`: a trained adapter, its base and rows, and the merged model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_adapter import CONFIG, settings
from declared import declare
from gallery import Artifact
from trained import copied, trained

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

MANIFEST = "manifest.json"
TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.model.v3"
COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"


class ManifestBench:
    """Makes a trained adapter with its base and rows, and the merged model, and judges their manifests."""

    subject = "manifest"

    def make(self, folder: Path) -> Artifact:
        """Make a trained adapter, its base, its rows and the merged model below a folder."""
        source = trained()
        adapter, base, merged = folder / "lora", folder / "base", folder / "merged"
        for one, target in ((source.adapter, adapter), (source.base, base), (source.merged, merged)):
            copied(one, target)
        rows = folder / "rows.jsonl"
        rows.write_bytes(source.rows.read_bytes())
        manifest = json.loads((adapter / MANIFEST).read_text())
        merged_manifest = json.loads((merged / MANIFEST).read_text())
        return {
            "folder": adapter,
            "manifest": manifest,
            "list_file": partial(_list_file, adapter, manifest),
            "base": base,
            "rows": [rows],
            "merged": merged,
            "merged_manifest": merged_manifest,
            "parent": dict(merged_manifest["parent"]),
            "require_manifest": False,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on both folders."""
        torch.set_num_threads(1)
        folder, merged, base = artifact["folder"], artifact["merged"], artifact["base"]
        _write_changed(artifact["manifest"], folder, trained().adapter)
        _write_changed(artifact["merged_manifest"], merged, trained().merged)
        rows = tuple(artifact["rows"])
        folders = [AdapterFolder(path, BaseFolder(base)) for path in (folder, merged)]
        targets = [AdapterTarget(one.path.name, one.path, given=one, dataset=rows, beside=folders) for one in folders]
        chosen = settings(folder, require_manifest=artifact["require_manifest"])
        checks = [check for check in collect(targets, chosen) if check.subject == self.subject]
        return [finding for check in checks for finding in check.run().findings]


BENCH = ManifestBench()


def _write_changed(data: object, folder: Path, source: Path) -> None:
    if (folder / MANIFEST).is_file() and json.loads((source / MANIFEST).read_text()) != data:
        declare(folder, data)


def _list_file(folder: Path, manifest: dict[str, Any], name: str) -> None:
    file = folder / name
    manifest["files"][name] = {"sha256": sha256_file(file), "size": file.stat().st_size}


def _edit(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit adapter_config.json, and list it as it now is."""
    file = artifact["folder"] / CONFIG
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    artifact["list_file"](CONFIG)


def _other_tokenizer() -> Path:
    from pytest_mistral_lora.chat.oracle import shipped_tokenizer

    return shipped_tokenizer("spm-v1")
