"""Record the examples in the files of the rules again: `python scripts/write_rule_examples.py [SUBJECT ...]`.

Run it after a change of a report, or of a bench or an example in tests/mutants/, and then scripts/write_docs.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RULES = [ROOT / "pytest_mistral_lora" / room / "rules" for room in ("conformance", "field")]
sys.path[:0] = [str(ROOT / "tests" / "mutants"), str(ROOT / "tests" / "support")]

from gallery import benches  # noqa: E402
from rule_examples import make_example  # noqa: E402

KEYS = (
    "title",
    "fault",
    "case",
    "class",
    "severity",
    "proof",
    "since",
    "error_since",
    "why",
    "fix",
    "by_program",
    "source",
)
EXAMPLE_KEYS = ("fault", "excerpt", "row", "table", "finding", "command", "sound")
RECORDED = ("row", "table", "finding")


def main() -> int:
    """Record the examples of the given subjects, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="subjects to record (default: all)")
    for subject in parser.parse_args().subjects or benches():
        for path in (folder / f"{subject}.toml" for folder in RULES):
            if path.exists():
                record(path, subject)
    return 0


def record(path: Path, subject: str) -> None:
    """Record the examples of a file."""
    rules = tomllib.loads(path.read_text(encoding="utf-8"))
    for rule_id, rule in rules.items():
        with tempfile.TemporaryDirectory() as folder:
            made = make_example(subject, rule_id, Path(folder))
        rule["example"].update({key: getattr(made, key) for key in RECORDED})
        print(rule_id, *sorted(made.fired - {rule_id}))
    path.write_text(rules_file(rules), encoding="utf-8")


def rules_file(rules: dict[str, dict[str, Any]]) -> str:
    """Return rules as TOML, with their keys in one order and without empty values."""
    lines = ["# `example.row`, `.table` and `.finding` are recorded by scripts/write_rule_examples.py."]
    for rule_id, rule in rules.items():
        names = rule.get("names", {})
        tables = (
            (rule_id, KEYS, rule),
            *([(f"{rule_id}.names", tuple(names), names)] if names else ()),
            (f"{rule_id}.example", EXAMPLE_KEYS, rule["example"]),
        )
        for header, keys, table in tables:
            lines += ["", f"[{header}]", *(f"{key} = {_toml(table[key])}" for key in keys if table.get(key))]
    return "\n".join(lines) + "\n"


def _toml(text: str | list[str] | bool) -> str:
    if isinstance(text, bool):
        return str(text).lower()
    if isinstance(text, list):
        return f"[{', '.join(map(_toml, text))}]"
    # Rows and tables stay readable in literal strings; JSON's escapes are TOML's.
    if "\n" in text and "'''" not in text:
        return f"'''\n{text}'''"
    if "\\" in text or ('"' in text and "'" not in text):
        return f"'{text}'" if "'" not in text else json.dumps(text, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
