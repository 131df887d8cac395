"""The suite from Python: judge artifacts and encoded rows in a script or a notebook, without pytest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.chat.reading import path_of, similar_path
from pytest_mistral_lora.conformance.check_options import CheckOptions, parse_fail_on, require_new
from pytest_mistral_lora.conformance.collection import require_objectives, targets_of
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.known import known_deviations
from pytest_mistral_lora.conformance.named_tokenizer import named_tokenizer, tokenizer_path
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.path_kinds import KINDS, RecognisedPath, recognised
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.conformance.session import Session, opened_session
from pytest_mistral_lora.conformance.targets import EMBEDDED, EncodedTarget, Target, is_shipped, name_of
from pytest_mistral_lora.errors import FindingsError, InputError, did_you_mean, in_brackets, one_line, shortened
from pytest_mistral_lora.formats.row_sources import rows_source
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import require_writable

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.chat.reading.row_source import RowSource
    from pytest_mistral_lora.chat.token_rows import TokenRow
    from pytest_mistral_lora.checkpoint.encoder import Encoder
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.conformance.dataset.training_pass import TrainingPass

AnyPath: TypeAlias = "str | Path"
AnyTokenizer: TypeAlias = "str | Path | Any"
"""A path or a name; or a tokenizer in memory, of transformers or of mistral-common."""

_REPR_WIDTH = 180
_WIDEST = 120
_XFAILS = "a file of known deviations, each on a line such as `ML608  # the reason`"
_DATASET = "a file of chat rows; rows in memory have their messages in `rows` itself, beside input_ids and labels"
_FRAME = '<iframe srcdoc="{page}" sandbox="allow-scripts" title="{title}" style="{style}"></iframe>'
_FRAME_STYLE = "box-sizing: border-box; width: 100%; height: 40em; border: 1px solid #8888"


@dataclass(frozen=True, repr=False)
class Verdict:
    """The result of the suite.

    In a notebook it is shown as the report's page, and `print(verdict)` prints what `mistral-lora check -v` prints.

    Attributes:
        ok: Whether no finding is an error, something was judged, and no known deviation is out of date.
        findings: The findings, notes included, without known deviations. Each has `rule`, `severity` (`error` or
            `note`), `place`, `found`, `expected` and `next_step`; if that is a setting of a trainer that is not known,
            `fixes` has the one of each known trainer. If many rows break a rule, one finding represents the others and
            has their number as `more`.
        not_checked: The reason of each check that could not judge anything, by the name of the check:
            `<target>::<subject>::<case>`.
        facts: What a check measured or was compared with, by the name of the check.

    Example:
        >>> from pytest_mistral_lora import audit
        >>> row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        >>> encoded = row | {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, -100]}
        >>> verdict = audit([encoded], tokenizer="spm-v3")
        >>> verdict.ok
        False
        >>> finding = verdict.findings[0]
        >>> finding.rule, finding.severity, str(finding.place)
        ('ML546', 'error', 'rows[0]')
    """

    ok: bool
    findings: tuple[Finding, ...]
    not_checked: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    _text: str = field(compare=False)
    _report: Mapping[str, Any] = field(compare=False)
    _rows: tuple[TokenRow, ...] = field(compare=False)
    _outcomes: Sequence[CheckOutcome] = field(compare=False)
    _notes: Sequence[str] = field(compare=False)

    def __str__(self) -> str:
        """Return each finding, a table of the checks, and everything that was not checked."""
        return self._text

    def __bool__(self) -> bool:
        """Return `ok`, so that `assert judge(path)` fails if the verdict does."""
        return self.ok

    def __repr__(self) -> str:
        """Return the first finding and the last line of the table, as one line of at most 200 characters."""
        first = f"{next(iter(self.findings)).text().splitlines()[0]}; " if self.findings else ""
        words = one_line(f"{'ok' if self.ok else 'not ok'}: {first}{self._report['verdict']}", _REPR_WIDTH)
        return f"<{type(self).__name__} {words}>"

    def _repr_html_(self) -> str:
        """Return the report for a notebook, in a separate frame: its styles and scripts stay inside."""
        from pytest_mistral_lora.report.pages import html_page

        title = escape(str(self._report["verdict"]))
        return _FRAME.format(page=escape(html_page(self._report)), title=title, style=_FRAME_STYLE)

    def raise_for_findings(self) -> None:
        """Do nothing if the verdict is ok.

        Raises:
            FindingsError: If it is not ok. Its `verdict` is this one, and its message is `str(verdict)`.

        Example:
            >>> from pytest_mistral_lora import audit
            >>> row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
            >>> encoded = row | {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, 2]}
            >>> audit([encoded], tokenizer="spm-v3").raise_for_findings()
        """
        if not self.ok:
            raise FindingsError(str(self), verdict=self)

    def write(self, path: AnyPath) -> Path:
        """Write the report, and beside it a page with the tokens of the failed rows.

        Args:
            path: A file whose name ends in `.html`, `.md` or `.json`. An existing file is replaced only if it is a
                report.

        Returns:
            The path.

        Raises:
            InputError: If the name has another ending, or the file cannot be written.
        """
        from pytest_mistral_lora.report import write_report

        file = path_of(path, "a report")
        write_report(file, self._report, self._rows)
        return file


def judge(
    *paths: AnyTokenizer,
    tokenizer: AnyTokenizer | None = None,
    template: str | None = None,
    kind: str = "",
    base: AnyPath | None = None,
    oracle: AnyPath | None = None,
    objective: str | None = None,
    train: bool | None = None,
    examples: int = 20,
    xfails: AnyPath | None = None,
    rules: str | None = None,
    fail_on: str | None = None,
    write_xfails: AnyPath | None = None,
    rows: Any = None,
) -> Verdict:
    """Judge artifacts, as `mistral-lora check` does, in this process.

    Args:
        paths: Recipes, files of rows, encoded rows, adapter and merged folders, GGUF files, checkpoint folders,
            tokenizer files and names of shipped tokenizers, such as `spm-v3`. A path is recognised by its content.
            Or tokenizers in memory: a fast tokenizer of `transformers`, a `MistralCommonBackend`, or a
            `MistralTokenizer` of mistral-common. The checks of the files that it was loaded from are *not checked*.
            Without an argument, every tokenizer that mistral-common ships is judged.
        tokenizer: The tokenizer of rows, encoded rows and GGUF files: a folder, a file, the name of a shipped one,
            `OWNER/NAME@COMMIT` at the Hub, a recipe, or a tokenizer in memory. It is not judged itself.
        template: The text of a chat template that is judged in place of each tokenizer's. The files of the tokenizers
            are then *not checked*.
        kind: The kind of every path, as a value of `--as`; empty to recognise it.
        base: The base checkpoint of adapters and merged models.
        oracle: The Mistral tokenizer of a folder without `tekken.json` and `tokenizer.model.vN`: a name, a path or
            `none`; None to recognise it.
        objective: The objective by which the labels of encoded rows are judged, such as `last-answer`; words of
            `chat.objective.WORDS`, joined by commas. None if none is declared.
        train: Whether a tiny model is trained with each tokenizer; None to train only if no path is given.
        examples: The number of generated rows for each law.
        xfails: A file of known deviations, which do not fail.
        rules: The version by whose rules findings fail, such as `0.1`; None for all rules. What is newer is a note.
        fail_on: What makes the verdict not ok beside errors: `note`, `not-checked`, or both, joined by a comma; None
            for errors alone.
        write_xfails: A new file for the list of all findings, to be filled in and given as `xfails`.
        rows: Rows in memory, in place of paths: a list of mappings or a `datasets.Dataset`, in any form that a file may
            have: messages, pairs, another format, or `input_ids` and `labels`. The place of a finding is `rows[N]`,
            counted from 0.

    Raises:
        InputError: If a path is missing or is not recognised, paths and `rows` are given, an argument has another type,
            an option does not apply to any path, a file of known deviations cannot be read, or the version of the rules
            is not recorded.
        TokenizerError: If the oracle is unknown, or no Mistral tokenizer applies to a tokenizer in memory.
        PinError: If the files of a tokenizer at the Hub are not available.

    Example:
        >>> from pytest_mistral_lora import judge
        >>> verdict = judge("spm-v3", examples=1)
        >>> verdict.ok, verdict.findings
        (True, ())
    """
    from pytest_mistral_lora.checkpoint.loaded_tokenizer import is_tokenizer

    declared, given = _oracle_name(oracle), [*_one_by_one(paths)]
    base = None if base is None else path_of(base, "the folder of a checkpoint", place=Place.of("base="))
    held = None if rows is None else _rows_in_memory(rows, given, tokenizer)
    named = [_judged_path(path) for path in given if not is_tokenizer(path)]
    loaded = [path for path in given if is_tokenizer(path)]
    if template is not None:
        # a template has a tokenizer, and not its folder
        kinds = {path: recognised(path, base, kind).kind for path in named}
        loaded += [path for path in named if kinds[path] == "tokenizer"]
        named = [path for path in named if kinds[path] != "tokenizer"]
        if not loaded and tokenizer is None:
            expected = 'a tokenizer, too: judge("spm-v3", template=TEXT)'
            raise InputError("a chat template without a tokenizer", place="template=", expected=expected)
    plan = plan_check(
        named,
        tokenizer=None if tokenizer is None else _tokenizer_of_rows(tokenizer, template, declared),
        loaded=[_in_memory(one, template, declared) for one in loaded],
        kind=kind,
        base=base,
        oracle=declared,
        objective=Declaration.given(objective),
        train=train,
        held=held,
        option="{}=".format,
    )
    if type(examples) is not int or examples < 1:
        raise InputError(repr(examples), place="examples=", expected="a whole number, 1 or more")
    options = CheckOptions(
        examples=examples,
        train=plan.train,
        fail_on=parse_fail_on(fail_on, "fail_on="),
        xfails=known_deviations(
            None if xfails is None else path_of(xfails, _XFAILS, place=Place.of("xfails=")), "xfails="
        ),
        rules=RuleSet.given(rules),
        write_xfails=None
        if write_xfails is None
        else require_writable(
            require_new(path_of(write_xfails, "a new file", place=Place.of("write_xfails=")), "write_xfails=")
        ),
    )
    with opened_session(plan.targets, options) as session:
        shown = [type(path).__name__ if is_tokenizer(path) else repr(str(path)) for path in given]
        verdict = verdict_of(session, f"judge({', '.join(shown) if held is None else 'rows=rows'})")
        session.write_xfails()
        return verdict


def _rows_in_memory(rows: Any, paths: Sequence[Any], tokenizer: Any) -> RowSource:
    """Return the argument `rows` of `judge` as records that can be read twice.

    Raises:
        InputError: If paths are given, too, no tokenizer is, or the rows have another type.
    """
    if paths:
        expected = "either: judge(rows=rows, tokenizer=...)"
        raise InputError("paths and rows in memory together", place="judge()", expected=expected)
    if isinstance(rows, str | Path):
        expected = f"rows in memory; a file is judged by its path: judge({str(rows)!r}, tokenizer=...)"
        raise InputError(repr(str(rows)), place="rows=", expected=expected)
    if tokenizer is None:
        expected = 'the tokenizer that encodes them, such as tokenizer="spm-v3"'
        raise InputError("rows in memory, and no tokenizer is given", place="judge()", expected=expected)
    return rows_source(list(rows) if isinstance(rows, Iterator) else rows)


def _one_by_one(paths: Sequence[Any]) -> Iterator[Any]:
    """Yield the arguments of `judge`; a list of them may be one argument."""
    for path in paths:
        if isinstance(path, list | tuple):
            yield from path
        else:
            yield path


def _judged_path(path: Any) -> Path:
    """Return an argument of `judge` as a path.

    Raises:
        InputError: If it is not a path, or no file system has such a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"no path{in_brackets(path)}: {type(path).__name__}",
            place="judge()",
            expected="paths, names of shipped tokenizers, or tokenizers in memory",
            next_step="For rows in memory: judge(rows=rows, tokenizer=...).",
        )
    return path_of(path, "something to judge")


