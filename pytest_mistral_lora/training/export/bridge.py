"""A recipe's run as other runners need it: its values, its rows as files, and the description of such a runner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import RecipeError, TokenizerError, short_json
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.programs.facts import works
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.adapter import lora_config, peft_targets
from pytest_mistral_lora.training.devices import precision_of
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.prepare import plan_run
from pytest_mistral_lora.training.recipe import Recipe, resolve_base
from pytest_mistral_lora.training.recipe.sections import Section
from pytest_mistral_lora.training.rows import ArrowFile
from pytest_mistral_lora.training.rows.loading import RunData, Split, load_data


@dataclass(frozen=True)
class ExportedRun:
    """A recipe's run, with its rows encoded, ready to be configured for a runner.

    Attributes:
        recipe: The recipe.
        base: Folder of the base checkpoint; the folder of a Hub base may lack weights.
        encoder: The backend that encoded the rows.
        tokenizer: The base's tokenizer by `AutoTokenizer`, as a runner loads it.
        data: The encoded rows.
        precision: `bf16`, `fp16` or `fp32`.
        as_messages: Whether the runner gets messages and encodes them; else it gets ids and labels.
    """

    recipe: Recipe
    base: BaseFolder
    encoder: Encoder
    tokenizer: Any
    data: RunData
    precision: str
    as_messages: bool = False

    @property
    def model(self) -> str:
        """The base for a runner: the name of a Hub repository, or the absolute path of a folder."""
        return self.recipe.base.repo or str(self.base.path.resolve())

    @property
    def revision(self) -> str | None:
        """The commit of a Hub base, 40 hex digits; None for a folder."""
        return self.recipe.base.revision

    @property
    def start(self) -> str | None:
        """The adapter to go on from, an absolute path; None for a new one."""
        start = self.recipe.lora.start
        return None if start is None else str(start.resolve())

    @property
    def targets(self) -> list[str]:
        """Names of the layers to adapt, as PEFT takes them."""
        return peft_targets(self.recipe.lora, planned_layers(self.base, self.recipe.lora))

    @property
    def objectives(self) -> dict[Objective, list[str]]:
        """The objectives of the rows to train on, each with the names of its files."""
        found: dict[Objective, list[str]] = {}
        for file in self.data.files:
            if not file.is_held_out:
                found.setdefault(file.objective, []).append(self.recipe.name_of(file.path))
        return found

    @property
    def declared(self) -> Objective | None:
        """The one objective of the rows to train on; None if it is the default, or if the files differ."""
        [first, *others] = self.objectives
        return None if others or first.is_default else first

    def splits(self, *, held_out: str) -> dict[str, Split]:
        """Return the rows to train on as `train`, and the held-out rows, if any, by the given name."""
        return {"train": self.data.train, **({held_out: self.data.held_out} if self.data.held_out.rows else {})}

    @property
    def steps(self) -> int:
        """Optimizer steps; the last step of an epoch may have fewer rows."""
        return self.recipe.training.planned_steps(len(self.data.train.rows))

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return self.recipe.training.warmup(self.steps)

    @property
    def eval_steps(self) -> int | None:
        """Optimizer steps between two held-out losses; None if nothing is held out."""
        if not self.data.held_out.rows:
            return None
        return self.recipe.training.eval_steps or self.steps

    @property
    def rows_at_once(self) -> int:
        """Rows of a padded micro-batch: the most that divide a step and stay within `micro_batch_tokens`."""
        # runners count rows and pad each to the longest, so a micro-batch is estimated at its worst
        training = self.recipe.training
        longest = max(self.data.train.lengths.max(), 1)
        sizes = (size for size in range(training.batch_size, 1, -1) if training.batch_size % size == 0)
        # a divisor of the batch: runners count micro-batches, and a shorter last one would change the step
        return next((size for size in sizes if size * longest <= training.micro_batch_tokens), 1)

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step, on one device."""
        return self.recipe.training.batch_size // self.rows_at_once

    @property
    def alpha(self) -> int:
        """LoRA's alpha, an integer in the configurations of all three runners.

        Raises:
            RecipeError: If it has a fraction.
        """
        return _whole(self.recipe.lora.alpha, "alpha")

    @property
    def patterns(self) -> tuple[dict[str, int], dict[str, int]]:
        """The ranks and the alphas of some layers, by patterns in the order in which PEFT saves them.

        Raises:
            RecipeError: If an alpha has a fraction.
        """
        lora = self.recipe.lora
        config = lora_config(lora, planned_layers(self.base, lora))
        alphas = {pattern: _whole(float(alpha), "alpha_pattern") for pattern, alpha in config.alpha_pattern.items()}
        return config.rank_pattern, alphas


