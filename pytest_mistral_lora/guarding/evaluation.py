"""The first batches of a trainer's evaluations, read as those of its training: in a copy of this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.guarding.batches import first_batches, rows_of, why_watched
from pytest_mistral_lora.guarding.process_copy import NoCopyError, run_in_copy
from pytest_mistral_lora.guarding.verdict import EVALUATION, FirstRows, GuardedRow
from pytest_mistral_lora.places import NamedSource, Place

_CASE = "rows"
"""The case of what is left out."""


def first_eval_rows(trainer: Any, count: int) -> FirstRows | None:
    """Return the rows of the first batches of each evaluation dataset of a trainer; None if it has none.

    The loaders are made in the copy, too, so that the trainer and its accelerator do not know them. A dataset that
    cannot be read is left out with its reason: the run may never evaluate.

    Args:
        trainer: The trainer; None if it is unknown.
        count: The number of batches of each dataset.
    """
    datasets = getattr(trainer, "eval_dataset", None)
    if datasets is None:
        return None
    if getattr(trainer.args, "predict_with_generate", False):
        return FirstRows([], 0, left_out={_CASE: "eval_dataset: the evaluation generates, and has no loss"})
    names = list(datasets) if isinstance(datasets, dict) else [None]
    try:
        found = run_in_copy(lambda: _first_items(trainer, names, count))
    except NoCopyError as error:
        return FirstRows([], 0, left_out={_CASE: f"eval_dataset: {error.reason}"})
    except Exception as error:  # ours: the run goes on
        return FirstRows([], 0, left_out={_CASE: f"eval_dataset: {type(error).__name__}: {one_line(error)}"})
    reasons = [item for item in found if isinstance(item, str)]
    batches = [item for item in found if isinstance(item, list)]
    left_out = {_CASE: "; ".join(reasons)} if reasons else {}
    of = sum(item for item in found if isinstance(item, int))
    return FirstRows([row for rows in batches for row in rows], len(batches), of, left_out=left_out)


def _first_items(trainer: Any, names: list[str | None], count: int) -> Iterator[list[GuardedRow] | int | str]:
    """Yield the size of each dataset and the rows of its batches, or the reason why it cannot be read."""
    for name in names:
        place = Place(NamedSource("eval_dataset", is_value=True), split=name)
        suffix = "" if name is None else f"[{name!r}]"
        try:
            loader = trainer.get_eval_dataloader() if name is None else trainer.get_eval_dataloader(name)
            if reason := why_watched(loader):
                yield f"{place}: {reason}"
                continue
            yield len(loader.dataset)
            dataset = trainer.eval_dataset if name is None else trainer.eval_dataset[name]
            for number, batch in enumerate(first_batches(loader, dataset, count)):
                yield rows_of(batch, number, place, f"{EVALUATION}{suffix}")
        except Exception as error:  # of the dataset or the collator: the evaluation would end with it
            yield f"{place}: {type(error).__name__}: {one_line(error)}"
