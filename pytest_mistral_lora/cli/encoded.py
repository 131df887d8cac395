"""Encoded rows in `mistral-lora check`: those of a file, and those that the code of another trainer makes."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.chat.reading.row_source import RowSource
from pytest_mistral_lora.cli.judging import Judging, VerbView, check_options
from pytest_mistral_lora.cli.verb import (
    INPUT,
    PathArgument,
    output_file,
    print_json,
    whole_number,
)
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer, tokenizer_path
from pytest_mistral_lora.errors import InputError, counted
from pytest_mistral_lora.escaping import UNMIXED, own_stream
from pytest_mistral_lora.formats.row_sources import FileRows, MadeRows
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners import TIME_LIMIT, TRAINERS, find_runner

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.conformance.encoded.audit import Audit, AuditReport
    from pytest_mistral_lora.conformance.encoded.line_judge import LineVerdict
    from pytest_mistral_lora.conformance.finding import Finding
    from pytest_mistral_lora.conformance.known import Xfail
    from pytest_mistral_lora.conformance.path_kinds import RecognisedPath
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.conformance.targets import EncodedTarget, Target

_OF_RUNNER = ("task", "config", "allow_code", "python", "own_data", "output", "time_limit")
_OF_PATHS = ("kind", "base", "train", "device_memory")
"""The options, as `argparse` names them, that apply to `--runner`, and those that apply to paths alone."""

_UNREAD = frozenset(("ML501", "ML507", "ML524", "ML532", "ML560"))
"""Rules of lines that cannot be read, read back or encoded: nothing else is known of them."""


def _is_earlier(file: Path) -> bool:
    from pytest_mistral_lora.records.files import beginning

    # only the encoded rows of a runner begin with their number
    return beginning(file).startswith('{"row": ')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that apply to encoded rows alone."""
    parser.add_argument(
        "--dataset",
        type=INPUT,
        action="append",
        default=[],
        metavar="PATH",
        help="chat JSONL file that encoded rows come from, in order (repeatable): missing and changed rows are "
        "reported, and rows that have ids alone are judged by it",
    )
    parser.add_argument(
        "--show",
        type=partial(whole_number, least=0),
        default=5,
        metavar="N",
        help="causes of each class of encoded rows to print, each by its simplest row (default: 5)",
    )
    group = parser.add_argument_group(
        "other trainers", "Encode the rows of --dataset, or else the packaged rows, with the code of another trainer."
    )
    group.add_argument(
        "--runner",
        type=PathArgument("read", str),
        metavar="NAME",
        help=f"{', '.join(TRAINERS)}, or the path of a script (*.py) that encodes rows",
    )
    group.add_argument(
        "--task",
        metavar="NAME",
        help="command of the trainer for the preference pairs or rated answers of --dataset, in the trainer's own "
        f"word: {'; '.join(_tasks_words())} (default: what --config names, else the first); "
        "without --dataset, for the packaged pairs",
    )
    group.add_argument(
        "--config", type=INPUT, metavar="FILE", help="configuration of the trainer (default: its own defaults)"
    )
    group.add_argument(
        "--allow-code",
        action="store_true",
        help="use --config unchanged, with the code, networks and uploads that it names (default: such keys are left "
        "out and listed, or refused)",
    )
    group.add_argument(
        "--python", type=INPUT, metavar="PATH", help="Python in which the trainer is installed (default: found for you)"
    )
    group.add_argument(
        "--own-data",
        action="store_true",
        help="keep the data that --config names, for example those of an exported run; --dataset then names the chat "
        "rows that these data come from, in order",
    )
    group.add_argument(
        "--output",
        type=PathArgument("written", output_file(_is_earlier)),
        metavar="FILE",
        help="keep the encoded rows in this file",
    )
    group.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help=f"longest time that the trainer may take (default: {TIME_LIMIT:g})",
    )


def _tasks_words() -> Iterator[str]:
    """Yield the commands of each trainer that take preferences, for the help."""
    for trainer in TRAINERS.of_this_package():
        kinds = {"pairs": trainer.tasks.pairs, "rated answers": trainer.tasks.rated}
        words = [f"{', '.join(tasks)} for {title}" for title, tasks in kinds.items() if tasks]
        if words:
            yield f"{trainer.name} {', '.join(words)}"


