"""What a user decides about a run of the checks: the same options for `check`, `judge` and pytest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.known import Xfail
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.errors import InputError, did_you_mean, shortened

Failing: TypeAlias = Literal["note", "not-checked"]

FAILING: tuple[Failing, ...] = ("note", "not-checked")
"""What fails a run beside errors, if the user asks for it."""


@dataclass(frozen=True)
class CheckOptions:
    """How targets are judged, and what fails.

    Attributes:
        examples: Hypothesis examples for each law.
        seed: Seed of the examples; None for the same examples in every run.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        train: Whether to run the tiny train with the tokenizers.
        fail_on: What fails beside errors.
        xfails: Known deviations, which do not fail.
        rules: The rules of an earlier version, by which findings fail; None for those of this version.
        write_xfails: The new file for the list of all findings, or None.
    """

    examples: int = 20
    seed: int | None = None
    device: str = "auto"
    train: bool = False
    fail_on: frozenset[Failing] = frozenset()
    xfails: tuple[Xfail, ...] = ()
    rules: RuleSet | None = None
    write_xfails: Path | None = None

    @property
    def fails_notes(self) -> bool:
        """Whether notes fail."""
        return "note" in self.fail_on

    @property
    def fails_not_checked(self) -> bool:
        """Whether checks that could not judge fail."""
        return "not-checked" in self.fail_on

    def settings(
        self,
        *,
        golden_folders: tuple[Path, ...] = (),
        update: bool = False,
        shared_folder: Path | None = None,
        require_manifest: bool = False,
    ) -> Settings:
        """Return the settings of the checks; the arguments are as for `Settings`."""
        return Settings(
            self.examples,
            self.seed,
            self.device,
            skip_training=not self.train,
            golden_folders=golden_folders,
            update=update,
            shared_folder=shared_folder,
            require_manifest=require_manifest,
        )


DEFAULT = CheckOptions()
"""The options of a run for which the user decides nothing."""


def parse_fail_on(text: str | None, place: str) -> frozenset[Failing]:
    """Return what fails beside errors.

    Args:
        text: Words of `FAILING`, joined by commas; None for none.
        place: The option, key or argument that names them.

    Raises:
        InputError: If a word is another one.
    """
    words = [word.strip() for word in text.split(",")] if isinstance(text, str) and text else []
    for word in [text] if text is not None and not isinstance(text, str) else words:
        if word not in FAILING:
            found = f"{shortened(word)}{did_you_mean(str(word), FAILING)}"
            raise InputError(found, place=place, expected=f"{' or '.join(FAILING)}, or both, joined by a comma")
    return frozenset(word for word in FAILING if word in words)


def require_new(path: Path, place: str) -> Path:
    """Return the file for the list of all findings, if it is new.

    Raises:
        InputError: If it exists.
    """
    if path.exists():
        raise InputError(f"{path} exists, and its reasons would be lost", place=place, expected="a new file")
    return path