def audit(
    rows: Any,
    *,
    tokenizer: AnyTokenizer,
    oracle: AnyPath | None = None,
    objective: str | None = None,
    dataset: AnyPath | Sequence[AnyPath] = (),
    rules: str | None = None,
) -> Verdict:
    """Compare the ids and labels that a trainer would train on with mistral-common's, as `mistral-lora check` does.

    Args:
        rows: A `datasets.Dataset` or `DatasetDict`; a path, as for `mistral-lora check`; the rows as mappings; a
            batch, a mapping of lists, arrays or tensors of shape `(batch, length)`; or batches, such as a
            `DataLoader`, each of which is read once. A row has `input_ids` and `labels`
            (integers, -100 where no loss), or a mask such as `assistant_masks`; it may have `messages`,
            `attention_mask` and `position_ids`. A preference pair has `prompt_ids`, `chosen_ids` and `rejected_ids`,
            and may have its messages under `prompt`, `chosen` and `rejected`. Without messages, the ids are read back
            into a conversation.
        tokenizer: A checkpoint folder, a tokenizer file, the name of a shipped tokenizer such as `spm-v3`,
            `OWNER/NAME@COMMIT` at the Hub, or a recipe. Or a tokenizer in memory: a fast tokenizer of `transformers`, a
            `MistralCommonBackend`, or a `MistralTokenizer` of mistral-common.
        oracle: As for `judge`.
        objective: As for `judge`.
        dataset: The chat rows that the ids were made from, one file or several in order. Rows without `messages` are
            judged by them in place of being read back, and missing rows are reported.
        rules: As for `judge`.

    Returns:
        The verdict. The place of a finding is `rows[N]`, counted from 0, unless `rows` is a path; in batches, it is
        `rows[BATCH][N]`.

    Raises:
        InputError: If `rows`, `tokenizer` or `dataset` has another type, a path is missing, or the version of the
            rules is not recorded.
        TokenizerError: If the tokenizer cannot be loaded, or no Mistral tokenizer applies.
        RowsError: If a row of `dataset` cannot be read.

    Example:
        >>> from pytest_mistral_lora import audit
        >>> row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
        >>> encoded = row | {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, 2]}
        >>> audit([encoded], tokenizer="spm-v3").ok
        True
    """
    given = dataset if isinstance(dataset, list | tuple) else [dataset]
    sources = tuple(_existing(path_of(source, _DATASET, place=Place.of("dataset="))) for source in given)
    encoder = encoder_of(tokenizer, oracle)
    frozen, objective_of = RuleSet.given(rules), Declaration.given(objective)
    if isinstance(rows, str | Path):
        file = _existing(path_of(rows, "encoded rows"))
        target = EncodedTarget(name_of(file), file, judge=encoder, dataset=sources, objective=objective_of)
        require_objectives([target])
        with opened_session([target], CheckOptions(rules=frozen)) as session:
            return verdict_of(session, f"audit({str(file)!r})")
    target = EncodedTarget("rows", judge=encoder, dataset=sources, source=rows_source(rows), objective=objective_of)
    require_objectives([target])
    with opened_session([target], CheckOptions(rules=frozen)) as session:
        return verdict_of(session, "audit(rows)")


