"""The one pass over a dataset, and the result of each check.

The pass streams the rows in bounded memory, in several processes for long data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TextIO

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile, bar, chunks, in_order, processes_for, total_bytes
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.answers import (
    BY_GRAMMAR,
    NOT_BY_GRAMMAR,
    NOT_READ_BACK,
)
from pytest_mistral_lora.conformance.dataset.cases import CASES, OF_CONVERSATIONS, OF_KEPT_ROWS
from pytest_mistral_lora.conformance.dataset.file_rules import note_files
from pytest_mistral_lora.conformance.dataset.pairs import (
    side_figures,
)
from pytest_mistral_lora.conformance.dataset.row_findings import ON_EVERY_ROW
from pytest_mistral_lora.conformance.dataset.rows import RowJudge, ScanPlan
from pytest_mistral_lora.conformance.dataset.tally import (
    DatasetTally,
    cuts,
    histogram,
    packed_place,
    spread,
    unpacked_place,
)
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Training


def scan(
    plan: ScanPlan,
    files: Sequence[DataFile],
    *,
    tokenizer: CheckpointTokenizer | None = None,
    processes: int | None = None,
    progress: TextIO | None = None,
) -> DatasetTally:
    """Read every row of some files once, and return their columns, counts and findings.

    Args:
        plan: The settings for judging rows.
        files: The files, in order.
        tokenizer: The plan's tokenizer, if it is loaded already.
        processes: Number of processes that judge rows, this one included if `tokenizer` is given; None for the number
            that `processes_for` returns.
        progress: Stream for a progress bar, drawn if it is a terminal and the pass takes long; None for no bar.

    Raises:
        MistralLoraError: If a process that judges rows dies.
    """
    if processes is None:
        processes = processes_for(files)
    tally = DatasetTally()
    here = None if tokenizer is None else RowJudge(plan, tokenizer).judge_chunk
    prepare = _judge if tokenizer is None else partial(_judge_with, tokenizer.loaded_fast)
    read_files = (_chunks_of(index, file, tally) for index, file in enumerate(files))
    with bar(progress, total_bytes(files), "Judging rows") as advance:
        for part, read in in_order(prepare, plan, chain.from_iterable(read_files), processes, here):
            tally.extend(part)
            advance(read)
    return tally


def judge_shard(plan: ScanPlan, index: int, file: DataFile) -> DatasetTally:
    """Judge one file of a dataset; the process need not know the other files.

    The results of all files, merged by `DatasetTally.extend` in any order, equal the result of one pass.

    Args:
        plan: The settings by which rows are judged; a process loads the tokenizer of a plan once.
        index: Index of the file among those of the dataset.
        file: The file.
    """
    tally = DatasetTally()
    for chunk in _chunks_of(index, file, tally):
        tally.extend(_judge(plan)(chunk))
    return tally


@lru_cache(maxsize=1)
def _judge(plan: ScanPlan) -> Callable[[Chunk], DatasetTally]:
    return RowJudge(plan).judge_chunk


def _judge_with(fast: Any, plan: ScanPlan) -> Callable[[Chunk], DatasetTally]:
    """Judge rows with the parent process's `transformers` tokenizer: converting takes long."""
    tokenizer = CheckpointTokenizer(plan.tokenizer, plan.oracle_name)
    if fast is not None:
        tokenizer.use_fast(fast)
    return RowJudge(plan, tokenizer).judge_chunk


def _chunks_of(index: int, file: DataFile, tally: DatasetTally) -> Iterator[Chunk]:
    """Yield the lines of a file; if it cannot be read, add that to a tally."""

    def note(error: InputError) -> None:
        tally.findings.at = packed_place(index, 0)
        tally.findings.add(Finding("ML602", error.found, error.place, error.expected, error.next_step))

    return chunks([file], note, index)


