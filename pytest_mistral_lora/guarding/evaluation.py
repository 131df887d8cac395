"""The first batches of a trainer's evaluations, made as those of its training."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.guarding.batches import known_libraries, next_batches, rows_of, without_new_loaders
from pytest_mistral_lora.guarding.rows import EVALUATION, FirstRows, GuardedRow
from pytest_mistral_lora.places import NamedSource, Place

_CASE = "rows"
"""The case of what is left out."""


def first_eval_rows(trainer: Any, count: int) -> FirstRows | None:
    """Return the rows of the first batches of each evaluation dataset of a trainer; None if it has none.

    A dataset that cannot be read is left out with its reason: the run may never evaluate. The random states move: call
    it `undisturbed`.

    Args:
        trainer: The trainer; None if it is unknown.
        count: The number of batches of each dataset.
    """
    datasets = getattr(trainer, "eval_dataset", None)
    if datasets is None:
        return None
    if getattr(trainer.args, "predict_with_generate", False):
        return FirstRows([], 0, left_out={_CASE: "eval_dataset: the evaluation generates, and has no loss"})
    maker = type(trainer).get_eval_dataloader
    if str(maker.__module__).partition(".")[0] not in known_libraries():
        reason = f"eval_dataset: {maker.__qualname__} is code of your own, which the guard does not call"
        return FirstRows([], 0, left_out={_CASE: reason})
    rows: list[GuardedRow] = []
    reasons, batches, size = [], 0, 0
    for name, dataset in datasets.items() if isinstance(datasets, dict) else [(None, datasets)]:
        place = Place(NamedSource("eval_dataset", is_value=True), split=name)
        try:
            with without_new_loaders(trainer):
                loader = trainer.get_eval_dataloader() if name is None else trainer.get_eval_dataloader(name)
                found = next_batches(loader, dataset, count)
        except Exception as error:  # of the dataset or the collator: the evaluation would end with it
            reasons.append(f"{place}: {type(error).__name__}: {one_line(error)}")
            continue
        if found.reason:
            reasons.append(f"{place}: {found.reason}")
            continue
        suffix = "" if name is None else f"[{name!r}]"
        for number, batch in enumerate(found.batches):
            rows += rows_of(batch, number, place, f"{EVALUATION}{suffix}")
        batches += len(found.batches)
        size += found.size or 0
    return FirstRows(rows, batches, size, left_out={_CASE: "; ".join(reasons)} if reasons else {})
