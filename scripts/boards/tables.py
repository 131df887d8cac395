"""The tables of every scoreboard, made of results: the table that a page begins with, and those of its details."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from boards.results import DEVIATION, Result
from pytest_mistral_lora.conformance.finding import RULES

RULES_PAGE = "../rules.md"
"""The page of the rules, from the folder of a scoreboard."""
_MOST_CHARACTERS = 200


def head(*names: str) -> Iterator[str]:
    """Yield the head of a table."""
    yield f"| {' | '.join(names)} |"
    yield "|---|" + "---|" * (len(names) - 1)


def dense(lines: Iterator[str]) -> Iterator[str]:
    """Yield a table with narrow cells: one that has many columns, or that is read on a telephone."""
    yield from ('<div class="dense" markdown>', "", *lines, "", "</div>")


def first_table(program: str, results: Sequence[Result], tokenizers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the table that a page begins with: for each program the best setting, and how much is right with it.

    Args:
        program: What the programs are, as in "trainer".
        results: The results, in the order of the programs.
        tokenizers: The tokenizers of each column by its title. If there are several, the best one counts.
    """
    yield from head(program, "what to set", *tokenizers, "by other settings")
    for name, task in dict.fromkeys((one.program, one.task) for one in results):
        found = [one for one in results if (one.program, one.task) == (name, task)]
        versions = ", ".join(dict.fromkeys(one.version for one in found if one.version))
        title = ", ".join(filter(None, (f"{name} {versions}".strip(), task)))
        yield f"| {' | '.join([title, *_best(found, tokenizers)])} |"


def _best(results: Sequence[Result], tokenizers: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the cells of a program: the settings to choose, the share in each column, and those of other settings."""
    columns = {title: [one for one in results if one.tokenizer in names] for title, names in tokenizers.items()}
    fit = {title: [one for one in found if not one.is_contrast] for title, found in columns.items()}
    most = {title: max((one.share for one in found), default=0.0) for title, found in fit.items()}
    reached = {title: {one.setting for one in found if one.share == most[title]} for title, found in fit.items()}
    # one setting for as many columns as possible; the first one of those that are equal
    order = list(dict.fromkeys(one.setting for one in results))
    order.sort(key=lambda setting: -sum(setting in reached[title] for title in columns if most[title]))
    chosen = {title: next(one for one in order if one in reached[title]) for title, found in fit.items() if found}
    titles: dict[str, list[str]] = {}
    for title, setting in chosen.items():
        if most[title]:
            titles.setdefault(setting, []).append(title)
    named = [f"{setting} ({', '.join(on)})" if len(titles) > 1 else setting for setting, on in titles.items()]
    yield "<br>".join(named) or "nothing that was tried helps"
    yield from (_share_of(found) for found in fit.values())
    others = [
        one.share
        for title, found in columns.items()
        for one in found
        if one.setting != chosen.get(title) and one.verdicts
    ]
    yield _range(others) if others else ""


def _share_of(results: Sequence[Result]) -> str:
    if not results:
        return "not run"
    if not any(one.verdicts for one in results):
        return "refused"
    best = max(results, key=lambda one: one.share)
    return heat(best)


def _range(shares: Sequence[float]) -> str:
    least, most = percent(min(shares)), percent(max(shares))
    return f"{least} %" if least == most else f"{least} to {most} %"


def percent(share: float) -> int:
    """Return a share in percent; cut and not rounded, as 100 % is said only if all is right."""
    return int(100 * share)


def heat(one: Result) -> str:
    """Return the cell of a share, which the site colours."""
    shown = f"{'# ' if one.compares_lengths else ''}{percent(one.share)} %"
    return f'<span class="heat" style="--share: {one.share:.2f}">{shown}</span>'


def shares(
    results: Sequence[Result], tokenizers: Sequence[str], link: Callable[[Result], str] = lambda one: ""
) -> Iterator[str]:
    """Yield the share of each setting and tokenizer.

    Args:
        results: The results, in the order of the settings.
        tokenizers: The names of the columns.
        link: The place that a cell leads to; empty for none.
    """
    yield from head("setting", *tokenizers)
    for name in dict.fromkeys(one.name for one in results):
        found = {one.tokenizer: one for one in results if one.name == name}
        cells = [_share(found[tokenizer], link) if tokenizer in found else "not run" for tokenizer in tokenizers]
        yield f"| {' | '.join([name, *cells])} |"


def _share(one: Result, link: Callable[[Result], str]) -> str:
    if not one.verdicts:
        return "refused"
    place = link(one)
    return f"[{heat(one)}]({place})" if place else heat(one)


def counted(results: Sequence[Result]) -> Iterator[str]:
    """Yield how often each difference is there, for each setting and tokenizer."""
    yield from head("setting", "tokenizer", "right", "what differs, in how many")
    for one in results:
        right = f"{one.right} of {len(one.counted)}" if one.verdicts else ""
        yield f"| {one.name} | {one.tokenizer} | {right} | {_refused(one.refused) or counts(one.labels)} |"


def counts(labels: Mapping[str, int]) -> str:
    """Return how often each difference is there, by its name."""
    return ", ".join(f"{_described(label)} {count}" for label, count in sorted(labels.items()))


def _described(label: str) -> str:
    if label.startswith(DEVIATION):
        return label.removeprefix(DEVIATION)
    return f"{linked(label)} {RULES[label].fault_class}".strip()


def _refused(reason: str) -> str:
    last = reason.rpartition("a plain row is refused, too: ")[2]
    shown = last if len(last) <= _MOST_CHARACTERS else f"{last[:_MOST_CHARACTERS].rpartition(' ')[0]} ..."
    return f"refused: {shown}".replace("|", "\\|") if reason else ""


def by_case(what: str, results: Sequence[Result], cases: Sequence[str]) -> Iterator[str]:
    """Yield the verdict of each setting on each case, on one tokenizer.

    Args:
        what: What the cases are, as in "row".
        results: The results.
        cases: The names of the cases.
    """
    yield from head(what, *(one.name for one in results))
    for case in cases:
        yield f"| {case} | {' | '.join(verdict(one, case) for one in results)} |"


def verdict(one: Result, case: str) -> str:
    """Return the verdict on a case: as a whole, on all of its parts, or on those that are named."""
    if case not in one.by_record:
        return ""
    whole, parts = one.verdicts.get(case, []), one.parts(case)
    lines = [_labels(whole)] if whole else []
    if len({tuple(labels) for labels in parts.values()}) == 1:
        common = next(iter(parts.values()))
        lines += [_labels(common)] if common else []
    else:
        lines += [f"{part}: {_labels(labels)}" for part, labels in parts.items() if labels]
    return ("# " if one.compares_lengths else "") + ("<br>".join(lines) or "right")


def _labels(labels: Sequence[str]) -> str:
    named = [label.removeprefix(DEVIATION) for label in labels if label.startswith(DEVIATION)]
    rules = [linked(label) for label in labels if not label.startswith(DEVIATION)]
    return " ".join([*([DEVIATION + ", ".join(named)] if named else []), *rules])


def linked(rule: str) -> str:
    """Return a rule as a link to its line."""
    return f"[{rule}]({RULES_PAGE}#{rule.lower()})"
