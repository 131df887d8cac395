"""`mistral-lora report-false-alarm`: one file about a finding that you think is wrong, to send to us."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.verb import (
    INPUT,
    PROGRAM,
    PathArgument,
    Verb,
    add_oracle_option,
    add_tokenizer_option,
    output_file,
    shown_path,
)
from pytest_mistral_lora.errors import EXIT_OK, MistralLoraError, one_line

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.conformance.finding import Finding

_KINDS = {"dataset": "rows", "encoded": "encoded"}
"""The kind of the file of a row, by the subject of the check that found it."""

_DESCRIPTION = """\
Write a file about a finding that you think is wrong, to attach to an issue: the finding, its row, the rule with its
bounds, the versions, the command, and the tokenizer with its hash. The row alone is judged again, and the file says
whether it still has the finding. Nothing is sent, and no variable of the environment is written.

Name the finding as it is printed, by the id of its rule and, if there are several, by its place. The report is the file
of `mistral-lora check --report FILE.json`, `audit --report FILE.json` or `pytest --mistral-report FILE.json`.

With --scrub, each letter of the row becomes x and each digit 0. Lengths, spaces, punctuation, roles and control tokens
stay, so that most findings do, too; names of tools and arguments become other names, and paths their last part. An
encoded row becomes the encoding of its scrubbed messages, with the same differences from mistral-common.
Look through the file before you send it."""


def _is_earlier(file: Path) -> bool:
    from pytest_mistral_lora.report.false_alarm import is_false_alarm

    return is_false_alarm(file)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "finding", nargs="+", metavar="FINDING", help="the finding as it is printed, such as: ML612 train.jsonl:2"
    )
    parser.add_argument(
        "--from", dest="report", type=INPUT, required=True, metavar="FILE", help="report (*.json) that has the finding"
    )
    parser.add_argument(
        "--output",
        type=PathArgument("written", output_file(_is_earlier)),
        metavar="FILE",
        help="file to write (default: false-alarm-RULE.json); one of an earlier run is replaced",
    )
    parser.add_argument("--scrub", action="store_true", help="replace the texts of the row, and the folders of paths")
    add_tokenizer_option(parser, required=False)
    add_oracle_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        InputError: If the report cannot be read, or does not have the finding.
    """
    from pytest_mistral_lora.escaping import safe_json
    from pytest_mistral_lora.records.files import put_text, require_writable
    from pytest_mistral_lora.records.secrets import redacted
    from pytest_mistral_lora.report.compare_reports import read_report
    from pytest_mistral_lora.report.false_alarm import ISSUE_FORM, found_in, is_false_alarm

    report = read_report(args.report)
    finding = found_in(report, args.finding, str(args.report))
    output = args.output or require_writable(Path(f"false-alarm-{finding['rule']}.json"), is_false_alarm)
    alarm = FalseAlarm(report, finding, args.tokenizer, args.oracle, scrub=args.scrub)
    put_text(output, f"{safe_json(redacted(alarm.data()), indent=2)}\n")
    lines = [f"{shown_path(output)}: written, and not sent", *alarm.remarks()]
    lines.append(f'look through it, then attach it to an issue of the form "{ISSUE_FORM}"')
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return EXIT_OK


@dataclass(frozen=True)
class JudgedAgain:
    """A row, and whether it alone has the finding.

    Attributes:
        row: The row; None without one.
        left_out: Why there is no row; empty if there is one.
        finds: Whether the row alone has a finding of the rule; None if it was not judged.
        reason: Why it was not judged; empty if it was.
        finding: The finding of the row alone.
    """

    row: Any = None
    left_out: str = ""
    finds: bool | None = None
    reason: str = ""
    finding: Finding | None = None