def encoder_of(tokenizer: AnyTokenizer, oracle: AnyPath | None = None) -> Target:
    """Return the target whose Mistral tokenizer judges rows, loaded.

    Args:
        tokenizer: As for `audit`.
        oracle: As for `judge`.

    Raises:
        InputError: If the file or folder is missing, or the tokenizer has another type.
        TokenizerError: If the tokenizer cannot be loaded, or no Mistral tokenizer applies.
    """
    from pytest_mistral_lora.checkpoint.loaded_tokenizer import given_tokenizer, tokenizer_or_path

    given, declared = tokenizer_or_path(tokenizer), _oracle_name(oracle)
    if isinstance(given, Path):
        path, declared = present_tokenizer(tokenizer_path(str(given)), declared)
        encoder = Target(name_of(path), path, oracle_name=declared)
    else:
        loaded = given_tokenizer(given, oracle=declared)
        encoder = Target.of_loaded(loaded, name_of(loaded.path))
    _ = encoder.oracle  # a tokenizer that does not load is bad input, not a finding about the rows
    return encoder


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """The targets of `check` and `judge`.

    Attributes:
        paths: The paths, each with its kind.
        targets: A target for each path, or the embedded default.
        train: Whether a tiny model is trained with each tokenizer.
    """

    paths: tuple[RecognisedPath, ...]
    targets: list[Target]
    train: bool


