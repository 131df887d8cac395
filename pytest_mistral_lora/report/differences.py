"""The comparison of two runs, for terminals and other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pytest_mistral_lora.records.compare_runs import ABSENT, GROUPS, AnswersDiff, ChangedField, RunsDiff
from pytest_mistral_lora.records.tensors import TensorsDiff
from pytest_mistral_lora.report import table_lines

_LONGEST = 60
"""Longest value that is printed, in characters; a longer one is cut."""


def diff_data(found: RunsDiff) -> dict[str, Any]:
    """Return a comparison as plain JSON data; a part that was not compared is null, with the reason beside it."""
    tensors, answers = found.tensors, found.answers
    reasons = {name: part for name, part in (("tensors", tensors), ("answers", answers)) if isinstance(part, str)}
    tensors_data = None
    if not isinstance(tensors, str):
        tensors_data = {
            "compared": tensors.compared,
            "different": tensors.different,
            "kinds": [kind.to_json() for kind in tensors.kinds],
            "reshaped": [{"tensor": name, "a": a, "b": b} for name, a, b in tensors.reshaped],
            "only_a": tensors.only_a,
            "only_b": tensors.only_b,
        }
    return {
        "a": str(found.a),
        "b": str(found.b),
        "equal": found.equal,
        "facts": [fact.to_json() for fact in found.facts],
        "tensors": tensors_data,
        "answers": None if isinstance(answers, str) else asdict(answers),
        "not_compared": reasons,
    }


def diff_lines(found: RunsDiff, width: int) -> Iterator[str]:
    """Yield the lines of a comparison for a terminal of this width."""
    yield f"a: {found.a}"
    yield f"b: {found.b}"
    yield f"facts: {len(found.facts)} differ"
    yield from _fact_lines(found.facts)
    yield from _tensor_lines(found.tensors, width)
    yield from _answer_lines(found.answers)


def _fact_lines(facts: tuple[ChangedField, ...]) -> Iterator[str]:
    for group in GROUPS:
        chosen = [fact for fact in facts if fact.group == group]
        # a file whose hash differs mostly has another size, too: one line for it is enough
        hashed = {fact.path.removesuffix(".sha256") for fact in chosen if fact.path.endswith(".sha256")}
        shown = [fact for fact in chosen if fact.path.removesuffix(".size") not in hashed]
        yield from [group] if shown else []
        yield from (f"  {fact.path}: {_short_value(fact.a)} → {_short_value(fact.b)}" for fact in shown)


def _short_value(value: Any) -> str:
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


def _answer_lines(answers: AnswersDiff | str) -> list[str]:
    if isinstance(answers, str):
        return [f"answers: not compared: {answers}"]
    lines = [f"answers: {len(answers.different)} of {answers.compared} differ"]
    for one in answers.different:
        difference = {
            "question": "the two conversations differ",
            "prompt": "the same conversation has other prompt ids",
            "answer": f"from token {one.token} on",
        }[one.differs]
        lines += [f"  {one.case}: {difference}", f"    a: {one.a!r}", f"    b: {one.b!r}"]
    lines += [f"  {case}: only in a" for case in answers.only_a]
    return lines + [f"  {case}: only in b" for case in answers.only_b]
