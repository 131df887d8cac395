"""Write the pages of docs/ that are made from tables in the code: `python scripts/write_docs.py [--check]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pytest_mistral_lora.chat.deviations import DEVIATIONS
from pytest_mistral_lora.conformance.rules import RULES
from pytest_mistral_lora.records.files import write_text

DOCS = Path(__file__).parents[1] / "docs"


def deviations_page() -> str:
    """Return the page on named deviations."""
    lines = [
        "# Named deviations",
        "",
        "mistral-common generates a Jinja chat template for every tokenizer it has, and the two are not the same",
        "function. Where they differ on a row, the difference must be one of these, or it is a failure (ML004).",
        "Each is predicted, not just tolerated: the table in `pytest_mistral_lora/chat/deviations.py` says what the",
        "template writes, or which change of the row makes the difference go away.",
        "",
        "This page is made from that table by `scripts/write_docs.py`; each example is run by the tests.",
    ]
    for deviation in DEVIATIONS:
        versions = ", ".join(sorted(deviation.versions, key=lambda version: int(version[1:])))
        lines += [
            "",
            f"## {deviation.id}",
            "",
            f"{deviation.title} {deviation.why}",
            "",
            f"- tokenizer versions: {versions}; kinds: {', '.join(sorted(deviation.kinds))}",
            f"- mistral-common: {deviation.mistral_common}",
            f"- smallest example (on `{deviation.tokenizer}`):",
            "",
            "```json",
            json.dumps(deviation.example, ensure_ascii=False),
            "```",
        ]
    return "\n".join(lines) + "\n"


def rules_page() -> str:
    """Return the page on rules."""
    lines = [
        "# Rules",
        "",
        "Every finding starts with the id of a rule. An id never changes its meaning. This page is made from the table",
        "in `pytest_mistral_lora/conformance/rules.py` by `scripts/write_docs.py`.",
        "",
        "| rule | subject | what must hold | why | what to do | source |",
        "|---|---|---|---|---|---|",
    ]
    for rule in RULES.values():
        cells = (rule.id, rule.subject, rule.title, rule.why, rule.fix, rule.source)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


PAGES = {"deviations.md": deviations_page, "rules.md": rules_page}


def main() -> int:
    """Write the pages, or with --check say which are not up to date (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    check = parser.parse_args().check
    stale = [name for name, page in PAGES.items() if not _is_current(DOCS / name, page())]
    if not check:
        for name in stale:
            write_text(DOCS / name, PAGES[name]())
    for name in stale:
        print(f"{name} {'is not up to date' if check else 'written'}")
    return int(check and bool(stale))


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
