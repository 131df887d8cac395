"""Rules about programs: tables beside the programs, with the form of those in `conformance/rules/`."""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.programs.registry import own_field


def rule_files(subject: str) -> list[Path]:
    """Return the files with rules about programs that the checks of a subject report; none without `field`.

    Args:
        subject: The subject, such as `dataset`: the name of a file in `field/rules/`.
    """
    field = own_field()
    files = [Path(folder, "rules", f"{subject}.toml") for folder in field.__path__] if field else []
    return [file for file in files if file.is_file()]
