"""The page of the known faults of other programs, from the files of facts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_mistral_lora.programs.facts import Fact, Works, programs

DOCS = Path(__file__).parents[1] / "docs"

_HEADER = """\
# Known faults of libraries and servers

To see which of these your installation has, run `mistral-lora doctor`; `mistral-lora serve-check` names those of the
server that it judges. If a finding can have one of these causes, the summary says so:

```text
known of transformers 5.23.0 (ML004): a SentencePiece file without a tokenizer.json is converted […]. Change: pip install 'transformers>=5.24'
```
"""  # noqa: E501 (the line as it is printed)

_METHOD = """
Each fault was seen with the versions in its entry. For a program that is newer, you read
`seen with 5.24.0, you run 5.31.0: not checked`: nobody has looked yet whether it still has the fault. To accept the
findings of a fault, [list its name](suite.md#accept-a-known-deviation).

`run` as proof means that this project ran it and saw it, `read` that it was read in the source of the program, and
`reported` that an issue or a pull request says so. The scripts that reproduce a fault are in
`pytest_mistral_lora/field/facts/reproductions/`, and run each week with the newest release of the program.

This page is made by `scripts/write_docs.py` from the files in `pytest_mistral_lora/field/facts/`. To add a fault, see
[contributing](contributing.md#a-fact-about-another-program)."""


def known_faults_page() -> str:
    """Return the page."""
    known = sorted(programs().values(), key=lambda program: program.title.lower())
    faults = [fault for program in known for fault in program.faults]
    lines = [*_HEADER.splitlines(), "", "| fault | of | mended in | rules |", "|---|---|---|---|"]
    lines += [_row(fault) for fault in faults]
    lines += _METHOD.splitlines()
    for program in known:
        if program.faults:
            lines += ["", f"## {program.title}", *(line for fault in program.faults for line in _entry(fault))]
    columns = ("versions", "use", "seen on", "proof", "source")
    lines += ["", "## Versions that work", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [_works(works) for program in known for works in program.works]
    return "\n".join(lines) + "\n"


def _row(fault: Fact) -> str:
    ranges = ", ".join(f"{name} {range_.removeprefix('==')}" for name, range_ in fault.ranges.items())
    return f"| [{fault.id}](#{fault.id}) | {_plain(ranges)} | {_named(fault.until) or 'open'} | {_rules(fault)} |"


def _entry(fault: Fact) -> Iterator[str]:
    yield from ("", f"### {fault.id}", "", f"{_plain(fault.symptom)}.", "")
    yield f"- way out: {_plain(fault.way_out)}"
    yield f"- seen on {fault.seen_on} with {_named(fault.seen_with)}; proof: {fault.proof}"
    yield f"- source: {_source(fault.source)}"
    if fault.checks:
        yield f"- checks of answers: {', '.join(f'`{check}`' for check in fault.checks)}"
    script, reason = fault.reproduction.script, fault.reproduction.not_run
    yield f"- reproduced by: `{script}`" if script else f"- not reproduced each week: {_plain(reason)}"


def _works(works: Works) -> str:
    cells = (_named(works.versions), _plain(works.use), works.seen_on, works.proof, _source(works.source))
    return f"| {' | '.join(map(str, cells))} |"


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _rules(fault: Fact) -> str:
    return ", ".join(f"[{rule}](rules.md#{rule.partition('.')[0].lower()})" for rule in fault.rules)


def _plain(text: str) -> str:
    """Return a text as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_\[\]<>&|])", r"\\\1", text)


def _source(source: str) -> str:
    if (DOCS.parent / source).is_file():
        page = os.path.relpath(DOCS.parent / source, DOCS)
        return f"[{source.removeprefix('docs/')}]({Path(page).as_posix()})"
    return f"<{source}>" if source.startswith("https://") else _plain(source)