def _whole(alpha: float, key: str) -> int:
    if not alpha.is_integer():
        raise RecipeError(
            f"{alpha}: the runner takes whole numbers only",
            place=NOWHERE.within("lora", key),
            next_step="Scale r and alpha so that alpha is one, or train here.",
        )
    return int(alpha)


def refuse_patterns(run: ExportedRun, title: str) -> None:
    """Refuse a run whose layers differ in rank or alpha, for a runner that has one for all.

    Raises:
        RecipeError: With the key and its value.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(run.recipe.lora, key):
            raise RecipeError(
                f"{short_json(patterns)}: {title} has no setting for it",
                place=NOWHERE.within("lora", key),
                next_step="Train here, or export a recipe with one rank and one alpha.",
            )


def plan_export(recipe: Recipe) -> ExportedRun:
    """Check base, layers and rows of a recipe as for a run here, without loading a weight.

    Raises:
        InputError: If base, layers or rows do not allow the run, or transformers cannot load the base's tokenizer.
    """
    from transformers import AutoTokenizer

    base = resolve_base(recipe.base, weights=False)
    encoder = plan_run(recipe, base).encoder
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, some far from the cause
        saving = "from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer"
        raise TokenizerError(
            "transformers finds no tokenizer that it can load, and runners load one of the base",
            place=str(base),
            expected="tokenizer.json and tokenizer_config.json",
            next_step=f"Write them, as a base of its own: {saving}; "
            f"CheckpointTokenizer(Path({str(base)!r})).fast.save_pretrained({str(base)!r})",
        ) from error
    training = recipe.training
    precision = training.precision
    if precision == "auto":
        # the exporting machine need not have the recipe's GPU
        here = training.model_copy(update={"device": "cpu" if training.device == "cpu" else "auto"})
        precision = precision_of(here)
    return ExportedRun(recipe, base, encoder, tokenizer, load_data(recipe, encoder), precision)


_ROWS_PER_BATCH = 1000


def encoded_lines(split: Split) -> Iterator[dict[str, list[int]]]:
    """Yield `input_ids`, `attention_mask` (ones) and `labels` of each row, which runners train on unchanged."""
    for row in split.encoded:
        ids = list(row.input_ids)
        yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(row.labels or ())}


def message_lines(split: Split) -> Iterator[dict[str, Any]]:
    """Yield the role and text of each row's messages."""
    for row in split.rows:
        yield {"messages": [{"role": message["role"], "content": message["content"]} for message in row.messages]}


def write_json_lines(
    run: ExportedRun, folder: Path, lines: Callable[[Split], Iterator[Mapping[str, Any]]] = encoded_lines
) -> None:
    """Write `train.jsonl`, and `test.jsonl` if rows are held out."""
    for name, split in run.splits(held_out="test").items():
        with (folder / f"{name}.jsonl").open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines(split))


def write_dataset(run: ExportedRun, folder: Path) -> None:
    """Write splits `train` and, if rows are held out, `validation`, for `datasets.load_from_disk`."""
    import pyarrow as pa

    schema = pa.schema(
        {"input_ids": pa.list_(pa.int32()), "attention_mask": pa.list_(pa.int8()), "labels": pa.list_(pa.int64())}
    )
    # Only the files that every version of datasets reads. A description of the columns is left out: it would have the
    # format of one version, and without it the columns are read from the Arrow file.
    sides = run.splits(held_out="validation")
    write_json(folder / "dataset_dict.json", {"splits": list(sides)})
    for name, split in sides.items():
        (folder / name).mkdir()
        arrow = folder / name / "data-00000-of-00001.arrow"
        with ArrowFile(arrow) as file:
            lines = encoded_lines(split)
            while batch := list(islice(lines, _ROWS_PER_BATCH)):
                file.write(pa.RecordBatch.from_pylist(batch, schema))
        write_json(folder / name / "dataset_info.json", {})
        digest = sha256_file(arrow)[:16]
        form: dict[str, Any] = {
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
        }
        data = {"_data_files": [{"filename": arrow.name}], "_fingerprint": digest, **form, "_split": name}
        write_json(folder / name / "state.json", data)


ADAPTER = "adapter"
"""Name of the folder in an exported folder into which the runner saves its adapter."""

ROWS = "rows"
"""Name of the folder in an exported folder that holds the rows."""

TEMPLATE = "training.jinja"

CHAT_ROWS = "chat.jsonl"
"""The chat rows that the rows to train on come from."""

