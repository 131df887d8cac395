"""The pages of the scoreboards: their tables stand between marks in docs/, and the long ones only in the site."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from page_blocks import with_block

from boards import answers, layers, prepared, prompts, tables
from boards.inputs import DERIVED, DOCS, HUB, PAIR_TOKENIZERS, ROOT, TOKENIZERS
from boards.results import Example, Result
from boards.trainers import CONFIGURATIONS, PAIR_CONFIGURATIONS, Configuration, pair_results, row_results
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.goldens import PairCase, packaged_cases, packaged_pairs
from pytest_mistral_lora.runners.given_rows import by_record, preference_rows

Lines = Callable[[], Iterator[str]]

_MADE = re.compile(r"<!-- made: ([\w-]+) -->")

_OF_ROWS: Mapping[str, Sequence[str]] = {
    "v3": ("spm-v3", "spm-v3-hub"),
    "v3 Tekken": ("tekken-240911", "tekken-240911-hub"),
    "v13": ("derived-v13", "derived-v13-hub"),
}
"""The columns of the first table of a board, by their titles, with the tokenizers that they stand for."""
_OF_PAIRS = {"v3": ("spm-v3",), "v3 Tekken": ("tekken-240911",), "v15": ("derived-v15",)}
_OF_PROMPTS = {"v3": ("spm-v3",), "v3 Tekken": ("tekken-240911",), "v11": ("derived-v11",)}
_OF_ANSWERS = ("v11", "v13", "v15")


def committed(board: str) -> Mapping[str, Lines]:
    """Return the tables of a board that are in the repository, by the names of their marks."""
    return _BOARDS[board][1]()


def page_of(board: str) -> str:
    """Return the path of a board's page in docs/."""
    return _BOARDS[board][0]


def filled(board: str) -> str:
    """Return the page of a board with its tables between their marks."""
    page = (DOCS / page_of(board)).read_text(encoding="utf-8")
    for name, lines in committed(board).items():
        page = with_block(page, name, _text(lines))
    return page


def site_pages() -> dict[str, str]:
    """Return the pages with tables that only the site has, by their paths in docs/."""
    names = ("scoreboard/README.md", "scoreboard/reproductions.md")
    texts = {name: (DOCS / name).read_text(encoding="utf-8") for name in names}
    return {name: _MADE.sub(lambda made: _text(_OF_SITE[made[1]]), text) for name, text in texts.items()}


def _text(lines: Lines) -> str:
    return "\n".join(lines())


def _trainers_first() -> Iterator[str]:
    yield from tables.dense(tables.first_table("trainer", row_results(), _OF_ROWS))


def _trainers_shares() -> Iterator[str]:
    yield from tables.dense(tables.shares(row_results(), TOKENIZERS, _reproduction))


def _reproduction(one: Result) -> str:
    """Return the place of the reproductions of a result; a setting without a difference has none."""
    named = {known.name: known.recorded.values() for known in (*CONFIGURATIONS, *PAIR_CONFIGURATIONS)}
    if not any(each.examples for each in named.get(one.name, ())):
        return ""
    return f"reproductions.md#{one.name}"


def _configurations(known: Sequence[Configuration]) -> Iterator[str]:
    yield from tables.head("configuration", "description", "recorded")
    for one in known:
        link = f"[{one.name}](../../{one.config.relative_to(ROOT).as_posix()})"
        runs = {name: f"{run.date}, by {_versions(run)}" for name, run in one.recorded.items()}
        yield f"| {link} | {one.about} | {_grouped(runs)} |"


def _grouped(by_tokenizer: Mapping[str, str]) -> str:
    """Return the value of all tokenizers, or each value with its tokenizers."""
    groups: dict[str, list[str]] = {}
    for tokenizer, value in by_tokenizer.items():
        groups.setdefault(value, []).append(tokenizer)
    several = len(groups) > 1
    return "<br>".join(f"{', '.join(names)}: {value}" if several else value for value, names in groups.items())


def _versions(one: Result) -> str:
    return ", ".join(f"{name} {version}" for name, version in one.environment.items() if version != "not installed")


def _real() -> Iterator[str]:
    yield from tables.head("configuration", "tokenizer", "right", "what differs, in how many places", "recorded")
    for one in CONFIGURATIONS:
        for tokenizer, data in one.read()["real"].items():
            right = f"{data['sound']} of {data['rows']}"
            what = tables.counts(data["classes"])
            yield f"| {one.name} | {tokenizer} | {right} | {what} | {data['version']}, {data['date']} |"


