"""The check that `mistral-lora train` accepts a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.known import recipe_deviations
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.errors import (
    InputError,
    MachineError,
    NoOracleError,
    NoTemplateError,
    TokenizerError,
)
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe


LARGEST_RATE = 0.1
"""The largest learning rate of AdamW that is not noted: ten times that of the largest with which LoRA is trained."""


def recipe_checks(target: RecipeTarget, settings: Settings) -> Iterator[Check]:
    """Yield the check that `mistral-lora train` accepts the recipe; `checks` judge its rows."""
    yield Check(target, "dataset", "recipe", partial(_judge_recipe, target))


def _objectives(recipe: Recipe) -> dict[str, str]:
    """Return the declared objectives as a fact, each with its key; no fact if none is declared."""
    if all(objective.is_default for objective in recipe.objectives):
        return {}
    named = (
        f"{objective}" if objective.is_default else f"{objective} ({place})"
        for objective, place in recipe.objectives.items()
    )
    return {"objective of": ", ".join(named)}


def _judge_recipe(target: RecipeTarget) -> Result:
    """Judge a recipe with the checks that a run makes first.

    Raises:
        RecipeError: If the recipe cannot be read.
        PinError: If its base is missing, or is not the pinned one.
        TokenizerError: If its base's tokenizer does not load.
    """
    from pytest_mistral_lora.training.prepare import check_machine, plan_run
    from pytest_mistral_lora.training.run_folder import check_output

    recipe, findings = target.recipe, []

    def refused(rule: str, error: InputError) -> Finding:
        return Finding(rule, error.found, error.place, error.expected, fix=error.next_step)

    base = target.base_folder
    # here: a file of the tokenizer whose value is asked for before the oracle is loaded is opened once
    _ = target.tokenizer.files.faults
    facts = _objectives(recipe)
    # the last check names the layers to adapt
    steps = (
        check_output,
        recipe_deviations,
        check_machine,
        lambda parsed: facts.update({"layers of": plan_run(parsed, base, lambda folder: target.tokenizer).layers_line}),
    )
    for step in steps:
        try:
            with recipe.naming_lines():
                step(recipe)
        except MachineError as error:
            findings.append(refused("ML642", error))
        except TokenizerError as error:
            if not isinstance(error, NoOracleError | NoTemplateError):
                raise
            if isinstance(error, NoOracleError) and target.tokenizer.declared != NO_ORACLE:
                # the check `oracle` of the tokenizer reports it
                return Result(tuple(findings), not_checked="" if findings else str(error))
            findings.append(refused("ML641", error))
        except InputError as error:
            findings.append(refused("ML641", error))
    rate = recipe.training.learning_rate
    if rate > LARGEST_RATE:
        place = Place.of(target.path).within("training", "learning_rate")
        findings.append(Finding("ML675", f"{rate:g}", place, f"{LARGEST_RATE:g} at most"))
    return Result(tuple(findings), facts=tuple(facts.items()))