class FalseAlarm:
    """A finding of a report, and what is known about it here.

    Attributes:
        report: The report.
        finding: The finding, as plain data.
        scrub: Whether texts and folders are left out.
    """

    def __init__(
        self,
        report: Mapping[str, Any],
        finding: Mapping[str, Any],
        tokenizer: Path | None,
        oracle: str | None,
        *,
        scrub: bool,
    ) -> None:
        self.report, self.finding, self.scrub = report, finding, scrub
        self._tokenizer, self._declared = tokenizer, oracle

    def data(self) -> dict[str, Any]:
        """Return the content of the file."""
        from pytest_mistral_lora.report.false_alarm import false_alarm_data

        again = self.judged_again
        judged = {"finds": again.finds, "reason": again.reason}
        if again.finds is not None:
            judged["command"] = self._command()
        return false_alarm_data(
            self.report,
            self._public_finding(),
            rule=self._rule(),
            tokenizer=self._identity(),
            row={"row": again.row, "left_out": again.left_out},
            judged_again=judged,
            scrubbed=self.scrub,
        )

    def remarks(self) -> list[str]:
        """Return lines for people: whether the row alone has the finding, or why that is not known."""
        again, rule = self.judged_again, self.finding["rule"]
        row = "the scrubbed row" if self.scrub else "the row"
        if again.left_out:
            return [f"no row: {again.left_out}"]
        if again.finds is None:
            return [f"{row} was not judged again: {again.reason}"]
        if again.finds:
            return [f"{row} alone still has {rule}"]
        hint = ": without --scrub, the row is written as it is" if self.scrub else ": it may need the rows beside it"
        return [f"{row} alone does not have {rule}{hint}"]

    @cached_property
    def judged_again(self) -> JudgedAgain:
        """The row, judged again."""
        row, left_out = self._row()
        if left_out:
            return JudgedAgain(left_out=left_out, reason=left_out)
        if self.tokenizer is None:
            reason = "its tokenizer is not known; name it: --tokenizer"
            if self._kind == "encoded":
                return JudgedAgain(left_out=f"its ids may spell a secret, and {reason}", reason=reason)
            return JudgedAgain(next(self._candidates(row)), reason=reason)
        if self._kind == "encoded" and self._oracle is None:
            reason = "its ids may spell a secret, and no Mistral tokenizer can be loaded to read them"
            return JudgedAgain(left_out=reason, reason=reason)
        if not self.scrub and self._spells_secret(row):
            reason = "its ids spell a secret; add --scrub"
            return JudgedAgain(left_out=reason, reason=reason)
        judged: list[JudgedAgain] = []
        for candidate in self._candidates(row):
            judged.append(self._judged(candidate, self.tokenizer))
            if judged[-1].finds:
                return judged[-1]
        return judged[0]  # it has the most of the row

    def _spells_secret(self, row: Mapping[str, Any]) -> bool:
        """Return whether integers of an encoded row spell a secret, which is not replaced in them."""
        from pytest_mistral_lora.records.secrets import holds_secret

        if self._kind != "encoded" or self._oracle is None:
            return False
        numbers = (
            [token for token in value if type(token) is int] for value in row.values() if isinstance(value, list)
        )
        return any(holds_secret(self._oracle.decode([token for token in ids if token >= 0])) for ids in numbers)

    def _candidates(self, row: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the row as it is written, and without more of it for a finding that the first may have lost."""
        from pytest_mistral_lora.report.scrubbed import Scrubber
        from pytest_mistral_lora.report.scrubbed_ids import IdScrubber

        if not self.scrub:
            yield dict(row)
        elif self._kind != "encoded":
            yield Scrubber(self._oracle).row(row)
        elif self._oracle is not None:
            yield from IdScrubber(self._oracle).encoded(row)

    @property
    def _kind(self) -> str:
        """The kind of a file with the row alone; empty if the finding is about something else."""
        _, subject, _ = f"::{self.finding['check']}".rsplit("::", 2)
        return _KINDS.get(subject, "")

    def _row(self) -> tuple[Any, str]:
        """Return the row of the finding, or why there is none."""
        from pytest_mistral_lora.formats.row_sources import FileRows
        from pytest_mistral_lora.places import Place, file_of

        place = Place.from_json(self.finding["structured"]["place"])
        if not self._kind or place.record is None:
            return None, "the finding is not about a row"
        file = Path(file_of(place)) if file_of(place) else None
        if file is not None and file.exists():
            with suppress(MistralLoraError, OSError):
                for record in FileRows(file).records():
                    if record.place.record == place.record:
                        if not isinstance(record.value, Mapping):
                            return None, "it cannot be read as JSON"
                        return dict(record.value), ""
        # the report has the line, cut off if it is long
        with suppress(ValueError):
            kept = json.loads(self.finding.get("row") or "null")
            if isinstance(kept, dict):
                return kept, ""
        return None, f"{shown_path(file) if file and not self.scrub else 'its file'} is not here"

    def _judged(self, row: Any, tokenizer: Path) -> JudgedAgain:
        """Judge one row, in a file of its name, by its tokenizer."""
        from pytest_mistral_lora.escaping import safe_json
        from pytest_mistral_lora.judging import judge

        rule = self.finding["rule"]
        with tempfile.TemporaryDirectory(prefix="mistral-lora-") as folder:
            file = Path(folder, "row.jsonl")
            file.write_text(f"{safe_json(row)}\n", encoding="utf-8")
            try:
                verdict = judge(
                    file, tokenizer=tokenizer, kind=self._kind, oracle=self._declared, objective=self._objective
                )
            except MistralLoraError as error:
                reason = one_line(str(error).replace(folder, ""))
                return JudgedAgain(row, reason="it cannot be judged" if self.scrub else reason)
        found = next((finding for finding in verdict.findings if finding.rule == rule), None)
        if found is not None:
            place = replace(found.place, source=replace(found.place.source, name=file.name))
            found = replace(found, place=place)
        return JudgedAgain(row, finds=found is not None, finding=found)

    def _command(self) -> str:
        kind = self._kind
        words = [PROGRAM, "check", "row.jsonl", "--as", kind, "--tokenizer", self._tokenizer_name]
        options = {"--oracle": self._declared, "--objective": self._objective}
        return shlex.join([*words, *(word for name, value in options.items() if value for word in (name, value))])

    @property
    def _objective(self) -> str | None:
        """The objective that the run declared by an option."""
        from pytest_mistral_lora.report.false_alarm import option_of

        return option_of(self.report["command"], "--objective", "--mistral-objective") or None

    @cached_property
    def tokenizer(self) -> Path | None:
        """The tokenizer of the run: the one named here, that of its command, or its recipe; None if it is not here."""
        from pytest_mistral_lora.conformance.named_tokenizer import tokenizer_path
        from pytest_mistral_lora.report.false_alarm import option_of, words_of

        if self._tokenizer is not None:
            return self._tokenizer
        command = self.report["command"]
        named = option_of(command, "--tokenizer", "--mistral-tokenizer")
        if not named:
            target = self.finding["check"].partition("::")[0]
            paths = [word for word in words_of(command)[1:] if not word.startswith("-")]
            recipes = [word for word in paths if re.search(r"\.ya?ml$", word) and Path(word).is_file()]
            judged = [] if self._kind else [word for word in paths if target in (word, Path(word).name)]
            named = next(iter([*judged, *recipes]), "")
        with suppress(MistralLoraError, OSError):
            found = tokenizer_path(named) if named else None
            return found if found is not None and found.exists() else None
        return None

    @property
    def _tokenizer_name(self) -> str:
        from pytest_mistral_lora.cli.verb import name_of
        from pytest_mistral_lora.report.false_alarm import last_name

        if self.tokenizer is None:
            return ""
        name = name_of(self.tokenizer)
        return last_name(name) if self.scrub and name == str(self.tokenizer) else name

    @cached_property
    def _oracle(self) -> Oracle | None:
        from pytest_mistral_lora.judging import encoder_of

        if self.tokenizer is None:
            return None
        with suppress(MistralLoraError, OSError):
            return encoder_of(self.tokenizer, self._declared).oracle
        return None

    def _identity(self) -> dict[str, Any]:
        """Return name, version and hash of the Mistral tokenizer, or why they are not known."""
        if self.tokenizer is None:
            return {"not_known": "the command names none, or it is not here; name it: --tokenizer"}
        if (oracle := self._oracle) is None:
            return {"name": self._tokenizer_name, "not_known": "no Mistral tokenizer of it can be loaded"}
        identity = {"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256}
        return {"name": self._tokenizer_name, **identity}

    def _rule(self) -> dict[str, Any]:
        """Return the rule as this installation has it."""
        from pytest_mistral_lora.conformance.finding import RULES

        name = self.finding["rule"]
        if name not in RULES:
            return {"id": name, "not_known": "this version does not have it"}
        rule = RULES[name]
        known = {"id": rule.id, "title": rule.title, "subject": rule.subject, "severity": rule.severity}
        versions = {"since": rule.since, "error_since": rule.error_since}
        return {**known, **versions, "proof": list(rule.proof)}

    def _public_finding(self) -> dict[str, Any]:
        """Return the finding; without the texts that it quotes if they are scrubbed."""
        from pytest_mistral_lora.places import Place
        from pytest_mistral_lora.report.false_alarm import last_name

        if not self.scrub:
            return dict(self.finding)
        again = self.judged_again.finding
        quoted = {"found": "", "expected": "", "shape": "", "detail": ""}
        if again is not None:
            quoted = {"found": again.found, "expected": again.expected, "shape": again.shape, "detail": again.detail}
        # names of fields may be a user's: only the scrubbed row's are written
        place = Place.from_json(self.finding["structured"]["place"]).row if again is None else again.place
        target, _, check = self.finding["check"].partition("::")
        named = replace(place, source=replace(place.source, name=last_name(place.source.name)))
        return {**self.finding, **quoted, "place": str(named), "check": f"{last_name(target)}::{check}"}


VERB = Verb(
    "report-false-alarm",
    "write a file about a wrong finding, to send to us",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora report-false-alarm ML612 train.jsonl:2 --from report.json",
        "mistral-lora report-false-alarm ML546 --from report.json --scrub",
    ),
)
