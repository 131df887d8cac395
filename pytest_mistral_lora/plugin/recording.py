"""When the user's goldens may be recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_mistral_lora.plugin.options import GOLDEN_DIR, UPDATE


def check_update(config: pytest.Config, folders: Sequence[Path]) -> None:
    """Refuse to record goldens if nobody would look at them, or if others rely on them.

    Raises:
        pytest.UsageError: If there is no folder for them, it is the packaged one, several workers would write the same
            files, or this is CI.
    """
    from pytest_mistral_lora.records.goldens import goldens_folder

    if not folders:
        raise pytest.UsageError(
            f"{UPDATE.flag}: there is nothing to record; add {GOLDEN_DIR.flag} PATH, a folder with rows in rows.jsonl"
        )
    for folder in folders:
        if folder.resolve().is_relative_to(goldens_folder().resolve()):
            raise pytest.UsageError(
                f"{UPDATE.flag}: {folder} has the packaged goldens, which are never rewritten; give your own folder"
            )
    # `workerinput` marks a worker of pytest-xdist, and `dist` the process that starts the workers
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(f"{UPDATE.flag} writes files and cannot be shared between workers; leave out -n")
    if os.environ.get("CI"):
        raise pytest.UsageError(f"{UPDATE.flag} is refused if CI is set: a golden that CI writes guards nothing")
