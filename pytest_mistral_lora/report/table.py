"""The table of a run: how many checks of each target and subject came to what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

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