def report(
    tally: DatasetTally, files: Sequence[DataFile], plan: ScanPlan, *, recipe: Place, no_comparison: str = ""
) -> dict[str, Result]:
    """Return the result of each check, by case.

    Args:
        tally: The result of the pass, or of its parts in any order.
        files: The files that it read.
        plan: The settings by which rows were judged.
        recipe: The place of the recipe, or of the rows alone.
        no_comparison: Why the two backends were not compared, if they were not.
    """
    tally = tally.ordered()
    found = _Report(tally, files, plan)
    found.note_settings(recipe)
    of_files = note_files(tally, [Place.of(file.path) for file in files])
    deviations = {name: count for name, (count, *_) in sorted(tally.deviations.items())}
    cut, changed = (
        {name.replace(" ", "_"): number for name, number in counts.items()} for counts in (tally.beyond, tally.changed)
    )
    facts: dict[str, dict[str, Any]] = {
        "backends-agree": {"deviations": deviations},
        "nothing-is-cut": {"beyond_max_length": cut, "rows_changed": changed},
        "statistics": found.statistics(of_files.repeats, of_files.texts),
    }
    not_checked = {
        "backends-agree": no_comparison,
        "no-near-leakage": of_files.no_near_rows,
        "answers-are-read-back": next((why for kind, why in tally.named if kind == NOT_READ_BACK), ""),
        "decoding-allows-answers": next((why for kind, why in tally.named if kind == NOT_BY_GRAMMAR), ""),
    }
    if tally.named[BY_GRAMMAR, ""]:
        # what a grammar could not judge is a figure beside what it has judged
        facts["decoding-allows-answers"] = {
            "rows_by_grammar": tally.named[BY_GRAMMAR, ""],
            "rows_not_by_grammar": sum(rows for (kind, _), rows in tally.named.items() if kind == NOT_BY_GRAMMAR),
        }
        not_checked["decoding-allows-answers"] = ""
    results = {}
    for case in CASES:
        # the laws are rules of the subject `mask`, and hold for every row
        rules = [*(sorted(ON_EVERY_ROW) if case == "laws-hold" else ()), *(r.id for r in RULES.of("dataset", case))]
        results[case] = Result(
            tuple(tally.findings.of(*rules)),
            not_checked=not_checked.get(case, ""),
            facts=tuple(facts.get(case, {}).items()),
        )
    # a check without rows would pass on nothing; with a finding it has judged something
    for case, result in results.items():
        rows = len(tally) if case in OF_KEPT_ROWS else sum(tally.counts[n, "judged"] for n in range(len(files)))
        if not rows and not result.findings and not result.not_checked:
            reason = "no row can be judged" if case not in OF_KEPT_ROWS else "no row is left"
            results[case] = replace(result, not_checked=f"{reason}: see the check `rows-are-valid`")
    others = sorted(title for kind, title in tally.named if kind == "other kinds")
    if others and not any(kind == "conversations" for kind, _ in tally.named):
        reason = f"no row is a conversation: each is {' or '.join(others)}"
        results |= {case: Result(not_checked=reason) for case in OF_CONVERSATIONS if not results[case].findings}
    return results


