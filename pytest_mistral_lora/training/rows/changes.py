"""What a recipe's policies did to its rows, said in the log: nothing is dropped or cut in silence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.records.figures import Tally

_log = logging.getLogger(__name__)
_SAID = {
    "too-long": "dropped, longer than training.max_length",
    "nothing-supervised": "dropped, no token is trained on",
    "cut": "cut on the right to training.max_length",
    "without-loss": "kept, though no token is trained on",
}


def warn_of_changes(side: str, tally: Tally, paths: Sequence[Path]) -> None:
    """Log what was dropped and cut, with the places of the first rows; nothing where nothing was.

    Args:
        side: What the rows are called.
        tally: Their figures.
        paths: The data files.
    """
    if not tally.changes:
        return
    lines = [f"{side}: {tally.used} of {tally.rows} rows are used"]
    for change, said in _SAID.items():
        if number := tally.changes[change]:
            places = [f"{paths[file]}:{line}" for file, line in tally.places[change]]
            more = f", and {number - len(places)} more" if number > len(places) else ""
            lines.append(f"  {number} {said}: {', '.join(places)}{more}")
    removed = f"{tally.tokens_removed} tokens, {tally.supervised_tokens_removed} of them with loss"
    _log.warning("\n".join([*lines, f"  removed: {removed}"]))
