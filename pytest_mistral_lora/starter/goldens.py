"""Record the first goldens of a repository, by the code of `pytest --mistral-golden-update`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pytest_mistral_lora.starter import GOLDENS


def record_missing(folder: Path, recipe: str) -> tuple[list[str], list[str]]:
    """Record each golden row that has no recording yet; what is recorded stays.

    Args:
        folder: The repository.
        recipe: The recipe's name in it, whose tokenizer is recorded.

    Returns:
        The names of the files that were written, and a sentence for each row that could not be recorded.
    """
    from pytest_mistral_lora.conformance.checks import Settings
    from pytest_mistral_lora.conformance.named_targets import named_targets
    from pytest_mistral_lora.conformance.user_goldens import rendering_checks, user_cases

    if os.environ.get("CI"):
        return [], ["Record the goldens outside of CI (CI is set here): a golden that CI writes guards nothing."]
    goldens = folder / GOLDENS
    [target] = named_targets(recipes=[folder / recipe])
    missing = {one.check: one for one in user_cases([goldens], "templates", target) if not one.path.exists()}
    written, faults = [], []
    with tempfile.TemporaryDirectory() as work:
        settings = Settings(1, None, "cpu", True, (goldens,), True, Path(work))
        for check in rendering_checks(target, settings):
            if check.case not in missing:
                continue
            result = check.run()
            faults += [f"{one.place}: {one.found}" if one.place else one.found for one in result.findings]
            faults += [result.not_checked] if result.not_checked else []
            if not result.findings and not result.not_checked:
                written.append(missing[check.case].path.relative_to(folder).as_posix())
    return written, list(dict.fromkeys(faults))