@dataclass(frozen=True)
class _Report:
    """The findings and figures that need all rows, except those about repeated rows."""

    tally: DatasetTally
    files: Sequence[DataFile]
    plan: ScanPlan

    @property
    def _longest(self) -> str:
        # it may be refused, and then it is not in the table
        file, record = unpacked_place(-self.tally.longest[1])
        return str(Place.of(self.files[file].path, record))

    def note_settings(self, recipe: Place) -> None:
        """Note a side of the split without rows, and the named deviations that this run would train on."""
        rows, held_count, effect = len(self.tally), sum(self.tally.held_out), ""
        if self.plan.held_out and rows and held_count in (0, rows):
            effect = "holds out none" if not held_count else "leaves none to train on"
            self.tally.findings.add(
                Finding("ML615", f"{self.plan.held_out} of {rows} rows {effect}", recipe.within("data", "held_out"))
            )
        # a side of the split whose rows are all dropped by the recipe's policies
        names = {False: ("train", "no row is left to train on"), True: ("eval", "no held-out row is left")}
        for is_held_out, (key, left) in () if effect else names.items():
            indices = [index for index, file in enumerate(self.files) if file.is_held_out == is_held_out]
            dropped = sum(self.tally.counts[index, "dropped"] for index in indices)
            if dropped and not any(row_is_held_out == is_held_out for row_is_held_out in self.tally.held_out):
                self.tally.findings.add(Finding("ML615", f"{left}: {dropped} are dropped", recipe.within("data", key)))
        # with mistral-common the template is only compared, and its deviations do not affect training
        deviations = sorted(self.tally.deviations.items()) if self.plan.backend == "chat-template" else ()
        for name, (count, _, first) in deviations:
            found = f"{name} in {counted(count, 'row')}; the first is here"
            self.tally.findings.add(Finding("ML604", found, first))

    def statistics(self, repeats: dict[str, Any], texts: dict[str, Any]) -> dict[str, Any]:
        """Return the figures of the dataset, as plain JSON data.

        Args:
            repeats: The numbers of repeated rows.
            texts: The rows with faults of whole files.
        """
        tally = self.tally
        tokens, supervised = spread(tally.tokens), spread(tally.supervised)
        ranked = sorted(tally.named.items(), key=lambda item: (-item[1], item[0]))
        of_file = ("rows", "refused", "dropped", "tokens", "supervised_tokens")
        of_kinds = (kind.count for kind in KINDS.values() if kind.count)
        of_chunks = (kind.count for kind in chunk_types().values() if kind.count)
        names = ("messages", *of_kinds, "assistant_turns", "rows_with_system_prompt", "rows_with_tools", *of_chunks)
        lengths: dict[str, Any] = {
            "tokens_of_whole_rows": spread(tally.lengths),
            "longest_row": self._longest if tally.lengths else None,
            "longest_row_tokens": tally.longest[0],
            "histogram": histogram(tally.lengths),
            "cuts": cuts(tally.lengths, self.plan.policy.max_length),
        }
        if tally.alike:
            # of the pairs that differ, those that a cut makes equal
            for cut in lengths["cuts"]:
                cut["pairs_made_equal"] = sum(n for tokens, n in tally.alike.items() if tokens >= cut["max_length"])
        return {
            "rows": len(tally),
            "rows_refused": sum(tally.counts[file, "refused"] for file in range(len(self.files))),
            "rows_dropped": sum(tally.counts[file, "dropped"] for file in range(len(self.files))),
            "rows_trained_on": len(tally) - sum(tally.held_out),
            "rows_held_out": sum(tally.held_out),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": round(supervised["total"] / tokens["total"], 4) if tokens["total"] else 0.0,
            "tokens_trained_on": sum(tally.counts[file, "tokens_trained_on"] for file in range(len(self.files))),
            **lengths,
            **{name: sum(tally.counts[file, name] for file in range(len(self.files))) for name in names},
            **{
                kind: {name: n for (category, name), n in ranked if category == kind}
                for kind in ("roles", "tools", "scripts")
            },
            **({"sides": side_figures(tally)} if tally.sided else {}),
            "repeats": repeats,
            "texts": texts,
            "files": [
                {
                    "path": str(file.path),
                    "held_out": file.is_held_out,
                    **{name: tally.counts[index, name] for name in of_file},
                }
                for index, file in enumerate(self.files)
            ],
        }


def epoch(training: Training, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps of one pass over the rows that a recipe trains on.

    Args:
        training: The recipe's section.
        statistics: The figures of the dataset.
    """
    rows, tokens = statistics["rows_trained_on"], statistics["tokens_trained_on"]
    steps = -(-rows // training.batch_size)
    found = {"rows": rows, "batch_size": training.batch_size, "steps": steps}
    if steps:
        found["tokens_per_step"] = round(tokens / steps)
        # rows are packed without padding, and a longer row gets its own pass
        found["micro_batch_tokens"] = training.micro_batch_tokens
        found["micro_batches_per_step_at_least"] = -(-tokens // (steps * training.micro_batch_tokens))
        planned = training.steps if training.steps is not None else math.ceil((training.epochs or 1) * steps)
        found |= {"steps_of_the_run": planned, "epochs_of_the_run": round(planned / steps, 2)}
    return found
