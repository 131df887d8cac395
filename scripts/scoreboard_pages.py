"""The tables of docs/scoreboard/, made from what is recorded when the site is built."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from textwrap import shorten

import scoreboard_layers
from scoreboard_records import (
    COLUMNS,
    DERIVED,
    HUB,
    PAGES,
    PAIR_COLUMNS,
    PAIR_TOKENIZERS,
    ROOT,
    TOKENIZERS,
    Column,
    Example,
    Recorded,
    record_verdicts,
)

from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.records.goldens import PairCase, packaged_cases, packaged_pairs
from pytest_mistral_lora.runners.given_rows import by_record, preference_rows

OURS = "pytest-mistral-lora"
"""This package's own trainer: its row and its columns are sound, as the tests judge each of its encodings."""

_MADE = re.compile(r"<!-- made: (\w+) -->")

_REFUSED = {case.name for case in packaged_pairs() if case.is_refused}
"""Pairs that no trainer can encode as mistral-common does: they count neither as sound nor as wrong."""


def pages() -> dict[str, str]:
    """Return the pages of docs/scoreboard/ with their tables, by their paths in docs/."""
    parts = {
        "configurations": _own_configurations,
        "heat": partial(_heat, COLUMNS, TOKENIZERS),
        "summary": _own_summary,
        "layers": scoreboard_layers.table,
        "real": _real,
        "rows": _rows,
        "pairs": _pairs,
        "pair_configurations": partial(_configurations, PAIR_COLUMNS),
        "pair_heat": partial(_heat, PAIR_COLUMNS, PAIR_TOKENIZERS),
        "pair_summary": partial(_summary, PAIR_COLUMNS, PAIR_TOKENIZERS),
        "pair_rows": _pair_rows,
        "reproductions": _reproductions,
    }
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    return {
        f"scoreboard/{name}": _MADE.sub(lambda made: "\n".join(parts[made[1]]()), text) for name, text in texts.items()
    }


def _own_configurations() -> Iterator[str]:
    yield from _configurations(COLUMNS)
    yield f"| {OURS} | this package's own trainer, `backend: mistral-common` | | | `mistral-lora train recipe.yaml` |"


def _configurations(columns: Sequence[Column]) -> Iterator[str]:
    yield "| configuration | description | versions | recorded | command for one column |"
    yield "|---|---|---|---|---|"
    for column in columns:
        link = f"[{column.name}](../../{column.config.relative_to(ROOT).as_posix()})"
        runs = column.recorded.items()
        versions = _grouped({name: _versions(run.environment) for name, run in runs})
        dates = _grouped({name: run.date for name, run in runs})
        yield f"| {link} | {column.about} | {versions} | {dates} | `{column.command('TOKENIZER')}` |"


def _grouped(by_tokenizer: dict[str, str]) -> str:
    """Return the value of all tokenizers, or each value with its tokenizers."""
    groups: dict[str, list[str]] = {}
    for tokenizer, value in by_tokenizer.items():
        groups.setdefault(value, []).append(tokenizer)
    several = len(groups) > 1
    return "<br>".join(f"{', '.join(names)}: {value}" if several else value for value, names in groups.items())


def _versions(environment: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.items() if version != "not installed")


def _head(first: str, names: Collection[str]) -> Iterator[str]:
    """Yield the head of a table: the first column's name, and those of the others."""
    yield f"| {first} | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)


def _heat(columns: Sequence[Column], tokenizers: Sequence[str]) -> Iterator[str]:
    """Yield the share of sound rows or pairs of each configuration and tokenizer; each cell leads to its causes."""
    yield from _head("configuration", tokenizers)
    for column in columns:
        cells = [_heat_cell(column, name) for name in tokenizers]
        yield f"| {column.name} | {' | '.join(cells)} |"


