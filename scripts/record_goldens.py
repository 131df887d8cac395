"""Record the packaged goldens from mistral-common: `python scripts/record_goldens.py [--check]`."""

from __future__ import annotations

import argparse
import sys

from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder, library_versions, packaged_cases, record


def main() -> int:
    """Rewrite the goldens, or with --check say which would change (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a golden would change")
    check = parser.parse_args().check
    changed = []
    for name in SHIPPED:
        changed += _record_tokenizer(name, check=check)
    if not check:
        _write_provenance()
    print(f"{counted(len(changed), 'golden')} {'would change' if check else 'changed'}")
    return int(check and bool(changed))


def _record_tokenizer(name: str, *, check: bool) -> list[str]:
    tokenizer = CheckpointTokenizer(shipped_tokenizer(name))
    folder = goldens_folder() / "templates" / name
    folder.mkdir(parents=True, exist_ok=True)
    changed = []
    cases = [case for case in packaged_cases() if case.fits(tokenizer.oracle)]
    for case in cases:
        golden = record(case, tokenizer, folder)
        before = golden.path.read_text(encoding="utf-8") if golden.path.is_file() else ""
        if before != golden.text():
            changed.append(f"{name}/{case.name}")
            if not check:
                golden.write()
    for path in set(golden_paths(folder)) - {folder / f"{case.name}.json" for case in cases}:
        changed.append(f"{name}/{path.stem}")
        if not check:
            path.unlink()
    return changed


def _write_provenance() -> None:
    tokenizers = {
        name: {
            "file": shipped_tokenizer(name).name,
            "sha256": CheckpointTokenizer(shipped_tokenizer(name)).oracle.sha256,
        }
        for name in SHIPPED
    }
    data = {
        "recorded_by": "scripts/record_goldens.py",
        "source": "The tokenizer files that mistral-common ships; rows written for this project (goldens/cases.json).",
        "licence": "Apache-2.0",
        "recorded_with": library_versions(),
        "tokenizers": tokenizers,
    }
    write_json(goldens_folder() / "provenance.json", data)


if __name__ == "__main__":
    sys.exit(main())
