"""The verdict on a run that has not begun: its rows by the checks of encoded rows, and its model and tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.chunks.registry import block_literals, block_types, blocks_in
from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.checkpoint.loaded_tokenizer import recognise_loaded, recognition_of, source_of, text_tokenizer
from pytest_mistral_lora.checkpoint.recognition import Recognition
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.checks import Subject
from pytest_mistral_lora.conformance.collection import require_objectives
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result
from pytest_mistral_lora.conformance.model_targets import TrainerTarget, WatchedTarget
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.conformance.session import opened_session
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.conformance.trainer import embedding_shape
from pytest_mistral_lora.errors import TokenizerError, counted, one_line
from pytest_mistral_lora.guarding.epoch import EpochRows
from pytest_mistral_lora.guarding.forms import fixes_of, form_of, trains
from pytest_mistral_lora.guarding.rows import COLUMNS_OF_TEXTS, EVALUATION, FirstRows, GuardedRow, RowFigures
from pytest_mistral_lora.guarding.steps import WAITING
from pytest_mistral_lora.judging import AnyTokenizer, Verdict, encoder_of, verdict_of
from pytest_mistral_lora.programs.fixes import fixes_in
from pytest_mistral_lora.runners import Trainer, trainer_of

OF_ANY = Path(__file__).with_name("fixes.toml")
"""What to do with any trainer of transformers, by rule."""

_NEVER_CHECKED = ("rows-complete",)
"""Cases that are of files alone: the first batches of a run are never all of its rows."""

_COMMAND = "guard(trainer)"


@dataclass(frozen=True)
class GuardedRun:
    """A run of a trainer, before its first step.

    Attributes:
        args: The `TrainingArguments`.
        model: The model.
        processing_class: The tokenizer or processor.
        named: The Mistral tokenizer that the user names, or None.
        padder: The tokenizer of the collator, which tells the Mistral tokenizer if there is no `processing_class`.
    """

    args: Any
    model: Any
    processing_class: Any
    named: AnyTokenizer | None
    padder: Any = None

    @cached_property
    def source(self) -> CheckpointTokenizer | None:
        """The folder that the tokenizer was loaded from; None if it is not on this machine."""
        return source_of(text_tokenizer(self.processing_class))

    @cached_property
    def known(self) -> Recognition:
        """The Mistral tokenizer of the run.

        Raises:
            InputError: If the named tokenizer is missing.
            TokenizerError: If it cannot be loaded.
        """
        if self.named is not None:
            return recognition_of(encoder_of(self.named).tokenizer)
        loaded = text_tokenizer(self.processing_class)
        loaded = text_tokenizer(self.padder) if loaded is None else loaded
        source = self._beside_model if loaded is None else source_of(loaded)
        try:
            if source is not None:
                return recognition_of(source)
            if loaded is None:
                return Recognition(None, "", reason="the trainer has no processing_class with a tokenizer")
            return recognise_loaded(loaded)
        except TokenizerError as error:
            return Recognition(None, "", reason=str(error))

    @property
    def _beside_model(self) -> CheckpointTokenizer | None:
        """The tokenizer in the folder that the model was loaded from; None if there is none on this machine."""
        return source_of(getattr(self.model, "config", None))

    @cached_property
    def trainer(self) -> Trainer | None:
        """The trainer whose arguments the run has; None for an unknown one."""
        return trainer_of({cls.__module__.partition(".")[0] for cls in type(self.args).__mro__})

    def declared(self, sample: Mapping[str, Any], *, of_preferences: bool) -> Declaration | None:
        """Return the objective that the arguments declare; None if they declare nothing.

        Args:
            sample: As for `fixes`. Rows of ids alone have the labels of whoever made them, and answers in a prompt have
                none, whatever an argument says: rows of messages are meant.
            of_preferences: As for `fixes`.
        """
        if self.trainer is None or self.form(sample, of_preferences=of_preferences) != "messages":
            return None
        return self.trainer.declares(vars(self.args))

    def form(self, sample: Mapping[str, Any], *, of_preferences: bool) -> str:
        """Return the form of the rows that the trainer was given.

        Args:
            sample: As for `fixes`.
            of_preferences: As for `fixes`.
        """
        field = getattr(self.args, "dataset_text_field", None) or "text"
        is_packed = bool(getattr(self.args, "packing", False))
        return form_of(sample, field, of_preferences=of_preferences, is_packed=is_packed)

    def fixes(self, sample: Mapping[str, Any], *, of_preferences: bool) -> Mapping[str, str]:
        """Return the fix of each rule in the words of the trainer, for the form of the rows that it was given.

        Args:
            sample: A row of the trainer's dataset; empty if it is unknown.
            of_preferences: Whether the trainer is one of preferences.
        """
        form = self.form(sample, of_preferences=of_preferences)
        return {**fixes_in(OF_ANY)["guard"], **fixes_of(self.trainer, form)}


def judge_run(
    run: GuardedRun,
    read: FirstRows,
    started: float,
    *,
    epoch: EpochRows,
    evaluation: FirstRows | None = None,
    first_step: Mapping[str, Result] = WAITING,
    rules: RuleSet | None = None,
    objective: Declaration | None = None,
) -> Verdict:
    """Judge the rows, the model and the tokenizer of a run.

    Args:
        run: The run.
        read: The rows of its first batches, as `judged_rows` returns them.
        started: The time of `time.perf_counter` at which the guard began.
        epoch: The same rows, and those behind them.
        evaluation: The rows of the first batches of its evaluation, likewise; None if it has none.
        first_step: The results of its first step, by their checks.
        rules: The rules of the version by which findings fail; None for all rules.
        objective: The objective that the user declares; None if the arguments alone may declare one.

    Raises:
        InputError: As for `GuardedRun.known`; if the user and the arguments declare different objectives; or if the
            tokenizer or the rows do not take the objective.
        TokenizerError: As for `GuardedRun.known`.
    """
    rows, oracle = read.rows, run.known.oracle
    fixes, objective = _of_trainer(run, read, objective)
    trainer = TrainerTarget(
        "trainer",
        model=run.model,
        processing_class=run.processing_class,
        known=run.known,
        base=run.source,
        has_inputs=MEDIA in read.left_out or any(row.has_tensors for row in rows),
        trains_eos=oracle is not None and oracle.eos_id in read.labels,
        has_eos=oracle is not None and trains(read.sample, oracle.eos_id),
        ids={token for row in rows for ids, _ in row.sequences() for token in ids},
        left_out=read.left_out,
        fixes=fixes,
    )
    # first: rows are shown by the last target of a name
    targets: list[Target] = [WatchedTarget("trainer", results=of_step(first_step))]
    for name, part in (("batches", read), (EVALUATION, evaluation)):
        if part is None:
            continue
        if name == EVALUATION and part.left_out:
            left_out: Results = {("encoded", case): Result(not_checked=why) for case, why in part.left_out.items()}
            targets.append(WatchedTarget(EVALUATION, results=left_out))
        if part.rows:
            source = epoch if part is read else EpochRows(name, part)
            targets.append(EncodedTarget(name, judge=trainer, source=source, fixes=fixes, objective=objective))

    require_objectives(targets)
    with opened_session([*targets, trainer], CheckOptions(rules=rules), keeps_going=True) as session:
        verdict = verdict_of(session, _COMMAND, lambda session: [_cost(epoch, read, time.perf_counter() - started)])
    if evaluation is not None and evaluation.rows and read.rows:
        leaks: Results = {("dataset", "no-leakage"): epoch.also_trained_on(evaluation)}
        return with_results(verdict, EVALUATION, leaks, rules)
    return verdict


def _of_trainer(
    run: GuardedRun, read: FirstRows, objective: Declaration | None
) -> tuple[Mapping[str, str], Declaration | None]:
    """Return the fixes for rows of a run, and their objective, which the user or the arguments declare.

    Raises:
        InputError: If both declare one, and they differ.
    """
    of_preferences = any("input_ids" not in row.record for row in read.rows)
    declared = run.declared(read.sample, of_preferences=of_preferences)
    fixes = dict(run.fixes(read.sample, of_preferences=of_preferences))
    with suppress(Exception):  # of a model of another kind
        for rows in embedding_shape(run.model.get_input_embeddings())[:1]:
            fixes["ML520"] = f"The embeddings have {rows:,} rows. {fixes.get('ML520', RULES['ML520'].fix_text)}"
    return fixes, Declaration.agreed(objective, declared)


def with_later_step(
    verdict: Verdict | None,
    run: GuardedRun,
    read: FirstRows,
    name: str,
    results: Mapping[str, Result],
    *,
    rules: RuleSet | None = None,
    objective: Declaration | None = None,
) -> tuple[Verdict | None, str]:
    """Return a verdict with the rules that a later step is the first to break, and its text if one is an error.

    Args:
        verdict: The verdict so far.
        run: The run.
        read: The rows of the first batch of the step.
        name: The name of the step, in node ids.
        results: The results of its gradient, by their checks.
        rules: As for `judge_run`.
        objective: As for `judge_run`.

    Raises:
        InputError: As for `judge_run`.
        TokenizerError: As for `judge_run`.
    """
    read = judged_rows(run, read)
    fixes, objective = _of_trainer(run, read, objective)
    trainer = TrainerTarget(
        "trainer", model=run.model, processing_class=run.processing_class, known=run.known, base=run.source, fixes=fixes
    )

    def judge(earlier: Verdict | None) -> Verdict:
        targets: list[Target] = [WatchedTarget(name, results=of_step(results))]
        if read.rows:
            rows = EpochRows(name, read)
            targets.append(EncodedTarget(name, judge=trainer, source=rows, fixes=fixes, objective=objective))
        require_objectives(targets)
        with opened_session(targets, CheckOptions(rules=rules), keeps_going=True) as session:
            return verdict_of(session, _COMMAND, earlier=earlier)

    known = set() if verdict is None else {rule for finding in verdict.findings for rule in _rules_of(finding)}
    new = [finding for finding in judge(None).findings if finding.rule not in known]
    if not new:
        return verdict, ""
    verdict = judge(verdict)
    return verdict, str(verdict) if any(finding.severity == "error" for finding in new) else ""


def _rules_of(finding: Finding) -> Iterator[str]:
    """Yield the rule of a finding, and those of the findings that it explains."""
    yield finding.rule
    yield from (rule for rule, _ in finding.covers)


Results = Mapping[tuple[Subject, str], Result]
"""Results by the subject and the case of their checks."""


def with_results(verdict: Verdict | None, name: str, results: Results, rules: RuleSet | None = None) -> Verdict:
    """Return a verdict with results that it could not have before.

    Args:
        verdict: The verdict so far.
        name: The name of what was judged, in node ids.
        results: The results.
        rules: As for `judge_run`.
    """
    with opened_session([WatchedTarget(name, results=results)], CheckOptions(rules=rules)) as session:
        return verdict_of(session, _COMMAND, earlier=verdict)


def with_tokens(verdict: Verdict, rows: Iterable[TokenRow]) -> Verdict:
    """Return a verdict with rows for its page of tokens, before those of its findings."""
    return replace(verdict, _rows=(*rows, *verdict._rows))


def of_step(results: Mapping[str, Result]) -> Results:
    """Return the results of a step, which are by case."""
    return {("train", case): result for case, result in results.items()}


MEDIA = "media"
"""The case, and the beginning of the reason, of rows with inputs whose ids are not known."""


def judged_rows(run: GuardedRun, read: FirstRows) -> FirstRows:
    """Return the rows that can be judged, with the reasons why others are left out.

    Raises:
        InputError: As for `GuardedRun.known`.
        TokenizerError: As for `GuardedRun.known`.
    """
    if not read.rows:
        reason = "the batches have no input_ids" if read.batches else "the run had no batch"
        return replace(read, left_out={"rows": reason, **read.left_out})
    config, oracle = getattr(run.model, "config", None), run.known.oracle
    keys = (key for kind in block_types().values() for key in kind.id_keys)
    inputs = {token for token in (getattr(config, key, None) for key in keys) if token is not None}
    readable = oracle.block_ids if oracle is not None and oracle.image_sizes is not None else frozenset()
    inputs |= oracle.block_ids if oracle is not None else set()
    # the ids of a batch with such tensors may not show which of its rows has them
    are_shown = any(row.has_tensors and row.holds(inputs) for row in read.rows)
    left_out = dict(read.left_out)
    rows = []
    for row in read.rows:
        is_input = row.holds(inputs) if are_shown or not row.has_tensors else True
        if not is_input or (readable and row.holds(readable)) or _spells(row, inputs):
            rows.append(_with_own_texts(row) if is_input else row)
    if len(rows) < len(read.rows):
        left_out[MEDIA] = f"media: {len(read.rows) - len(rows)} of {counted(len(read.rows), 'row')} have an image"
    labelled = [row for row in rows if "input_ids" not in row.record or "labels" in row.record]
    if len(labelled) < len(rows):
        left_out["labels"] = f"{len(rows) - len(labelled)} of {counted(len(read.rows), 'row')} have no labels"
    return replace(read, rows=labelled, left_out=left_out)


def _spells(row: GuardedRow, inputs: Collection[int]) -> bool:
    """Return whether the messages of a row without tensors spell the marker that became an id of an input."""
    text = json.dumps(row.record.get("messages"))
    return not row.has_tensors and row.holds(inputs) and any(literal in text for literal in block_literals())


def _with_own_texts(row: GuardedRow) -> GuardedRow:
    """Return a row whose batch has tensors without messages that do not have them: a collator may have put them in."""
    messages = row.record.get("messages")
    if not row.has_tensors or not messages or blocks_in(message.get("content") for message in messages):
        return row
    return replace(row, record={key: row.record[key] for key in row.record if key not in COLUMNS_OF_TEXTS})


def _cost(epoch: EpochRows, read: FirstRows, seconds: float) -> str:
    watched = f"; judged as the model got them: {read.watched}" if read.watched else ""
    figures = read.figures.with_more(epoch.figures)
    return f"guard: {counted(figures.rows, 'row')} of {figures.words}; judged in {seconds:.2f} s{watched}"


def note_lines(verdict: Verdict) -> list[str]:
    """Return a line for each note of a verdict."""
    notes = [finding for finding in verdict.findings if finding.severity == "note"]
    return [
        f"  note {finding.rule} {one_line(str(finding.place))}: {one_line(finding.words, 200)}" for finding in notes
    ]


def green_line(
    verdict: Verdict,
    read: FirstRows,
    judged: RowFigures,
    seconds: float,
    evaluation: FirstRows | None = None,
    *,
    why_not_all: str = "",
) -> str:
    """Return the line of a run that goes on: what was judged, of how many rows, how long it took, and what was not.

    Args:
        verdict: The verdict.
        read: The rows of this process, as `judged_rows` returns them.
        judged: What all processes have judged.
        seconds: The duration.
        evaluation: The rows of the evaluations of this process; None if it has none.
        why_not_all: Why this process has not judged the rows of the whole epoch.
    """
    rows = counted(judged.rows, "row")
    if read.of is not None:
        rows = f"{judged.rows:,} of {counted(read.of, 'row')}"
    parts = [f"{rows} judged ({counted(judged.batches, 'batch', 'es')}, {judged.words}) in {seconds:.2f} s"]
    parts.append(counted(len(verdict.findings), "note") if verdict.findings else "no finding")
    declared = {facts["objective"]: "" for facts in verdict.facts.values() if "objective" in facts}
    parts += [f"objective: {words}" for words in declared]
    if read.watched:
        parts.append(f"read as the model got them, because {read.watched}")
    beyond = 0 if read.of is None else read.of - judged.rows
    if beyond > 0:
        parts.append(f"{counted(beyond, 'row')} not judged" + (f": {why_not_all}" if why_not_all else ""))
    if evaluation is not None and evaluation.rows:
        parts.append(f"{evaluation.figures.rows:,} of {counted(evaluation.of or 0, 'row')} for evaluation judged")
    cases: dict[str, list[str]] = {}
    for name, reason in verdict.not_checked.items():
        case = name.rpartition("::")[2]
        if case not in _NEVER_CHECKED:
            cases.setdefault(reason, []).append(case)
    if cases:
        unchecked = (
            one_line(reason if reason.startswith(names[0]) else f"{', '.join(names)}: {reason}", 160)
            for reason, names in cases.items()
        )
        parts.append(f"not checked: {'; '.join(unchecked)}")
    return f"mistral guard: {'; '.join(parts)}"