def _heat_cell(column: Column, tokenizer: str) -> str:
    run = column.recorded.get(tokenizer)
    if run is None:
        return "not run"
    if run.refused or not run.verdicts:
        return "refused"
    verdicts = _counting(run)
    share = sum(not rules for rules in verdicts.values()) / len(verdicts)
    # only a configuration with a difference has a part among the reproductions
    anchor = f"#{column.name}" if any(each.examples for each in column.recorded.values()) else ""
    # cut and not rounded: 100 % is said of sound columns alone
    return f'[{int(100 * share)} %](reproductions.md{anchor}){{ .heat style="--share: {share:.2f}" }}'


def _counting(run: Recorded) -> dict[str, list[str]]:
    """Return the rules that each row or pair of a run breaks, without the pairs that can only be refused."""
    return {name: rules for name, rules in record_verdicts(run.verdicts).items() if name not in _REFUSED}


def _summary(columns: Sequence[Column], tokenizers: Sequence[str]) -> Iterator[str]:
    yield from _head("configuration", tokenizers)
    for column in columns:
        runs = column.recorded
        cells = [_short(runs[name]) if name in runs else "not run" for name in tokenizers]
        yield f"| {column.name} | {' | '.join(cells)} |"


def _own_summary() -> Iterator[str]:
    yield from _summary(COLUMNS, TOKENIZERS)
    yield f"| {OURS} | {' | '.join(_counted(_sound(name)) for name in TOKENIZERS)} |"


def _sound(tokenizer: str) -> dict[str, list[str]]:
    """Return that no case breaks a rule, for each case of a tokenizer."""
    run = next(column.recorded[tokenizer] for column in COLUMNS if column.recorded[tokenizer].verdicts)
    return {case: [] for case in run.verdicts}


def _short(run: Recorded) -> str:
    reason = run.refused.rpartition("a plain row is refused, too: ")[2]
    if reason:
        return f"refused: {shorten(reason, 200, placeholder=' ...')}".replace("|", "\\|")
    return _counted(_counting(run))


def _counted(verdicts: dict[str, list[str]]) -> str:
    sound = sum(not rules for rules in verdicts.values())
    counts = Counter(rule for rules in verdicts.values() for rule in rules)
    classes = "".join(f"<br>{RULES[rule].fault_class} {count}" for rule, count in sorted(counts.items()))
    return f"{sound} of {len(verdicts)} sound{classes}"


def _real() -> Iterator[str]:
    yield "| configuration | tokenizer | version | recorded | rows | sound | broken rules, in how many places |"
    yield "|---|---|---|---|---|---|---|"
    for column in COLUMNS:
        for tokenizer, data in column.read()["real"].items():
            classes = ", ".join(f"{RULES[rule].fault_class} {count}" for rule, count in data["classes"].items())
            run = f"{tokenizer} | {column.runner.title} {data['version']} | {data['date']}"
            yield f"| {column.name} | {run} | {data['rows']} of {data['of']} | {data['sound']} | {classes} |"


def _rows() -> Iterator[str]:
    for tokenizer in TOKENIZERS:
        yield from (f"## {tokenizer}, row by row", "", *_rows_table(tokenizer), "")


def _rows_table(tokenizer: str) -> Iterator[str]:
    runs = {column.name: column.recorded[tokenizer] for column in COLUMNS if tokenizer in column.recorded}
    verdicts = {name: run.verdicts for name, run in runs.items() if not run.refused}
    verdicts[OURS] = _sound(tokenizer)
    yield from _head("row", verdicts)
    for case in verdicts[OURS]:
        yield f"| {case} | {' | '.join(_rules(rules[case]) for rules in verdicts.values())} |"


def _pairs() -> Iterator[str]:
    """Yield the packaged pairs with their purposes."""
    yield "| pair | what it is for |"
    yield "|---|---|"
    yield from (f"| {case.name} | {case.description} |" for case in packaged_pairs())


def _pair_rows() -> Iterator[str]:
    for tokenizer in PAIR_TOKENIZERS:
        yield from (f"### {tokenizer}, pair by pair", "", *_pair_rows_table(tokenizer), "")


