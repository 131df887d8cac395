"""The one pass over a dataset, and the result of each check.

The pass streams the rows in bounded memory, in several processes for long data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TextIO

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.likeness import shared_rows
from pytest_mistral_lora.chat.reading.chunks import Chunk, DataFile, bar, chunks, processes_for, total_bytes
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.cases import CASES, OF_CONVERSATIONS, OF_KEPT_ROWS
from pytest_mistral_lora.conformance.dataset.decoded_answers import decoded_answers
from pytest_mistral_lora.conformance.dataset.figures import figures_of
from pytest_mistral_lora.conformance.dataset.file_faults import fault_figures
from pytest_mistral_lora.conformance.dataset.lengths import cuts, histogram, spread
from pytest_mistral_lora.conformance.dataset.pairs import side_figures, sides_of_files
from pytest_mistral_lora.conformance.dataset.repeats import repeats_of
from pytest_mistral_lora.conformance.dataset.row_findings import ON_EVERY_ROW
from pytest_mistral_lora.conformance.dataset.rows import DatasetPass, ScanPlan
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result
from pytest_mistral_lora.conformance.pass_plan import judged_parts, loaded_judge
from pytest_mistral_lora.conformance.row_table import JudgedTable, digest_at, unpacked_place
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
) -> DatasetPass:
    """Read every row of some files once, and return what they show.

    Args:
        plan: The settings for judging rows.
        files: The files, in order.
        tokenizer: The plan's tokenizer, if it is loaded already.
        processes: Number of processes that judge rows, this one included if `tokenizer` is given; None for the number
            that `processes_for` returns. A tokenizer in memory is used in this process alone.
        progress: Stream for a progress bar, drawn if it is a terminal and the pass takes long; None for no bar.

    Raises:
        MistralLoraError: If a process that judges rows dies.
    """
    if processes is None:
        processes = processes_for(files)
    found = DatasetPass()
    parts = chain.from_iterable(_chunks_of(index, file, found) for index, file in enumerate(files))
    with bar(progress, total_bytes(files), "Judging rows") as advance:
        for part, read in judged_parts(plan, parts, processes, tokenizer):
            found.extend(part)
            advance(read)
    return found


def judge_shard(plan: ScanPlan, index: int, file: DataFile) -> DatasetPass:
    """Judge one file of a dataset; the process need not know the other files.

    The results of all files, merged by `DatasetPass.extend` in any order, equal the result of one pass.

    Args:
        plan: The settings by which rows are judged; a process loads the tokenizer of a plan once.
        index: Index of the file among those of the dataset.
        file: The file.
    """
    found = DatasetPass()
    for chunk in _chunks_of(index, file, found):
        found.extend(_judge(plan)(chunk))
    return found


_judge = lru_cache(maxsize=1)(partial(loaded_judge, None))


def _chunks_of(index: int, file: DataFile, found: DatasetPass) -> Iterator[Chunk]:
    """Yield the lines of a file; if it cannot be read, add that to a pass."""
    return chunks([file], partial(found.refuse, index, file), index)


def report(
    found: DatasetPass,
    files: Sequence[DataFile],
    plan: ScanPlan,
    *,
    recipe: Place,
    no_comparison: str = "",
    prompts: Mapping[str, int] | None = None,
) -> dict[str, Result]:
    """Return the result of each check, by case.

    Args:
        found: The result of the pass, or of its parts in any order.
        files: The files that it read.
        plan: The settings by which rows were judged.
        recipe: The place of the recipe, or of the rows alone.
        no_comparison: Why the two backends were not compared, if they were not.
        prompts: The numbers of prompts that were compared, refused and left out; None if none were to be compared.
    """
    found.put_in_order()
    for finding in _settings_findings(found, files, plan, recipe):
        found.findings.add(finding)
    found.report([file.place for file in files])
    answers = decoded_answers(found.states)
    cut, changed = (
        {name.replace(" ", "_"): number for name, number in counts.items()}
        for counts in (found.lengths.beyond, found.lengths.changed)
    )
    facts: dict[str, dict[str, Any]] = {
        "backends-agree": {
            "deviations": found.deviations.counts(),
            **({"prompts": dict(prompts)} if prompts else {}),
        },
        "nothing-is-cut": {"beyond_max_length": cut, "rows_changed": changed},
        "decoding-allows-answers": answers.figures,
        "statistics": _statistics(found, files, plan),
    }
    not_checked = {
        "rows-are-valid": found.unchecked.words,
        "backends-agree": no_comparison,
        "no-near-leakage": repeats_of(found.states).no_near_rows,
        "answers-are-read-back": answers.not_read_back.reason,
        "decoding-allows-answers": answers.why_not_by_grammar,
    }
    results = {}
    for case in CASES:
        # the laws are rules of the subject `mask`, and hold for every row
        rules = [*(sorted(ON_EVERY_ROW) if case == "laws-hold" else ()), *(r.id for r in RULES.of("dataset", case))]
        results[case] = Result(
            tuple(found.findings.of(*rules)),
            not_checked=not_checked.get(case, ""),
            facts=tuple(facts.get(case, {}).items()),
        )
    # a check without rows would pass on nothing; with a finding it has judged something
    judged, conversations = (
        sum(found.counts[index, name] for index in range(len(files))) for name in ("judged", "conversations")
    )
    for case, result in results.items():
        rows = len(found.table) if case in OF_KEPT_ROWS else judged
        if not rows and not result.findings and not result.not_checked:
            reason = "no row can be judged" if case not in OF_KEPT_ROWS else "no row is left"
            results[case] = replace(result, not_checked=f"{reason}: see the check `rows-are-valid`")
    if judged and not conversations:
        reason = f"no row is a conversation: each is {' or '.join(sorted(found.other_kinds))}"
        results |= {case: Result(not_checked=reason) for case in OF_CONVERSATIONS if not results[case].findings}
    return results


def _settings_findings(
    found: DatasetPass, files: Sequence[DataFile], plan: ScanPlan, recipe: Place
) -> Iterator[Finding]:
    """Yield a side of the split without rows, and the named deviations that this run would train on."""
    sides, effect = found.table.held_out, ""
    rows, held_count = len(sides), sum(sides)
    if plan.held_out and rows and held_count in (0, rows):
        effect = "holds out none" if not held_count else "leaves none to train on"
        yield Finding("ML615", f"{plan.held_out} of {rows} rows {effect}", recipe.within("data", "held_out"))
    # a side of the split whose rows are all dropped by the recipe's policies
    names = {False: ("train", "no row is left to train on"), True: ("eval", "no held-out row is left")}
    for is_held_out, (key, left) in () if effect else names.items():
        indices = [index for index, file in enumerate(files) if file.is_held_out == is_held_out]
        dropped = sum(found.counts[index, "dropped"] for index in indices)
        if dropped and not any(row_is_held_out == is_held_out for row_is_held_out in sides):
            yield Finding("ML615", f"{left}: {dropped} are dropped", recipe.within("data", key))
    if shared := shared_rows(*_likenesses(found.table, files)):
        yield Finding("ML615", shared, recipe.within("evaluation", "retention", "rows"), "rows of other subjects")
    # with mistral-common the template is only compared, and its deviations do not affect training
    if plan.backend == "chat-template":
        yield from found.deviations.findings()


def _likenesses(table: JudgedTable, files: Sequence[DataFile]) -> tuple[set[bytes], set[bytes]]:
    """Return the likenesses of the held-out rows, and those of the rows of other subjects, if there are any."""
    sides: tuple[set[bytes], set[bytes]] = (set(), set())
    if any(file.is_retention for file in files):
        for row, place in enumerate(table.places):
            if table.held_out[row]:
                sides[files[unpacked_place(place)[0]].is_retention].add(digest_at(table.likenesses, row))
    return sides


def _statistics(found: DatasetPass, files: Sequence[DataFile], plan: ScanPlan) -> dict[str, Any]:
    """Return the figures of the dataset, as plain JSON data."""
    figures, lengths = figures_of(found.states), found.lengths
    sides, held_count = sides_of_files(found.states), sum(found.table.held_out)
    tokens, supervised = spread(figures.tokens), spread(figures.supervised)
    ranked = sorted(figures.named.items(), key=lambda item: (-item[1], item[0]))
    of_records = ("refused", "dropped")
    of_kinds = (kind.count for kind in KINDS.values() if kind.count)
    of_chunks = (kind.count for kind in chunk_types().values() if kind.count)
    names = ("messages", *of_kinds, "assistant_turns", "rows_with_system_prompt", "rows_with_tools", *of_chunks)
    of_cuts: list[dict[str, int]] = cuts(lengths.tokens, plan.policy.max_length)
    if sides.alike:
        # of the pairs that differ, those that a cut makes equal
        for cut in of_cuts:
            cut["pairs_made_equal"] = sum(n for tokens, n in sides.alike.items() if tokens >= cut["max_length"])

    def total(name: str) -> int:
        counts = found.counts if name in of_records else figures.counts
        return sum(counts[index, name] for index in range(len(files)))

    return {
        "rows": len(found.table),
        "rows_refused": total("refused"),
        "rows_dropped": total("dropped"),
        "rows_trained_on": len(found.table) - held_count,
        "rows_held_out": held_count,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": round(supervised["total"] / tokens["total"], 4) if tokens["total"] else 0.0,
        "tokens_trained_on": total("tokens_trained_on"),
        "tokens_of_whole_rows": spread(lengths.tokens),
        "longest_row": _longest(found, files) if lengths.tokens else None,
        "longest_row_tokens": lengths.longest[0],
        "histogram": histogram(lengths.tokens),
        "cuts": of_cuts,
        **{name: total(name) for name in names},
        **{
            kind: {name: n for (category, name), n in ranked if category == kind}
            for kind in ("roles", "tools", "scripts")
        },
        **({"sides": side_figures(sides)} if found.table.sided else {}),
        "repeats": repeats_of(found.states).counts(),
        "texts": fault_figures(found.states),
        "files": [
            {
                "path": str(file.path),
                "held_out": file.is_held_out,
                **({} if file.objective.is_default else {"objective": str(file.objective)}),
                "rows": figures.counts[index, "rows"],
                **{name: found.counts[index, name] for name in of_records},
                **{name: figures.counts[index, name] for name in ("tokens", "supervised_tokens")},
            }
            for index, file in enumerate(files)
        ],
    }


def _longest(found: DatasetPass, files: Sequence[DataFile]) -> str:
    # it may be refused, and then it is not in the table
    file, record = unpacked_place(-found.lengths.longest[1])
    return str(replace(files[file].place, record=record))


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