def _seconds(text: str) -> float:
    if not text.replace(".", "", 1).isdecimal() or float(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of seconds, more than 0")
    return float(text)


def is_alone(targets: Sequence[Target]) -> bool:
    """Return whether encoded rows are all that is judged, so that the output is about rows and not about checks."""
    from pytest_mistral_lora.conformance.targets import EncodedTarget

    return len(targets) == 1 and isinstance(targets[0], EncodedTarget)


def run(args: argparse.Namespace, path: RecognisedPath | None) -> int:
    """Print every finding; return 1 if one is an error.

    Args:
        args: The options of `check`.
        path: The encoded rows; None for those of `--runner`.

    Raises:
        InputError: If the rows cannot be opened, no tokenizer is named, or an option does not apply to `--runner`.
    """
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.collection import require_objectives
    from pytest_mistral_lora.conformance.encoded.audit import Audit, AuditedTarget, AuditReport
    from pytest_mistral_lora.conformance.encoded.pad_cause import pad_cause_of
    from pytest_mistral_lora.conformance.encoded.template_cause import cause_of
    from pytest_mistral_lora.conformance.groups import MOST_NAMES
    from pytest_mistral_lora.conformance.targets import Target, name_of

    if args.tokenizer is None:
        expected = "the tokenizer of the model that is trained, such as the folder of the base"
        raise InputError("no tokenizer is named", place="--tokenizer", expected=expected)
    args.objective = None if args.objective is None else Declaration(args.objective, "--objective")
    args.tokenizer, args.oracle, _ = named_tokenizer(tokenizer_path(str(args.tokenizer)), args.oracle)
    options = check_options(args)
    tokenizer = CheckpointTokenizer(args.tokenizer, args.oracle)
    with _encoded_rows(args, path) as given:
        file = given.file
        judge = Target.of_loaded(tokenizer)
        rows: RowSource = FileRows(file)
        if args.runner is not None:
            source = ", ".join(map(str, args.dataset)) or "the packaged rows"
            if find_runner(args.runner).is_evaluation:
                source = str(args.config)
            rows = MadeRows(FileRows(file), [row.place for row in given.rows], Place.of(source))
        audit = Audit(
            rows,
            tokenizer.oracle,
            given.dataset,
            base=tokenizer.files,
            judges_texts=args.runner is None or bool(args.dataset),  # the packaged rows are chosen, not written
            trained=given.trained,
            cause=cause_of(judge),
            # a trainer has labels by its own rules, and a configuration for each
            pad=None if args.runner else pad_cause_of(judge),
            tokenizer=tokenizer,
            declared=given.declared,
        )
        report = AuditReport(audit, MOST_NAMES)
        fixes = find_runner(args.runner).known_fixes(given.task) if args.runner is not None else None
        name = name_of(file)
        given_as: dict[str, Any] = {"dataset": given.dataset, "source": rows, "objective": given.declared}
        target = AuditedTarget(name, file, judge=judge, fixes=fixes, **given_as)
        require_objectives([target])
        show = partial(_print_findings, target, options.xfails) if args.output_format == "jsonl" else _show_nothing
        target = replace(target, audited=partial(_read_with_progress, file, report, show))
        is_of_checks = args.output_format == "json" or (args.output_format == "text" and args.verbose)
        view = VerbView(
            partial(_lines, audit, args.show),
            _last_line,
            partial(_print_summary, audit),
            texts=partial(_cause_texts, audit, args.show),
            verdict=lambda session: f"{_rows_line(audit)}; {_last_line(session)}",
        )
        judging = Judging.of(
            args,
            # the rows of a trainer are in a folder that is removed
            paths=[{"path": str(file)} for file in args.dataset] if path is None else [path.to_json()],
            options=options,
            # -v asks for the checks, as of other targets; jsonl is of rows alone
            brief=not args.verbose,
            view=None if is_of_checks else view,
            has_bar=True,
        )
        return judging.judge([target])


def _last_line(session: Session) -> str:
    from pytest_mistral_lora.report import found_words

    causes = list(session.causes())
    return found_words(sum(cause.total for cause in causes), len(causes))


def _cause_texts(audit: Audit, show: int, session: Session) -> Iterator[str]:
    """Yield the texts of the first causes of each class; a sign has its line at the end."""
    from pytest_mistral_lora.conformance.finding import RULES

    kinds = Counter[str]()
    for cause in session.causes():
        rule = cause.simplest.rule
        kinds[rule] += 1
        if kinds[rule] <= show and not cause.simplest.is_sign:
            heading = f"{_state_of(cause.simplest, audit)}: {RULES[rule].fault_class}"
            yield f"{heading}\n{cause.text(shutil.get_terminal_size().columns)}\n"


def _state_of(finding: Finding, audit: Audit) -> str:
    """Return what a finding means for its row; a note is not a fault."""
    if finding.severity == "note":
        return "note"
    if finding.rule in _UNREAD:
        return "not judged"
    return "the file: wrong" if finding.place == audit.rows.place else "wrong"


def _lines(audit: Audit, show: int, session: Session) -> Iterator[str]:
    """Yield a table of the classes, the figures of the rows, and everything that was not checked."""
    from pytest_mistral_lora.conformance.finding import RULES
    from pytest_mistral_lora.conformance.groups import signs_among
    from pytest_mistral_lora.report import look_at_lines

    causes = session.causes()
    counts, kinds = Counter[str](), Counter[str]()
    for cause in causes:
        counts[cause.simplest.rule] += cause.count
        kinds[cause.simplest.rule] += 1
    if counts:
        yield f"{'rule':<6}  {'class':<26}  {'found':>9}  causes"
    for rule, count in sorted(counts.items()):
        rest = f"  {show} shown" if show < kinds[rule] else ""
        yield f"{rule:<6}  {RULES[rule].fault_class:<26}  {count:>9}  {kinds[rule]:>6}{rest}"
    data = audit.summary()
    yield _rows_line(audit)
    yield f"{data['supervised_tokens']:,} of {data['tokens']:,} tokens are trained on"
    if masked := data["labels_of_masks"]:
        yield f"labels made of a mask: {counted(masked, 'row')}"
    if (columns := data["columns"]).keys() - {"labels"}:
        yield _columns_line(columns)
    if read := data["read_back"]:
        yield f"read back from ids: {counted(read, 'row')} without messages"
    if weightless := data["answers_without_labels"]:
        yield _weights_line(weightless)
    if words := audit.totals.sides.words:
        yield f"preferences: {words}"
    for outcome in session.outcomes:
        if outcome.not_checked:
            yield f"not checked: {outcome.case}: {outcome.not_checked}"
    yield from look_at_lines(signs_among(causes))


def _columns_line(columns: Mapping[str, int]) -> str:
    shown = (f"{column} in {counted(count, 'row')}" for column, count in columns.items())
    return f"what is trained on: {', '.join(shown)}"


def _weights_line(weightless: int) -> str:
    return f"answers without a label in them, read as answers of weight 0: {weightless:,}"


def _rows_line(audit: Audit) -> str:
    data = audit.summary()
    states = f"{data['sound']:,} sound, {data['wrong']:,} wrong, {data['not_judged']:,} not judged"
    return f"{counted(data['rows'], 'row')}: {states}"


def _show_nothing(verdict: LineVerdict) -> None:
    """Leave the findings to the session, which keeps the first of each rule."""


def _print_findings(target: EncodedTarget, xfails: Sequence[Xfail], verdict: LineVerdict) -> None:
    """Print the findings of a row as JSON, a line each, but for known deviations: a file may have millions."""
    from pytest_mistral_lora.conformance.checks import ROOT
    from pytest_mistral_lora.conformance.encoded.audit import case_of
    from pytest_mistral_lora.conformance.finding import RULES
    from pytest_mistral_lora.conformance.known import unknown_among
    from pytest_mistral_lora.records.secrets import redacted
    from pytest_mistral_lora.report.secrets import public_finding

    for found in target.in_words(verdict.findings):
        named = found.with_paths(target.fix_paths)
        for finding in unknown_among([named], f"{ROOT}::{target.name}::encoded::{case_of(found.rule)}", xfails):
            extra = {"class": RULES[finding.rule].fault_class, "index": verdict.index, "state": verdict.state}
            data = redacted({**public_finding(finding.to_json()), **extra})
            # a line of JSON must be readable in a terminal, too, and the summary has the fixes once for each rule
            del data["tokens"], data["fixes"]
            print_json(data, indented=False)


def _print_summary(audit: Audit, session: Session) -> None:
    known = {xfail.id: xfail.reason for outcome in session.outcomes for xfail in outcome.known}
    entries = [{"id": name, "reason": reason} for name, reason in known.items()]
    fixes = {cause.simplest.rule: cause.to_json()["fixes"] for cause in session.causes() if cause.fixes}
    print_json({"summary": {**audit.summary(), "known": entries, "fixes": fixes}}, indented=False)


def _read_with_progress(path: Path, report: AuditReport, show: Callable[[LineVerdict], None]) -> AuditReport:
    """Run an audit, with a progress bar if stderr is a terminal, and return its report.

    Args:
        path: The file or folder of the rows.
        report: The report.
        show: Called with the verdict on each row, and on the file.
    """
    if not sys.stderr.isatty():
        for verdict in report.verdicts():
            show(verdict)
        return report
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from pytest_mistral_lora.formats.files import every_file

    total = 0
    with suppress(InputError, OSError):  # the audit reports it
        total = sum(file.stat().st_size for file in every_file(path))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=own_stream(sys.stderr)), transient=True, **UNMIXED) as progress:
        task = progress.add_task("rows", total=total)
        for verdict in report.verdicts(lambda read: progress.advance(task, read)):
            show(verdict)
    return report


