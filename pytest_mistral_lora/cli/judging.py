"""The judging of targets for `check` and `serve-check`, and the output of every verb that judges."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.verb import (
    INPUT,
    PROGRAM,
    PathArgument,
    output_file,
    print_json,
    shown_path,
)
from pytest_mistral_lora.errors import EXIT_FINDING, InputError, counted
from pytest_mistral_lora.escaping import UNMIXED, own_stream, printable, safe_text

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.check_options import CheckOptions
    from pytest_mistral_lora.conformance.session import Session
    from pytest_mistral_lora.conformance.targets import Target
    from pytest_mistral_lora.report.judged import Judged


def add_report_option(parser: argparse.ArgumentParser) -> None:
    """Add `--report`."""
    parser.add_argument(
        "--report",
        type=PathArgument("written", _report_file, beside=_rows_page),
        action="append",
        default=[],
        metavar="FILE",
        help="write every check and finding to this file (*.json, *.html or *.md), and beside it the tokens of failed "
        "rows (repeatable)",
    )


def add_xfails_option(parser: argparse.ArgumentParser) -> None:
    """Add `--xfails`, which `check_options` reads."""
    parser.add_argument(
        "--xfails",
        type=INPUT,
        metavar="FILE",
        help="known deviations, which do not fail: a rule id, a node id or a cause's name a line, each with '# reason'",
    )


def add_rules_option(parser: argparse.ArgumentParser) -> None:
    """Add `--rules`."""
    parser.add_argument(
        "--rules",
        metavar="VERSION",
        help="judge by the rules of this version of the package, such as 0.1: what later rules or bounds find is a "
        "note that names their version, and fails no run",
    )


def _report_file(text: str) -> Path:
    from pytest_mistral_lora.report import require_report_file

    try:
        return require_report_file(Path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rows_page(report: Path) -> Path:
    from pytest_mistral_lora.report import rows_page

    return rows_page(report)


def add_write_xfails_option(parser: argparse.ArgumentParser) -> None:
    """Add `--write-xfails`, whose file must be new."""
    parser.add_argument(
        "--write-xfails",
        type=PathArgument("written", output_file()),
        metavar="FILE",
        help="write what is found to this new file, with empty reasons to fill in, as --xfails reads it",
    )


def add_judging_options(parser: argparse.ArgumentParser) -> None:
    """Add `--xfails`, `--rules`, `--write-xfails`, `--report` and `--output-format`."""
    add_xfails_option(parser)
    add_rules_option(parser)
    add_write_xfails_option(parser)
    add_report_option(parser)
    add_format_option(parser)


def add_format_option(parser: argparse.ArgumentParser, jsonl: str = "") -> None:
    """Add `--output-format` to a verb that judges, and `--json` as its short form.

    Args:
        parser: The parser of the verb.
        jsonl: What `jsonl` prints; empty if the verb does not have it.
    """
    parser.add_argument(
        "--output-format",
        choices=("text", "concise", "json", *(("jsonl",) if jsonl else ()), "github"),
        default="text",
        help="concise prints each finding as one line, 'FILE:LINE: RULE fault: found'; github prints annotations and "
        "adds to the job's summary" + (f"; jsonl prints {jsonl}" if jsonl else "") + " (default: text)",
    )
    parser.add_argument(
        "--json",
        action="store_const",
        const="json",
        dest="output_format",
        help="print JSON instead of text, as --output-format json",
    )


def check_options(args: argparse.Namespace, **decided: Any) -> CheckOptions:
    """Return what a command line decides about the checks.

    Args:
        args: The command line, with some of the options of this module.
        decided: What the verb decides, or other options of it.

    Raises:
        InputError: If the known deviations cannot be read, the version of the rules is unknown, or the file for the
            list of all findings exists.
    """
    from pytest_mistral_lora.conformance.check_options import CheckOptions, parse_fail_on, require_new
    from pytest_mistral_lora.conformance.known import known_deviations
    from pytest_mistral_lora.conformance.rule_set import RuleSet

    rules, written = getattr(args, "rules", None), getattr(args, "write_xfails", None)
    given: dict[str, Any] = {
        "fail_on": parse_fail_on(getattr(args, "fail_on", None), "--fail-on"),
        "xfails": known_deviations(args.xfails, "--xfails"),
        "rules": None if rules is None else RuleSet.of(rules, "--rules"),
        "write_xfails": None if written is None else require_new(written, "--write-xfails"),
    }
    return CheckOptions(**given | decided)


@dataclass(frozen=True)
class VerbView:
    """What a verb prints of its session, if it is not what `check` prints.

    Attributes:
        lines: Returns the lines for people above the last one.
        last: Returns the last line for people.
        print_data: Prints the JSON.
        texts: Returns texts of findings, which are printed first, in colours.
        verdict: Returns the verdict for other programs; None for the last line for people.
    """

    lines: Callable[[Session], Iterable[str]]
    last: Callable[[Session], str]
    print_data: Callable[[Session], None]
    texts: Callable[[Session], Iterable[str]] = lambda session: ()
    verdict: Callable[[Session], str] | None = None

    def verdict_of(self, session: Session) -> str:
        """Return the verdict for other programs."""
        return (self.verdict or self.last)(session)


@dataclass(frozen=True)
class Judging:
    """How targets are judged.

    Attributes:
        command: The command line that was typed; its second word is the verb.
        output_format: A choice of `--output-format`.
        options: What the user decides.
        paths: The given paths and their kinds.
        memory: The estimates of memory, one for each recipe.
        reports: The files of reports.
        brief: Whether a run without an error prints a few lines.
        whole_by: The option that shows each cause whole; empty to do so.
        view: What is printed in place of the output of `check`; None for that.
        mend: Called with the session at the end, to mend what a verb may mend; None for nothing.
        has_bar: Whether the checks draw a bar, so that no other one is needed.
    """

    command: str
    output_format: str
    options: CheckOptions
    paths: Sequence[Any] = ()
    memory: Sequence[Mapping[str, Any]] = ()
    reports: Sequence[Path] = ()
    brief: bool = False
    whole_by: str = "--report FILE.html"
    view: VerbView | None = None
    mend: Callable[[Session], None] | None = None
    has_bar: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, options: CheckOptions, **given: Any) -> Judging:
        """Return how the targets of a command line are judged.

        Args:
            args: The command line, with `--report` and `--output-format`.
            options: What the user decides, as `check_options` reads it.
            given: The attributes that the verb decides.
        """
        return cls(shlex.join([PROGRAM, *args.words]), args.output_format, options, reports=args.report, **given)

    def judge(self, targets: Sequence[Target], kept: Path | None = None) -> int:
        """Judge targets, print and write the outcome, and return the exit code.

        Args:
            targets: The targets.
            kept: As for `opened_session`.
        """
        # Set before the first import that reads it: otherwise each small model draws a bar when it loads
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from pytest_mistral_lora.conformance.session import opened_session

        with opened_session(targets, self.options, kept=kept) as session:
            with _progress(shown=not self.has_bar) as show:
                for number, outcome in enumerate(session.run(self._commands), start=1):
                    show(f"{number} checks; {outcome.nodeid}")
            session.write_xfails()
            sys.stderr.write("".join(f"{xfail.unmatched}\n" for xfail in session.unmatched))
            fits = all(recipe.get("fits", True) for recipe in self.memory)
            code = session.exit_code if fits else EXIT_FINDING
            prints_report = self.output_format == "json" and self.view is None
            # this asks Git for the commit, which an output for people does not show
            if self.reports or prints_report:
                data = session.report(self.command, Path.cwd(), code)
                session.write_reports(self.reports, data)
            if prints_report:
                print_json({**data, "paths": list(self.paths), "memory": list(self.memory)})
            else:
                self._print(session)
            if self.mend is not None:
                self.mend(session)
        return code

    def _commands(self, target: str) -> Mapping[str, str]:
        return {"rerun": self.narrowest_command(target)}

    def narrowest_command(self, target: str) -> str:
        """Return the command that judges one target again, and writes no file.

        Args:
            target: The name of the target, which is the last part of its path if no other has that.
        """
        words = shlex.split(self.command)
        for option in ("--report", "--write-xfails", "--output", "--output-format"):
            while option in words:
                at = words.index(option)
                del words[at : at + 2]
            words = [word for word in words if not word.startswith(f"{option}=")]
        words = [word for word in words if word != "--json"]
        paths = [str(path["path"]) for path in self.paths]
        of_target = [path for path in paths if Path(path).name == target]
        if len(of_target) == 1:
            words = [word for word in words if word not in paths or word == of_target[0]]
        return shlex.join(words)

    def _judged(self, session: Session) -> Judged:
        from pytest_mistral_lora.conformance.groups import FILE_WIDTH
        from pytest_mistral_lora.report.judged import Judged, cases_of

        causes = [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in session.causes()]
        verdict = session.verdict() if self.view is None else self.view.verdict_of(session)
        verb = shlex.split(self.command)[1]
        return Judged(f"{PROGRAM} {verb}", causes, [*cases_of(session.outcomes)], verdict, session.known_faults())

    def _print(self, session: Session) -> None:
        from pytest_mistral_lora.conformance.next_command import next_lines
        from pytest_mistral_lora.report import write_styled

        if self.view is not None and self.output_format in ("json", "jsonl"):
            self.view.print_data(session)
            return
        if self.output_format == "github":
            _print_for_github(self._judged(session))
            return
        if self.output_format == "concise":
            found = (finding for outcome in session.outcomes for finding in outcome.findings)
            # each check of a template names the template: such lines are equal
            shown = dict.fromkeys(safe_text(finding.line()) for finding in session.causes().standing(found))
            verdict = session.verdict() if self.view is None else self.view.verdict_of(session)
            own_stream(sys.stdout).write("".join(f"{line}\n" for line in (*shown, verdict)))
            return
        own_stream(sys.stdout).write("".join(f"{line}\n" for line in session.opening_lines))
        if self.view is not None:
            for text in self.view.texts(session):
                write_styled(text)
            lines = [*self.view.lines(session), *_lines_of_any_verb(session), self.view.last(session)]
            own_stream(sys.stdout).write("".join(f"{line}\n" for line in (*lines, *next_lines(session, self.command))))
            return
        width = shutil.get_terminal_size().columns
        for text in session.cause_texts(width, self.whole_by):
            write_styled(text)
        memory = [f"{shown_path(recipe['path'])}: {recipe['text']}" for recipe in self.memory]
        sys.stdout.write(
            "\n".join([*session.summary_lines(width, memory, brief=self.brief), *next_lines(session, self.command)])
            + "\n"
        )


def _lines_of_any_verb(session: Session) -> Iterator[str]:
    """Yield the lines on known deviations and known faults, and one if nothing was judged."""
    from pytest_mistral_lora.report import NOTHING_WAS_JUDGED

    known = Counter((xfail.id, xfail.reason) for outcome in session.outcomes for xfail in outcome.known)
    lines = [f"known {name}: {reason} ({counted(count, 'check')})" for (name, reason), count in known.items()]
    lines += [*session.remarks_on_known, *session.remarks_on_rules]
    yield from (printable(line, lines=False) for line in (*lines, *session.known_faults()))
    if session.nothing_judged:
        yield NOTHING_WAS_JUDGED


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the progress of the checks, if it is wanted and stderr is a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(file=own_stream(sys.stderr)), transient=True, **UNMIXED) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=printable(text, lines=False))


def _print_for_github(judged: Judged) -> None:
    from pytest_mistral_lora.report.github import add_job_summary, annotation_lines

    own_stream(sys.stdout).write("".join(f"{line}\n" for line in annotation_lines(judged.causes)))
    sys.stdout.write("".join(f"{line}\n" for line in (*judged.known, judged.verdict)))
    add_job_summary(judged)