def _pair_rows_table(tokenizer: str) -> Iterator[str]:
    runs = {column.name: column.recorded[tokenizer] for column in PAIR_COLUMNS if tokenizer in column.recorded}
    verdicts = {name: run.verdicts for name, run in runs.items() if not run.refused}
    yield from _head("pair", verdicts)
    named = {name for of_run in verdicts.values() for name in record_verdicts(of_run)}
    for case in packaged_pairs():
        if case.name in named:
            yield f"| {case.name} | {' | '.join(_of_sides(case.name, rules) for rules in verdicts.values())} |"


def _of_sides(name: str, verdicts: dict[str, list[str]]) -> str:
    """Return the rules that a pair breaks: as a whole, on both sides, or on one that is named."""
    whole = verdicts.get(name, [])
    chosen, rejected = (verdicts.get(f"{name}, {side}", []) for side in ("chosen", "rejected"))
    lines = [_rules(whole)] if whole else []
    if chosen == rejected:
        lines += [_rules(chosen)] if chosen or not whole else []
    else:
        lines += [f"{side}: {_rules(rules)}" for side, rules in (("chosen", chosen), ("rejected", rejected)) if rules]
    return "<br>".join(lines)


def _rules(rules: list[str]) -> str:
    return " ".join(f"[{rule}](../rules.md#{rule.lower()})" for rule in rules) or "sound"


def _reproductions() -> Iterator[str]:
    rows = {case.name: case.row.to_jsonl() for case in packaged_cases()}
    for column in COLUMNS:
        yield from _reproductions_of(column, rows)
    for column in PAIR_COLUMNS:
        yield from _reproductions_of(column, {case.name: _given_lines(case, column) for case in packaged_pairs()})


def _given_lines(case: PairCase, column: Column) -> str:
    """Return a pair as a configuration is given it: a line of JSON, or one for each of its rated answers."""
    records = by_record(preference_rows([case.rows], column.runner, column.task))
    return "\n".join(json.dumps(record[0].kind.record(record), ensure_ascii=False) for record in records)


def _reproductions_of(column: Column, rows: dict[str, str]) -> Iterator[str]:
    """Yield the section of a configuration with a difference: the smallest row for each rule.

    Args:
        column: The configuration.
        rows: The packaged rows or pairs as JSON, by name.
    """
    examples = sorted(_shortest(column, rows).items())
    if examples:
        config = column.config.read_text(encoding="utf-8")
        yield from (f"## {column.name}", "", f"```yaml\n{config}```", "")
    for rule, (tokenizer, example) in examples:
        yield from (f"### {column.name}: {RULES[rule].fault_class} ({rule}), on {tokenizer}", "")
        yield from (_versions(column.recorded[tokenizer].environment), "")
        yield from (f"```console\n$ {column.command(tokenizer)} --dataset row.jsonl\n```", "")
        yield from (f"```json\n{rows[example.record]}\n```", "")
        side = example.case.removeprefix(example.record).removeprefix(", ")
        shown = example.found + (f"; expected: {example.expected}" if example.expected else "")
        yield from (f"{side}: {shown}" if side else shown, "")


def _shortest(column: Column, rows: dict[str, str]) -> dict[str, tuple[str, Example]]:
    """Return for each rule that a configuration breaks the tokenizer and the example with the shortest row."""
    shortest: dict[str, tuple[str, Example]] = {}
    every = [
        (rule, tokenizer, example)
        for tokenizer, run in column.recorded.items()
        for rule, example in run.examples.items()
    ]

    def length(entry: tuple[str, str, Example]) -> tuple[bool, int]:
        # a derived file has to be made first: where a shipped one shows the difference, it is taken
        return entry[1].removesuffix(HUB) in DERIVED, len(rows[entry[2].record])

    for rule, tokenizer, example in sorted(every, key=length):
        shortest.setdefault(rule, (tokenizer, example))
    return shortest