def plan_check(
    paths: Sequence[Path],
    *,
    tokenizer: Path | CheckpointTokenizer | None,
    loaded: Sequence[CheckpointTokenizer] = (),
    kind: str,
    base: Path | None,
    oracle: str | None,
    objective: Declaration | None = None,
    train: bool | None,
    held: RowSource | None = None,
    option: Callable[[str], str],
) -> CheckPlan:
    """Return the targets of some paths, as the options of `check` declare them.

    Args:
        paths: The paths; without paths and `loaded`, the embedded default is judged.
        tokenizer: The name of a shipped tokenizer, a path of `tokenizer_path`, or a tokenizer in memory.
        loaded: Tokenizers in memory to judge.
        kind: A key of `KINDS`, or empty.
        base: The base checkpoint, or None.
        oracle: The declared oracle, or None.
        objective: The declared objective of rows and encoded rows, or None.
        train: Whether a tiny model is trained; None to train only if no path is given.
        held: Rows in memory, or None.
        option: Spells the name of an option as the caller's user does.

    Raises:
        InputError: If a path is missing or is not recognised, an option does not apply to any path, or a file cannot
            be used.
    """
    if kind and (not isinstance(kind, str) or kind not in KINDS):
        raise InputError(
            f"{shortened(kind)}{did_you_mean(str(kind), KINDS)}", place=option("kind"), expected=", ".join(KINDS)
        )
    if train and loaded:
        expected = "the folder of the tokenizer: the tiny train loads its files"
        raise InputError("a tokenizer in memory is not trained with", place=option("train"), expected=expected)
    if isinstance(tokenizer, Path) and not is_shipped(tokenizer):
        tokenizer, oracle = present_tokenizer(tokenizer, oracle)
    found = tuple(recognised(path, base, kind) for path in paths)
    kinds = {path.kind for path in found}
    if held is not None:
        kinds.add("rows")
    if tokenizer is not None and not kinds & {"rows", "encoded", "gguf"}:
        text = f"{option('tokenizer')} is for rows and GGUF files, and no path is one"
        raise InputError(text, expected="a tokenizer to check as a path")
    if objective is not None and not kinds & {"rows", "encoded"}:
        text = f"{option('objective')} is for rows and encoded rows, and no path is one"
        raise InputError(text, expected="no objective; a recipe has the key training.objective")
    if base is not None and not kinds & {"adapter", "gguf"}:
        shown = f": {found[0].path} is {found[0].title}" if found else ""
        text = f"{option('base')} is the base of an adapter or a merged model, and no path is one{shown}"
        raise InputError(text, expected="a folder with adapter_model.safetensors, or with a merged model.safetensors")
    return CheckPlan(
        paths=found,
        targets=targets_of(found, base, oracle, tokenizer, loaded, objective, held),
        # the embedded default has the tiny train, like the plugin's; for a user's own tokenizers it takes minutes
        train=not paths and not loaded and held is None if train is None else train,
    )