@dataclass(frozen=True)
class _RowsToAudit:
    """Encoded rows to check.

    Attributes:
        file: Their file.
        rows: The rows that a runner made them of, in order; empty for a file of the user.
        dataset: The files of the rows that they come from, in order.
        trained: The rows that the model of an evaluation was trained on.
        task: The runner's command for preferences; empty for chat rows.
        declared: The declared objective: the user's, or that of the runner's configuration; None if none is declared.
    """

    file: Path
    rows: Sequence[Row] = ()
    dataset: tuple[Path, ...] = ()
    trained: Sequence[Row] = ()
    task: str = ""
    declared: Declaration | None = None


def refuse_options(args: argparse.Namespace) -> None:
    """Refuse options that apply to `--runner` without it, and options of paths beside it.

    Raises:
        InputError: With the first such option.
    """
    if args.runner is not None and args.paths:
        raise InputError("both PATH and --runner are given", expected="one of them")
    for name in _OF_RUNNER if args.runner is None else _OF_PATHS:
        if getattr(args, name) not in (None, False, ""):
            option = "--as" if name == "kind" else f"--{name.replace('_', '-')}"
            kind, given = ("the rows of --runner", "no --runner") if args.runner is None else ("paths", "--runner")
            raise InputError(f"{option} is for {kind}, and {given} is given", next_step=f"Leave {option} out.")


