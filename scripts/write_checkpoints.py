"""Make the table of docs/checkpoints.md again, by training each class: `python scripts/write_checkpoints.py`.

Takes ten minutes on two cores. Run it after a change of the supported classes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "checkpoints.md"
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "training")]

from class_steps import CASES, HEADER, ClassRun  # noqa: E402


def main() -> int:
    """Run every case, and write the rows into the page."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            run = ClassRun(case, Path(folder))
            run.make_steps()
            run.make_lives()
            rows.append(run.row())
        print(rows[-1], end="", flush=True)
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = page.partition(HEADER)
    PAGE.write_text(before + HEADER + "".join(rows) + "\n" + after.partition("\n\n")[2].lstrip("\n"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
