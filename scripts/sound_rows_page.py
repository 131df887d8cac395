"""The sound rows of docs/stats.md, made from the files that the tests have `check` judge."""

from __future__ import annotations

import json
from collections.abc import Iterator

from sound_rows import SOUND_ROWS


def sound_rows() -> Iterator[str]:
    """Yield a part for each kind of sound rows that look like faults, with the first row of its first file."""
    for rows in SOUND_ROWS:
        row = json.dumps(rows.files[0][0], ensure_ascii=False)
        yield from ("", f"### {rows.title}", "", rows.why, "", "```json", row, "```")
    yield ""
