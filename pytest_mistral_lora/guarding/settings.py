"""What a guard was told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.checkpoint.loaded_tokenizer import tokenizer_or_path
from pytest_mistral_lora.conformance.named_tokenizer import tokenizer_path
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.judging import AnyTokenizer, present_tokenizer

OnFinding = Literal["stop", "warn"]


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What a guard was told: see `MistralGuard`."""

    tokenizer: AnyTokenizer | None
    objective: Declaration | None
    batches: int
    every: int | None
    on_finding: OnFinding
    rules: RuleSet | None

    @classmethod
    def given(
        cls,
        tokenizer: AnyTokenizer | None,
        objective: str | None,
        batches: int,
        every: int | None,
        on_finding: OnFinding,
        rules: str | None,
    ) -> GuardSettings:
        """Return the settings that a user gives.

        Raises:
            InputError: If an argument has another value, or the tokenizer is not there.
            PinError: If the tokenizer's files cannot be fetched from the Hub.
        """
        if tokenizer is not None and isinstance(path := tokenizer_or_path(tokenizer), Path):
            present_tokenizer(tokenizer_path(str(path)), None)
        if type(batches) is not int or batches < 1:
            raise InputError(repr(batches), place="batches=", expected="a whole number, 1 or more")
        if every is not None and (type(every) is not int or every < 1):
            raise InputError(repr(every), place="every=", expected="a whole number, 1 or more, or None")
        if on_finding not in ("stop", "warn"):
            raise InputError(repr(on_finding), place="on_finding=", expected="'stop' or 'warn'")
        return cls(tokenizer, Declaration.given(objective), batches, every, on_finding, RuleSet.given(rules))