def _rows() -> Iterator[str]:
    for tokenizer in TOKENIZERS:
        found = [one for one in row_results() if one.tokenizer == tokenizer and one.verdicts]
        yield from (f"## {tokenizer}, row by row", "")
        yield from (*tables.dense(tables.by_case("row", found, list(found[-1].verdicts))), "")


def _pairs_first() -> Iterator[str]:
    yield from tables.dense(tables.first_table("trainer, task", pair_results(), _OF_PAIRS))


def _pairs_shares() -> Iterator[str]:
    yield from tables.dense(tables.shares(pair_results(), PAIR_TOKENIZERS, _reproduction))


def _pairs() -> Iterator[str]:
    """Yield the packaged pairs with their purposes."""
    yield from tables.head("pair", "what it is for")
    yield from (f"| {case.name} | {case.description} |" for case in packaged_pairs())


def _pair_rows() -> Iterator[str]:
    for tokenizer in PAIR_TOKENIZERS:
        found = [one for one in pair_results() if one.tokenizer == tokenizer and one.verdicts]
        names = [case.name for case in packaged_pairs() if any(case.name in one.by_record for one in found)]
        yield from (f"### {tokenizer}, pair by pair", "", *tables.dense(tables.by_case("pair", found, names)), "")


def _reproductions() -> Iterator[str]:
    rows = {case.name: case.row.to_jsonl() for case in packaged_cases()}
    for one in CONFIGURATIONS:
        yield from _reproductions_of(one, rows)
    for one in PAIR_CONFIGURATIONS:
        yield from _reproductions_of(one, {case.name: _given_lines(case, one) for case in packaged_pairs()})


def _given_lines(case: PairCase, configuration: Configuration) -> str:
    """Return a pair as a configuration is given it: a line of JSON, or one for each of its rated answers."""
    records = by_record(preference_rows([case.rows], configuration.runner, configuration.task))
    return "\n".join(json.dumps(record[0].kind.record(record), ensure_ascii=False) for record in records)


def _reproductions_of(configuration: Configuration, rows: Mapping[str, str]) -> Iterator[str]:
    """Yield the section of a configuration with a difference: the smallest row for each rule.

    Args:
        configuration: The configuration.
        rows: The packaged rows or pairs as JSON, by name.
    """
    examples = sorted(_shortest(configuration, rows).items())
    if examples:
        config = configuration.config.read_text(encoding="utf-8")
        yield from (f"## {configuration.name}", "", f"```yaml\n{config}```", "")
    for rule, (tokenizer, example) in examples:
        yield from (f"### {configuration.name}: {RULES[rule].fault_class} ({rule}), on {tokenizer}", "")
        yield from (_versions(configuration.recorded[tokenizer]), "")
        commands = [f"$ {command}" for command in configuration.commands(tokenizer)]
        yield from ("```console", *commands[:-1], f"{commands[-1]} --dataset row.jsonl", "```", "")
        yield from (f"```json\n{rows[example.record]}\n```", "")
        side = example.case.removeprefix(example.record).removeprefix(", ")
        shown = example.found + (f"; expected: {example.expected}" if example.expected else "")
        yield from (f"{side}: {shown}" if side else shown, "")


def _shortest(configuration: Configuration, rows: Mapping[str, str]) -> dict[str, tuple[str, Example]]:
    """Return for each rule that a configuration breaks the tokenizer and the example with the shortest row."""
    shortest: dict[str, tuple[str, Example]] = {}
    every = [
        (rule, tokenizer, example)
        for tokenizer, run in configuration.recorded.items()
        for rule, example in run.examples.items()
    ]

    def length(entry: tuple[str, str, Example]) -> tuple[bool, int]:
        # a derived file has to be made first: where a shipped one shows the difference, it is taken
        return entry[1].removesuffix(HUB) in DERIVED, len(rows[entry[2].record])

    for rule, tokenizer, example in sorted(every, key=length):
        shortest.setdefault(rule, (tokenizer, example))
    return shortest


