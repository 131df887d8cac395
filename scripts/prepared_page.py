"""The tables of docs/prepared.md: how the folders that trainers prepare are judged without messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from scoreboard_records import COLUMNS, RECORDED, ROOT

from pytest_mistral_lora.conformance.encoded.audit import OF_CHAT_ROWS
from pytest_mistral_lora.conformance.encoded.line_judge import BY_IDS
from pytest_mistral_lora.conformance.finding import ENCODED_CASES, RULES
from pytest_mistral_lora.conformance.row_pass import LOST_IN_IDS

PREPARED = RECORDED / "prepared.json"
"""What is recorded, by configuration and tokenizer."""
PAGE = ROOT / "docs" / "prepared.md"
_START, _END = "<!-- prepared: start -->\n", "<!-- prepared: end -->\n"
_SOURCES_START, _SOURCES_END = "<!-- sources: start -->\n", "<!-- sources: end -->\n"
_KINDS = ("packaged", "real")
_MOST_NAMES = 3

LOST_IN_PART: Mapping[str, str] = {
    "ML619": "ids have the arguments as mistral-common spells them: a key that is there twice is there once",
    "ML621": "ids of calls and names of results are not in the ids of each version",
    "ML629": "a text that is marked up for another family is ML584 in ids",
    "ML643": "ids have no schema of the answer, and before v7 the system prompt is a part of the user's text",
    "ML646": "before v7 the system prompt is a part of the user's text",
    "ML649": "the ids of U+2581 are those of a space, which is ML528 or ML529 at the end of an answer",
    "ML651": "ids have neither the schema of the answer nor strict",
    "ML663": "before v7 mistral-common itself writes the system prompt into a text of the user",
}
"""Rules that see conversations that are read back from ids, but not each fault: each with what the ids do not have."""
OF_WHOLE_FILES = frozenset(
    [
        "ML608",
        "ML609",
        "ML624",
        "ML626",
        "ML628",
        "ML630",
        "ML636",
        "ML637",
        "ML638",
        "ML639",
        "ML643",
        "ML644",
        "ML645",
        "ML646",
        "ML647",
        "ML658",
        "ML659",
        "ML660",
        *(f"ML{number}" for number in range(661, 669)),
        "ML671",
        "ML672",
        "ML673",
        "ML674",
    ]
)
"""Rules that only all rows of a file show: they do not fire on a sample, such as the batches of a guard.

Those that are errors of many rows have a note for one row, which fires there: `texts.SIGNS`.
"""


def read_prepared() -> dict[str, dict[str, Any]]:
    """Return what is recorded, by configuration and tokenizer."""
    if not PREPARED.is_file():
        return {}
    records: dict[str, dict[str, Any]] = json.loads(PREPARED.read_text(encoding="utf-8"))
    return records


def prepared_page() -> str:
    """Return the page with its tables."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    _, _, tail = rest.partition(_END)
    tables = "\n".join([*_verdicts(), "", *_differences()])
    head, _, rest = f"{head}{_START}{tables}\n{_END}{tail}".partition(_SOURCES_START)
    _, _, tail = rest.partition(_SOURCES_END)
    sources = "\n".join(_sources())
    return f"{head}{_SOURCES_START}{sources}\n{_SOURCES_END}{tail}"


def _sources() -> Iterator[str]:
    """Yield a table of the sources in which each rule on rows is found, or the reason why it is not."""
    yield "| rule | chat rows | ids with messages | ids alone | guard |"
    yield "|---|---|---|---|---|"
    for case in (*OF_CHAT_ROWS, *ENCODED_CASES):
        for rule in (rule.id for rule in RULES.of("dataset", case)):
            by_ids = BY_IDS.get(rule, "")
            alone = (
                by_ids or LOST_IN_IDS.get(rule) or (f"in part: {LOST_IN_PART[rule]}" if rule in LOST_IN_PART else "yes")
            )
            guard = "no: a sample" if rule in OF_WHOLE_FILES else alone
            yield f"| [{rule}](rules.md#{rule.lower()}) | yes | {by_ids or 'yes'} | {alone} | {guard} |"


def _verdicts() -> Iterator[str]:
    yield "| trainer | configuration | tokenizer | rows | prepared | same | other | not read back |"
    yield "|---|---|---|---|---|---:|---:|---:|"
    records = read_prepared()
    for column in COLUMNS:
        for tokenizer, data in records.get(column.name, {}).items():
            for kind in _KINDS:
                yield _verdict(column.runner.title, f"{column.name} | {tokenizer} | {kind}", data[kind])
    missing = [column.name for column in COLUMNS if column.name not in records]
    if missing:
        yield from ("", f"Not run: {', '.join(missing)}.")


def _verdict(trainer: str, run: str, data: dict[str, Any]) -> str:
    if "refused" in data:
        return f"| {trainer} | {run} | refused | | | |"
    trainer = f"{trainer} {data['version']}"
    if "columns" in data:
        return f"| {trainer} | {run} | no ids: {', '.join(data['columns'])} | | | |"
    cells = " | ".join(str(data[key]) for key in ("same", "other", "not_checked"))
    return f"| {trainer} | {run} | {data['prepared']} of {data['rows']} | {cells} |"


def _differences() -> Iterator[str]:
    yield "| with messages alone | without messages alone | rows | configurations | packaged rows, for example |"
    yield "|---|---|---:|---|---|"
    counts: Counter[tuple[str, str]] = Counter()
    columns: dict[tuple[str, str], list[str]] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for column, tokenizers in read_prepared().items():
        for kind, data in ((kind, data[kind]) for data in tokenizers.values() for kind in _KINDS):
            for difference, (count, *examples) in data.get("differences", {}).items():
                found = _change(difference)
                counts[found] += count
                columns.setdefault(found, []).append(column)
                names.setdefault(found, []).extend(examples if kind == "packaged" else [])
    for found, count in sorted(counts.items()):
        lost, new = (_linked(rules) for rules in found)
        examples = ", ".join(list(dict.fromkeys(names[found]))[:_MOST_NAMES])
        yield f"| {lost} | {new} | {count} | {', '.join(dict.fromkeys(columns[found]))} | {examples} |"


def _change(difference: str) -> tuple[str, str]:
    """Return the rules that are found with messages alone, and those without messages alone."""
    whole, alone = (side.split() for side in difference.split(" → "))
    if "judged" in alone:
        return "any", f"not read back: {' '.join(rule for rule in alone if rule in RULES)}"
    lost = " ".join(rule for rule in whole if rule in RULES and rule not in alone)
    new = " ".join(rule for rule in alone if rule in RULES and rule not in whole)
    return lost or "none", new or "none"


def _linked(rules: str) -> str:
    return " ".join(f"[{word}](rules.md#{word.lower()})" if word in RULES else word for word in rules.split())