@contextmanager
def _encoded_rows(args: argparse.Namespace, path: RecognisedPath | None) -> Iterator[_RowsToAudit]:
    """Yield the encoded rows to check: those of a file, or those that a runner makes.

    Raises:
        InputError: If a row of the dataset cannot be read, or the user and the configuration of the runner declare
            different objectives.
        RunnerError: If the runner cannot encode the rows.
    """
    if path is not None:
        yield _RowsToAudit(path.path, dataset=tuple(args.dataset), declared=args.objective)
        return
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.runners.extract import extract, extract_prompts
    from pytest_mistral_lora.runners.given_rows import GivenRows
    from pytest_mistral_lora.runners.prompts import prompt_rows

    runner = find_runner(args.runner)
    given = GivenRows.read(runner, args.dataset, task=args.task, config=args.config)
    if args.objective is not None and runner.is_evaluation:
        raise InputError("--objective is for the rows of a trainer", place=runner.name, expected="no --objective")
    # a key of chat rows says nothing of preferences
    of_config = None if given.task else runner.declared_by(args.config, own_data=args.own_data)
    declared = Declaration.agreed(args.objective, of_config)
    if args.own_data and runner.is_evaluation:
        raise InputError("--own-data is for the rows of a trainer", place=runner.name, expected="no --own-data")
    if args.own_data and not given.rows:
        raise InputError("--own-data without --dataset", expected="the chat rows that the trainer's own data come from")
    # the audit reads the file line by line, so the folder must outlive the audit
    with tempfile.TemporaryDirectory(prefix="mistral-audit-") as folder:
        output = args.output or Path(folder, f"{Path(args.runner).stem}.jsonl")
        options = {"config": args.config, "python": args.python, "oracle": args.oracle, "allow_code": args.allow_code}
        options["time_limit"] = args.time_limit or TIME_LIMIT
        if runner.is_evaluation:
            extraction = extract_prompts(runner, args.tokenizer, output, **options)
            to_audit = _RowsToAudit(output, prompt_rows(output), trained=given.rows)
        else:
            if not given.rows:
                oracle = CheckpointTokenizer(args.tokenizer, args.oracle).oracle
                given = GivenRows.packaged(runner, oracle, given.task)
            extraction = extract(
                runner, given.rows, args.tokenizer, output, own_data=args.own_data, task=given.task, **options
            )
            to_audit = _RowsToAudit(output, given.by_line, tuple(args.dataset), task=given.task, declared=declared)
        # versions are a part of the verdict, but standard output may be JSON
        sys.stderr.write(f"{extraction.ran_under}\n")
        yield to_audit
