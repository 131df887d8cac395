"""The checks of a run before any weight is loaded: output, machine, base, layers and rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import require_trainable
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, MachineError, RecipeError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.judged_rows import UNJUDGED, Judgement
from pytest_mistral_lora.training.adapter import saved_modules
from pytest_mistral_lora.training.devices import (
    check_engine,
    container_image,
    device_count,
    engine,
    precision_of,
    require_environment,
)
from pytest_mistral_lora.training.gate.rows import GateRows, require_apart
from pytest_mistral_lora.training.generate.record import format_checks
from pytest_mistral_lora.training.layers import layers_text, planned_layers, ranks_and_alphas
from pytest_mistral_lora.training.recipe import Recipe, resolve_base
from pytest_mistral_lora.training.rows.loading import RunData, load_rows
from pytest_mistral_lora.training.start import Start, plan_start
from pytest_mistral_lora.training.step import DEALING

_LOGGER_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
}
"""The package of a logger whose package has another name."""


@dataclass(frozen=True)
class RunPlan:
    """A recipe whose base and layers are checked: everything of a run except its machine, its output and its rows.

    Attributes:
        recipe: The recipe.
        base: The base checkpoint on disk.
        encoder: The backend.
        layers: Dotted names of the layers that get an adapter, in model order.
        saved: Dotted names of the modules that are trained in full.
        checks: The format checks of generated answers.
        start: The adapter to go on from; None if the run makes a new one.
    """

    recipe: Recipe
    base: BaseFolder
    encoder: Encoder
    layers: Sequence[str]
    saved: Sequence[str]
    checks: Sequence[FormatCheck]
    start: Start | None

    @property
    def layers_line(self) -> str:
        """The adapted layers, with ranks that differ, the class of the base, and whether it has an oracle."""
        architecture = self.base.architecture
        kinds = layers_text(self.base, self.recipe.lora, self.layers)
        text = f"{len(self.layers)} of {architecture.title}: {kinds}"
        return text if architecture.text.has_oracle else f"{text}; no oracle: its chat template is the only judge"


@dataclass(frozen=True)
class Preparation(RunPlan):
    """A recipe whose environment, base, layers and rows are checked; no weight is loaded yet.

    Attributes:
        data: The encoded rows.
        retention: The rows of `evaluation.retention`, as held-out rows; None without them.
        judgement: How all these rows were judged.
    """

    data: RunData
    retention: RunData | None = None
    judgement: Judgement = UNJUDGED

    @property
    def gate_rows(self) -> GateRows:
        """The rows of `evaluation.gate`, and what is asked of them."""
        retention = self.retention.held_out if self.retention is not None else None
        return GateRows.of(self.recipe.evaluation, self.checks, self.data.held_out, retention)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the steps of a run, as JSON data: a checkpoint of another identity is not resumed."""
        # these only save, show or stop a run: you may change them after a stop, and resume
        others = {"report_to", "checkpoint_steps", "checkpoint_minutes", "dry_run", "on_oom"}
        others |= {"stop_at_grad_norm", "max_skipped_steps"}
        left_out: Any = {
            **dict.fromkeys(("output", "evaluation", "card", "deployment", "xfails"), True),
            "training": others,
        }
        recipe = self.recipe.model_dump(mode="json", exclude=left_out)
        rows = [dict(split.figures.sha256) for split in (self.data.train, self.data.held_out)]
        machine: dict[str, Any] = {
            "devices": device_count(),
            "engine": engine(),
            "precision": precision_of(self.recipe.training),
        }
        if device_count() > 1:
            machine["rows_of_a_device"] = DEALING
        lora = self.recipe.lora
        if lora.rank_pattern or lora.alpha_pattern:
            # the first pattern that matches counts, and two mappings are equal in any order
            machine["ranks_and_alphas"] = [[name, *one] for name, one in ranks_and_alphas(lora, self.layers).items()]
        # a local base is pinned by its weights alone
        start = {} if self.start is None else {"start": self.start.identity}
        return {"recipe": recipe, "rows": rows, "base": self.base.canonical_config, **start, **machine}