def _tokenizer_of_rows(given: Any, template: str | None, oracle: str | None) -> Path | CheckpointTokenizer:
    """Return the tokenizer of rows: one in memory, or one that a path or a word names.

    A shipped one keeps its name, which the report shows.

    Raises:
        InputError: If it has another type.
        PinError: If the files of a repository at the Hub are not available.
        TokenizerError: If it cannot be loaded.
    """
    from pytest_mistral_lora.checkpoint.loaded_tokenizer import tokenizer_or_path

    named = tokenizer_or_path(given)
    if template is not None or not isinstance(named, Path):
        return _in_memory(named, template, oracle)
    return named if is_shipped(named) else tokenizer_path(str(named))


def present_tokenizer(path: Path, oracle: str | None) -> tuple[Path, str | None]:
    """Return the tokenizer that a path or a recipe names, and its oracle.

    Raises:
        InputError: If the file or folder is missing.
    """
    named, declared, _ = named_tokenizer(path, oracle)
    if not named.exists():
        expected = f"a tokenizer folder or file, or one of {', '.join(EMBEDDED)}"
        found = f"no such file or folder{similar_path(named, EMBEDDED)}"
        raise InputError(found, place=str(named), expected=expected)
    return named, declared


def _in_memory(given: Any, template: str | None, oracle: str | None) -> CheckpointTokenizer:
    """Return a tokenizer as an object: one in memory, or one that is named and gets another template.

    Raises:
        InputError: If a file or folder is missing, or the template is not a text.
        TokenizerError: If the tokenizer cannot be loaded, or no Mistral tokenizer applies.
    """
    from pytest_mistral_lora.checkpoint.loaded_tokenizer import given_tokenizer, require_template
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    text = require_template(template)
    if isinstance(given, Path):
        path, oracle = present_tokenizer(tokenizer_path(str(given)), oracle)
        given = CheckpointTokenizer(path, oracle)
    return given_tokenizer(given, text, oracle)