def _prompts() -> Mapping[str, Lines]:
    judged = [one.judged() for one in prompts.read_recorded()]
    results = [one.result for one in judged]
    examples = [one.of_examples for one in judged if one.of_examples.verdicts]
    return {
        "prompts": lambda: tables.dense(tables.first_table("server", results, _OF_PROMPTS)),
        "prompts-shares": lambda: tables.dense(tables.shares(results, sorted({one.tokenizer for one in results}))),
        "prompts-counted": lambda: tables.dense(tables.counted(results)),
        "prompts-deviations": lambda: _of_deviations(examples),
        "prompts-rows": lambda: _prompt_rows(results),
    }


def _prompt_rows(results: Sequence[Result]) -> Iterator[str]:
    for tokenizer in sorted({one.tokenizer for one in results}):
        found = [one for one in results if one.tokenizer == tokenizer]
        yield from (f"## {tokenizer}, row by row", "")
        yield from (*tables.dense(tables.by_case("row", found, list(found[0].verdicts))), "")


def _of_deviations(results: Sequence[Result]) -> Iterator[str]:
    """Yield what each server makes of the smallest row of each named deviation."""
    for tokenizer in sorted({one.tokenizer for one in results}):
        found = [one for one in results if one.tokenizer == tokenizer]
        names = sorted({name for one in found for name in one.verdicts})
        yield from (f"### {tokenizer}, deviation by deviation", "")
        yield from (*tables.dense(tables.by_case("deviation", found, names)), "")


def _answers() -> Mapping[str, Lines]:
    recorded = [(data, answers.result(data)) for data in answers.read()]
    results = [one for _, one in recorded]
    named = {
        title: [one.tokenizer for one in results if one.tokenizer.startswith(f"{title} ")] for title in _OF_ANSWERS
    }
    return {
        "answers": lambda: tables.dense(tables.first_table("server", results, named)),
        "answers-counted": lambda: tables.dense(tables.counted(results)),
        "answers-differences": lambda: (line for data, one in recorded for line in _answers_of(data, one)),
    }


def _answers_of(data: Mapping[str, object], one: Result) -> Iterator[str]:
    yield from (f"## {one.program} {one.version}, {one.tokenizer}", "")
    yield from (f"{one.setting}: `{answers.command(data)}`", "")
    if known := answers.known_faults(one):
        yield from (f"Known faults: {', '.join(f'[{name}](../known-faults.md#{name})' for name in known)}.", "")
    yield from ('<div class="dense" markdown>', "")
    yield from tables.head("answer", "what differs", "the client gets", "the model said")
    for name, labels in one.by_record.items():
        if labels:
            example = one.examples.get(name, Example(name, "", ""))
            yield f"| {name} | {tables.verdict(one, name)} | {_code(example.found)} | {_code(example.expected)} |"
    yield from ("", "</div>", "")
    if data["not_said"]:
        yield from (f"Not said by the probe: {', '.join(data['not_said'])}.", "")


def _code(text: str) -> str:
    # a masked model says anything: line breaks would end the row of the table
    text = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return f"`` {text.replace('|', chr(0x2502))} ``" if text else ""


_TRAINERS = "scoreboard/README.md"
_BOARDS: Mapping[str, tuple[str, Callable[[], Mapping[str, Lines]]]] = {
    "rows": (_TRAINERS, lambda: {"rows": _trainers_first}),
    "pairs": (_TRAINERS, lambda: {"pairs": _pairs_first}),
    "layers": (_TRAINERS, lambda: {"layers": lambda: tables.dense(layers.table())}),
    "real": (_TRAINERS, lambda: {"real": lambda: tables.dense(_real())}),
    "prepared": (
        "prepared.md",
        lambda: {
            "prepared": lambda: tables.dense(prepared.verdicts_table()),
            "prepared-differences": prepared.differences_table,
        },
    ),
    "prompts": ("serving/README.md", _prompts),
    "answers": ("serving/answers.md", _answers),
}
"""The page of each board, and its tables there."""

BOARDS = tuple(_BOARDS)

_OF_SITE: Mapping[str, Lines] = {
    "shares": _trainers_shares,
    "counted": lambda: tables.dense(tables.counted(row_results())),
    "configurations": lambda: _configurations(CONFIGURATIONS),
    "rows": _rows,
    "pairs": _pairs,
    "pair-shares": _pairs_shares,
    "pair-counted": lambda: tables.dense(tables.counted(pair_results())),
    "pair-configurations": lambda: _configurations(PAIR_CONFIGURATIONS),
    "pair-rows": _pair_rows,
    "reproductions": _reproductions,
}
"""The tables that only the site has."""
