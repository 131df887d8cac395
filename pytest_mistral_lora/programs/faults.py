"""What a program would do wrong with an artifact, as the program's own room tells it."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_mistral_lora.places import Place


@dataclass(frozen=True, slots=True)
class ProgramFault:
    """What a program would do wrong with an artifact.

    Example:
        `ProgramFault("ML426", "use_dora is set", "NAME refuses DoRA", place, "a plain LoRA, or the merged model")` is
        shown as `use_dora is set: NAME refuses DoRA`. Faults of several programs with the same rule, value and place
        are one finding, with what each of them does.

    Attributes:
        rule: The id of the rule that is broken.
        found: The value that breaks it.
        effect: What the program does about it; empty if `found` says so.
        place: Where the value is.
        expected: What stands there for a program that has no fault.
    """

    rule: str
    found: str
    effect: str
    place: Place
    expected: str