def _oracle_name(oracle: AnyPath | None) -> str | None:
    from pytest_mistral_lora.checkpoint.recognition import known_choice

    if oracle is None:
        return None
    if not isinstance(oracle, str | os.PathLike):
        expected = "the name of a shipped tokenizer, the path of a tekken.json or tokenizer.model.vN, or none"
        raise InputError(f"a {type(oracle).__name__}{in_brackets(oracle)}", place="oracle=", expected=expected)
    return known_choice(str(oracle))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise InputError("no such file or folder", place=str(path))
    return path


def verdict_of(
    session: Session,
    command: str,
    notes: Callable[[Session], Sequence[str]] = lambda session: (),
    earlier: Verdict | None = None,
) -> Verdict:
    """Run a session and return its verdict.

    Args:
        session: The session, which has not run.
        command: The call, for the report.
        notes: Returns lines to print above the last line, once the session has run.
        earlier: A verdict that this one goes on: its checks stay, but for those that the session ran again, and so do
            its notes.
    """
    for _ in session.run():
        pass
    return finished_verdict(session, command, notes, earlier)


def finished_verdict(
    session: Session,
    command: str,
    notes: Callable[[Session], Sequence[str]] = lambda session: (),
    earlier: Verdict | None = None,
) -> Verdict:
    """Return the verdict of a session that has run; the arguments are as for `verdict_of`."""
    lines = [*(earlier._notes if earlier is not None else ()), *notes(session)]
    if earlier is not None:
        session.go_on_from(earlier._outcomes)
    outcomes = session.outcomes
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    texts = session.cause_texts(width, 'verdict.write("report.html")')
    return Verdict(
        ok=session.exit_code == 0,
        findings=tuple(session.causes().standing(finding for outcome in outcomes for finding in outcome.findings)),
        not_checked={outcome.name: outcome.not_checked for outcome in outcomes if outcome.not_checked},
        facts={outcome.name: outcome.facts for outcome in outcomes if outcome.facts},
        _text="\n".join([*session.opening_lines, *texts, *session.summary_lines(width, lines)]),
        _report=session.report(command, Path.cwd()),
        _rows=(*(earlier._rows if earlier is not None else ()), *session.failed_rows()),
        _outcomes=outcomes,
        _notes=lines,
    )


def rows_judge(recipe: Any, encoder: Encoder, files: Sequence[DataFile], xfails: Path | None) -> TrainingPass:
    """Return the judge of the rows that a run trains on, as `training.rows.judgement` asks for it."""
    from pytest_mistral_lora.conformance.dataset.training_pass import TrainingPass

    return TrainingPass(recipe, encoder, files, xfails, finished_verdict)