APPLIED: Mapping[str, str] = {
    "backend": "rows are encoded",
    "data.train": "rows are encoded",
    "data.eval": "rows are held out",
    "data.held_out": "rows are held out",
    "training.truncation": "longer rows are cut or left out",
    "training.unsupervised": "rows without loss are left out or kept",
    "training.objective": "labels are those of the objective",
}
"""Keys of a recipe that the written rows already follow, each with its effect on them."""

_ANSWERS = "held-out rows are not answered"
_GATE = "base and adapter are not compared at the end"
_OWN_SAFEGUARD = "a safeguard of this project's trainer"

LEFT_OUT: Mapping[str, str] = {
    "base.name": "the adapter names its base by the path",
    "base.weights_sha256": "the runner does not compare the weights; they were the pinned ones when this was written",
    "training.share_prefix": "the runner has none; it changes no gradient",
    "training.max_skipped_steps": _OWN_SAFEGUARD,
    "training.dry_run": _OWN_SAFEGUARD,
    "training.on_oom": _OWN_SAFEGUARD,
    "training.checkpoint_minutes": "the runner counts steps",
    "training.stop_at_grad_norm": _OWN_SAFEGUARD,
    "evaluation.generations": _ANSWERS,
    "evaluation.generation_steps": _ANSWERS,
    "evaluation.max_new_tokens": _ANSWERS,
    "evaluation.checks": _ANSWERS,
    "evaluation.gate": _GATE,
    "evaluation.retention": _GATE,
    "evaluation.commands": "the runner lists none: run them yourself",
    "deployment": "the runner records none",
    "card": "the runner writes a card of its own",
    "output": f"the adapter is saved in {ADAPTER}/ of this folder",
}
"""Keys of a recipe that runners lack, each with the consequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """A runner and the functions that write a run for it.

    Attributes:
        name: The runner's name in options.
        title: The runner's own name.
        config: Name of its configuration file.
        command: The command that starts the run in the exported folder.
        settings: Returns its configuration for a run.
        write_rows: Writes the rows of a run into a folder.
        remarks: Yields the differences from a run here, as sentences.
        left_out: Keys of a recipe that this runner lacks, beside `LEFT_OUT`, each with the consequence.
        takes_messages: Whether a chat template can make its own encoding exact.
        objectives: Its settings that declare an objective, by the words; they change no label of an encoded row.
    """

    name: str
    title: str
    config: str
    command: str
    settings: Callable[[ExportedRun], dict[str, Any]]
    write_rows: Callable[[ExportedRun, Path], None]
    remarks: Callable[[ExportedRun], Iterator[str]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    takes_messages: bool = False
    objectives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def declaration(self, run: ExportedRun) -> Mapping[str, Any]:
        """Return the settings that declare the objective of a run; empty without one, or if no setting expresses it."""
        return self.objectives.get(str(run.declared), {})

    def objective_remarks(self, run: ExportedRun) -> Iterator[str]:
        """Yield how the declared objectives of a run are expressed, as a sentence."""
        labels = f"The labels in {ROWS}/ have it, and {self.title} trains on them unchanged"
        if len(run.objectives) > 1:
            named = ", ".join(f"{objective} ({', '.join(files)})" for objective, files in run.objectives.items())
            yield (
                f"The files have different objectives: {named}. {self.title} has no setting for that. "
                f"{labels.replace('have it', 'have them')}. `mistral-lora check` judges all rows by one objective: to "
                "audit these rows, export a recipe for the files of each objective."
            )
        elif run.declared is not None:
            keys = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in self.declaration(run).items())
            how = f"{keys} declares it" if keys else f"{self.title} has no setting for it"
            yield f"The objective of the rows is {run.declared}: {how}. {labels}."

    @property
    def versions(self) -> str:
        """The versions that ran an exported run: those of the runner and of transformers."""
        of_runner, *beside = works(f"export-{self.name}").versions.items()
        return ", ".join([f"{self.title} {of_runner[1]}", *(f"{name} {version}" for name, version in beside)])

    def unsupported_keys(self, recipe: Recipe) -> dict[str, str]:
        """Return the keys that a recipe sets and this runner has no setting for, each with the consequence."""
        meanings, keys = {**LEFT_OUT, **self.left_out}, []
        for name in type(recipe).model_fields:
            section = getattr(recipe, name)
            # a section that runners lack as a whole is named as one key
            if isinstance(section, Section) and name not in meanings:
                keys += [f"{name}.{key}" for key in _changed_keys(section)]
            elif name in _changed_keys(recipe):
                keys.append(name)
        return {key: meanings[key] for key in keys if key in meanings}


def _changed_keys(section: Section) -> list[str]:
    """Return the keys of a section whose value is not the default."""
    fields = type(section).model_fields
    defaults = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    return [key for key, default in defaults.items() if getattr(section, key) != default]
