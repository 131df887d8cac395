"""What the known trainers and evaluators add to the judge: fixes in their words, and rules about them."""

from __future__ import annotations


def fixes_of_programs(rule: str, *, of_preferences: bool = False) -> tuple[tuple[str, str], ...]:
    """Return the name of each trainer and evaluator of this package that has words for a rule, with its fix.

    Args:
        rule: The id of the rule.
        of_preferences: Whether it is broken by a side of a preference record: some trainers have other settings there.
    """
    from pytest_mistral_lora.runners import TRAINERS

    found = []
    for trainer in TRAINERS.of_this_package():
        of_rows, of_sides = trainer.fixes("rows"), trainer.fixes("preferences")
        fixes = {**of_rows, **of_sides} if of_preferences else {**of_sides, **of_rows}
        if rule in fixes:
            found.append((trainer.title, fixes[rule]))
    return tuple(found)


def observers_of_programs() -> tuple[str, ...]:
    """Return the importable name of each rule on rows that is about a trainer of this package."""
    from pytest_mistral_lora.runners import TRAINERS

    return tuple(name for trainer in TRAINERS.of_this_package() for name in trainer.observers)
