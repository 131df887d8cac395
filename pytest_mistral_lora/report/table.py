"""The table of a run: how many checks of each target and subject came to what."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.records.compare_runs import ABSENT, GROUPS, Answer, Answers, Diff, Fact
from pytest_mistral_lora.records.compare_tensors import TensorsDiff

if TYPE_CHECKING:
    from rich.table import Table


_COLUMNS = {"passed": "passed", "failed": "failed", "known": "known", "skipped": "not checked"}
_NARROWEST = 60


def outcome_table(outcomes: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Return the lines of a table of outcomes.

    Args:
        outcomes: One record for each check, with `target`, `subject` and `outcome`.
        width: Columns of the terminal.
    """
    from rich import box
    from rich.table import Table

    shown = [name for name in _COLUMNS if name != "known" or any(one["outcome"] == "known" for one in outcomes)]
    table = Table("target", "subject", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        table.add_column(_COLUMNS[name], justify="right")
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault((outcome["target"], outcome["subject"]), Counter())[outcome["outcome"]] += 1
    for (target, subject), count in counts.items():
        table.add_row(target, subject, *(str(count[name] or "-") for name in shown))
    return table_lines(table, width)


def table_lines(table: Table, width: int) -> list[str]:
    """Return the lines of a table for a terminal of this width, without colours."""
    from rich.console import Console

    file = StringIO()
    Console(file=file, width=max(width, _NARROWEST), color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


_LONGEST = 60
"""Characters of a value that are shown."""


def diff_data(found: Diff) -> dict[str, Any]:
    """Return a difference as plain JSON data; what was not compared is null, with the reason beside it."""
    tensors, answers = found.tensors, found.answers
    reasons = {name: part for name, part in (("tensors", tensors), ("answers", answers)) if isinstance(part, str)}
    return {
        "a": str(found.a),
        "b": str(found.b),
        "equal": found.equal,
        "facts": [fact.to_json() for fact in found.facts],
        "tensors": None if isinstance(tensors, str) else _tensors_data(tensors),
        "answers": None if isinstance(answers, str) else asdict(answers),
        "not_compared": reasons,
    }


def _tensors_data(tensors: TensorsDiff) -> dict[str, Any]:
    return {
        "compared": tensors.compared,
        "different": tensors.different,
        "kinds": [kind.to_json() for kind in tensors.kinds],
        "reshaped": [{"tensor": name, "a": a, "b": b} for name, a, b in tensors.reshaped],
        "only_a": tensors.only_a,
        "only_b": tensors.only_b,
    }


def diff_lines(found: Diff, width: int) -> Iterator[str]:
    """Yield the lines of a difference for a terminal of this width."""
    yield f"a: {found.a}"
    yield f"b: {found.b}"
    yield f"facts: {len(found.facts)} differ"
    yield from _fact_lines(found.facts)
    yield from _tensor_lines(found.tensors, width)
    yield from _answer_lines(found.answers)


def _fact_lines(facts: tuple[Fact, ...]) -> Iterator[str]:
    """Yield the facts by group; of a file, one line: its hash or its size differs, or only one has it."""
    for group in GROUPS:
        chosen = [fact for fact in facts if fact.group == group]
        hashed = {fact.path.removesuffix(".sha256") for fact in chosen if fact.path.endswith(".sha256")}
        shown = [fact for fact in chosen if fact.path.removesuffix(".size") not in hashed]
        yield from [group] if shown else []
        yield from (f"  {fact.path}: {_shown(fact.a)} → {_shown(fact.b)}" for fact in shown)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "not recorded"
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _tensor_lines(tensors: TensorsDiff | str, width: int) -> list[str]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if isinstance(tensors, str):
        return [f"tensors: not compared: {tensors}"]
    lines = [f"tensors: {tensors.different} of {tensors.compared} differ"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for name in ("tensors", "differ", "max abs", "relative", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in tensors.kinds:
        figures = (f"{kind.max_abs:.3g}", f"{kind.relative:.3g}", f"{kind.cosine:.6f}")
        table.add_row(Text(kind.name), str(kind.tensors), str(kind.different), *figures)
    lines += table_lines(table, width) if tensors.different else []
    lines += [f"  {name}: shape {list(a)} in a, {list(b)} in b" for name, a, b in tensors.reshaped]
    lines += [f"  {name}: only in a" for name in tensors.only_a]
    return lines + [f"  {name}: only in b" for name in tensors.only_b]


def _answer_lines(answers: Answers | str) -> list[str]:
    if isinstance(answers, str):
        return [f"answers: not compared: {answers}"]
    lines = [f"answers: {len(answers.different)} of {answers.compared} differ"]
    lines += [line for one in answers.different for line in _answer(one)]
    lines += [f"  {case}: only in a" for case in answers.only_a]
    return lines + [f"  {case}: only in b" for case in answers.only_b]


def _answer(one: Answer) -> list[str]:
    said = {
        "question": "another conversation was asked",
        "prompt": "the same conversation, but in other prompt ids",
        "answer": f"from token {one.token} on",
    }
    return [f"  {one.case}: {said[one.differs]}", f"    a: {one.a!r}", f"    b: {one.b!r}"]