def prepare(recipe: Recipe, *, xfails: Path | None = None, unjudged: bool = False) -> Preparation:
    """Check a recipe and its files, the cheapest first, and encode and judge the rows.

    Args:
        recipe: The recipe.
        xfails: A file of known deviations beside that of the recipe, or None.
        unjudged: Whether nobody judges the rows.

    Raises:
        InputError: If recipe, environment, base or rows do not allow the run.
        FindingsError: If the rows have an error that is not accepted.
    """
    check_machine(recipe)
    plan = plan_run(recipe)
    data, retention, judgement = load_rows(recipe, plan.encoder, xfails=xfails, unjudged=unjudged)
    if recipe.evaluation.gate:
        require_apart(data.train.rows, data.held_out.rows, retention.held_out.rows if retention is not None else ())
    return Preparation(**vars(plan), data=data, retention=retention, judgement=judgement)


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot train: a device, a library, a logger or a launcher does not fit.

    Raises:
        MachineError: If another machine could train the recipe.
        InputError: If no machine could.
    """
    require_environment(recipe)
    container_image()
    for index, name in enumerate(recipe.training.report_to):
        _logger(name, NOWHERE.within("training", "report_to", index))
    check_engine(recipe)


def plan_run(
    recipe: Recipe,
    base: BaseFolder | None = None,
    tokenizer: Callable[[BaseFolder], CheckpointTokenizer] | None = None,
) -> RunPlan:
    """Check a recipe, except its machine, its output and its rows; load no weight.

    Args:
        recipe: The recipe.
        base: The base checkpoint on disk, if its pin has been checked.
        tokenizer: Returns the tokenizer of the base, if it may be loaded; called after the checks that do not need it.

    Raises:
        InputError: If the recipe or its base do not allow the run.
    """
    base = base or resolve_base(recipe.base)
    require_trainable(base, recipe.backend)
    layers = planned_layers(base, recipe.lora)
    saved = saved_modules(base, recipe.lora.modules_to_save)
    if both := [name for name in saved if name in layers]:
        raise RecipeError(
            f"{both[0]} is in target_modules and in modules_to_save", place=NOWHERE / "lora", expected="one of them"
        )
    kind = base.architecture.name
    if recipe.training.kernels and kind != "MistralForCausalLM":
        found = f"{recipe.training.kernels!r} are kernels for MistralForCausalLM, and the base is {kind}"
        raise RecipeError(found, place=NOWHERE.within("training", "kernels"), expected="no kernels")
    _refuse_unequal_rows(recipe, base)
    loaded = tokenizer(base) if tokenizer is not None else base.tokenizer(recipe.base.oracle)
    encoder = encoder_of(recipe, base, loaded)
    for objective, place in (recipe.retention_objectives | recipe.objectives).items():
        try:
            encoder.require(objective, place)
        except InputError as error:
            raise RecipeError(error.found, place=place, expected=error.expected) from error
    start = plan_start(recipe, base, layers)
    return RunPlan(recipe, base, encoder, layers, saved, format_checks(recipe.evaluation, encoder), start)


_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the longest row of a pass."""


def _refuse_unequal_rows(recipe: Recipe, base: BaseFolder) -> None:
    """Refuse a base that would compute a row differently when it is packed with others.

    Raises:
        RecipeError: If a long row would change the positions of the others, or rows would share a mask of dropout.
    """
    rope = base.canonical_config["rope"]
    if rope["rope_type"] in _BY_LENGTH:
        longest = base.empty_model().config.get_text_config().max_position_embeddings
        most = rope.get("original_max_position_embeddings") or longest
        if recipe.training.max_length > most:
            found = f"{recipe.training.max_length}, and the base has rope_type {rope['rope_type']}: a row of more than "
            found += f"{most} tokens changes the positions of the rows beside it"
            raise RecipeError(found, place=NOWHERE.within("training", "max_length"), expected=f"at most {most}")
    if recipe.training.share_prefix and (dropout := base.facts.text.get("attention_dropout")):
        found = f"true, and the base has attention_dropout {dropout}: rows would share its mask"
        raise RecipeError(found, place=NOWHERE.within("training", "share_prefix"), expected="false")


def encoder_of(recipe: Recipe, base: BaseFolder, tokenizer: CheckpointTokenizer) -> Encoder:
    """Return the backend of a run.

    Args:
        recipe: The recipe.
        base: The base checkpoint on disk.
        tokenizer: Its tokenizer.

    Raises:
        TokenizerError: If the tokenizer cannot be loaded, or gives other ids than the tokenizer that it is recognised
            as.
        NoTemplateError: If it has no chat template, and mistral-common generates none with its ids.
        RecipeError: If it has ids that the model does not have.
    """
    encoder = make_encoder(recipe.backend, tokenizer)
    if recipe.backend == "mistral-common":
        tokenizer.require_same_ids()
        if not tokenizer.has_template:
            tokenizer.oracle.chat_template()  # saved beside the adapter: if there is none, no hour is lost
    ids = base.vocab_size
    if encoder.vocab_size > ids:
        raise RecipeError(f"the tokenizer has {encoder.vocab_size} ids, the model {ids}", place=str(base))
    return encoder


def logger_callbacks(names: Sequence[str], folder: Path, *, writes: bool) -> list[Any]:
    """Return the callbacks of loggers.

    Args:
        names: The recipe's `report_to`.
        folder: Folder for TensorBoard's files; the other loggers have settings of their own.
        writes: Whether this process logs.
    """
    callbacks = [_logger(name, NOWHERE.within("training", "report_to")) for name in names]
    for name, callback in zip(names, callbacks, strict=True):
        if name == "tensorboard" and writes:
            # TensorBoard's default is inside the folder of checkpoints, which a finished run removes
            callback.tb_writer = callback._SummaryWriter(log_dir=str(folder))
    return callbacks


def _logger(name: str, place: Place) -> Any:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise RecipeError(f"{name!r}", place=place, expected=f"loggers that transformers knows: {known}")
    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise MachineError(
            f"{name!r} is not installed",
            place=place,
            next_step=f"Install it: pip install {_LOGGER_PACKAGES.get(name, name)}, or leave it out of report_to.",
        ) from error
