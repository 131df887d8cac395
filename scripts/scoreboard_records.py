"""The verdict on what other trainers make of each packaged row or pair: recorded with the trainers, and read again.

A record has no ids: they would be megabytes that nobody reads, and the trainer makes them again.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.preference import SIDES
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import Case, PairCase, packaged_cases, packaged_pairs
from pytest_mistral_lora.runners import RUNNERS, Runner, interpreter
from pytest_mistral_lora.runners.extract import extract
from pytest_mistral_lora.runners.given_rows import GivenRows

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "scoreboard"
RECORDED = PAGES / "recorded"
HUB = "-hub"
"""Ends the names of checkpoints that also hold Mistral's own tokenizer file, as its repositories on the Hub do."""
DERIVED = ("derived-v11", "derived-v13", "derived-v15")
"""Tekken files of the versions that mistral-common knows and does not ship, derived from a shipped vocabulary."""
TOKENIZERS = (
    *("spm-v1", "spm-v3", "spm-v7", "tekken-240911", "spm-v3-hub", "tekken-240911-hub"),
    *(*DERIVED, f"derived-v13{HUB}"),
)
REAL_TOKENIZERS = ("spm-v3", "tekken-240911")
PAIR_TOKENIZERS = ("spm-v3", "tekken-240911", "derived-v15")
TIME_LIMIT = 3600.0
"""Seconds for a recording: a runner that refuses a file is given smaller ones, on cores that may be busy."""


@dataclass(frozen=True)
class Column:
    """A runner with one of its configurations.

    Attributes:
        runner: The runner.
        config: The configuration.
        task: Its command for preferences; empty for chat rows.
    """

    runner: Runner
    config: Path
    task: str = ""

    @property
    def name(self) -> str:
        """Its name in the tables, and of its records."""
        if not self.task:
            return self.config.stem
        is_default = self.config == self.runner.default_config(self.task)
        variant = "" if is_default else self.config.stem.removeprefix(self.runner.name)
        return f"{self.runner.name}-{self.task}{variant}"

    @property
    def kind(self) -> str:
        """The key of its records of packaged rows."""
        return "pairs" if self.task else "packaged"

    @cached_property
    def recorded(self) -> dict[str, Recorded]:
        """What is recorded, by tokenizer."""
        return {name: Recorded.read(data) for name, data in self.read()[self.kind].items()}

    @property
    def file(self) -> Path:
        """The file of its records."""
        return RECORDED / f"{self.name}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return its records: of the packaged pairs, or of the packaged rows and of real ones, each by tokenizer."""
        if not self.file.is_file():
            return {self.kind: {}} if self.task else {self.kind: {}, "real": {}}
        data: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
        return data

    def write(self, kind: str, tokenizer: str, data: dict[str, Any] | None) -> None:
        """Write a record of a tokenizer in place of the one before, or take it away."""
        records = self.read()
        kept = {name: old for name, old in records[kind].items() if name != tokenizer}
        kept |= {tokenizer: data} if data is not None else {}
        records[kind] = {name: kept[name] for name in TOKENIZERS if name in kept}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(records, ensure_ascii=False, indent=1) + "\n")

    @property
    def about(self) -> str:
        """What the configuration says of itself."""
        return self.config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")

    def command(self, tokenizer: str) -> str:
        """Return the command that makes a column of a table again."""
        config = self.config.relative_to(ROOT)
        task = f" --task {self.task}" if self.task else ""
        return f"mistral-lora audit --runner {self.runner.name}{task} --config {config} --tokenizer {tokenizer}"


COLUMNS = tuple(
    Column(runner, config)
    for runner in RUNNERS.values()
    if not runner.is_evaluation
    for config in (runner.config, *sorted(runner.config.parent.glob(f"{runner.name}-*.yaml")))
)
_PREFERENCES = {
    "trl": ("dpo", "kto", "reward"),
    "axolotl": ("dpo", "kto", "orpo"),
    "llamafactory": ("dpo", "kto", "rm"),
    "ms-swift": ("dpo", "kto", "rm", "orpo"),
}
"""The commands that are given the packaged pairs, by the name of their runner."""
PAIR_COLUMNS = tuple(
    Column(runner, config, task)
    for runner, tasks in ((RUNNERS[name], tasks) for name, tasks in _PREFERENCES.items())
    for task in tasks
    for config in (
        runner.default_config(task),
        *sorted((runner.config.parent / "preferences").glob(f"{runner.name}-own-*.yaml")),
    )
)


@dataclass(frozen=True)
class Example:
    """The shortest row that shows a difference.

    Attributes:
        case: The name of the packaged row; of a pair, the name of a verdict.
        found: What the trainer made of it.
        expected: What it should have made; may be empty.
    """

    case: str
    found: str
    expected: str

    @property
    def record(self) -> str:
        """The name of the packaged row or pair."""
        return self.case.partition(", ")[0]


@dataclass(frozen=True)
class Recorded:
    """The verdict on what a runner made of the packaged rows or pairs.

    Attributes:
        date: The day of the recording, as in 2026-11-27 (UTC).
        environment: Version by distribution.
        refused: Why the runner made nothing of any row; empty where it made something.
        verdicts: The rules that each case breaks, by its name; empty where ids and labels are exactly right. A pair has
            a verdict on each answer, `NAME, chosen` and `NAME, rejected`, and one on itself, `NAME`, for rules that it
            breaks as a whole, such as a dropped row.
        examples: The shortest case that breaks a rule, by rule.
    """

    date: str
    environment: dict[str, str]
    refused: str
    verdicts: dict[str, list[str]]
    examples: dict[str, Example]

    @classmethod
    def read(cls, data: dict[str, Any]) -> Recorded:
        """Return a record that was written as JSON."""
        verdicts = {case: rules.split() for case, rules in data["verdicts"].items()}
        examples = {rule: Example(**example) for rule, example in data["examples"].items()}
        return cls(data["date"], data["environment"], data["refused"], verdicts, examples)


def record_verdicts(verdicts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the rules that each packaged row or pair breaks, whichever answer of a pair breaks them, by its name."""
    by_record: dict[str, list[str]] = {}
    for name, rules in verdicts.items():
        broken = by_record.setdefault(name.partition(", ")[0], [])
        broken += [rule for rule in rules if rule not in broken]
    return by_record


def judged(lines: dict[str, dict[str, Any]], tokenizer: str) -> dict[str, Any]:
    """Return `verdicts` and `examples` of a record.

    Args:
        lines: What the trainer made of each case, by name: `input_ids` and `labels`, or an `error`.
        tokenizer: The name of the tokenizer.
    """
    verdicts: dict[str, str] = {}
    shortest: dict[str, tuple[int, Example]] = {}
    for case in cases(tokenizer):
        if case.name not in lines:
            continue
        findings = list(_findings(case, lines[case.name], tokenizer))
        verdicts[case.name] = " ".join(finding.rule for finding in findings)
        for finding in findings:
            length = len(case.row.to_jsonl())
            if finding.rule not in shortest or length < shortest[finding.rule][0]:
                shortest[finding.rule] = (length, Example(case.name, finding.found, finding.expected))
    examples = {rule: asdict(example) for rule, (_, example) in sorted(shortest.items())}
    return {"verdicts": verdicts, "examples": examples}


def _findings(case: Case, line: dict[str, Any], tokenizer: str) -> Iterator[Finding]:
    if "error" in line:
        yield Finding("ML502", f"the row was dropped: {line['error']}", Place.of(case.name), row=case.row.to_jsonl())
    else:
        yield from row_findings(case.row, line["input_ids"], line["labels"], oracle(tokenizer))


def judged_pairs(encoded: Path, tokenizer: str, *, is_rated: bool = False) -> dict[str, Any]:
    """Return `verdicts` and `examples` of a record of the packaged pairs.

    Args:
        encoded: What the trainer made of them, as `extract` writes it.
        tokenizer: The name of the tokenizer.
        is_rated: Whether each answer was given to the trainer by itself, with a label.
    """
    given = pair_cases(tokenizer)
    names = [case.name for case in given]
    if is_rated:
        names = [f"{case.name}, {row.side}" for case in given for row in case.rows]
    # a pair that can only be refused shows no fault if another one does
    costs = {case.name: (case.is_refused, len(json.dumps(case.rows[0].kind.record(case.rows)))) for case in given}
    verdicts: dict[str, list[str]] = {}
    simplest: dict[str, Example] = {}
    *of_lines, _ = Audit(FileRows(encoded), oracle(tokenizer), judges_texts=False).verdicts()
    for verdict in of_lines:
        if verdict.index is None:
            raise ValueError(f"{verdict.place!s}: {verdict.findings}")
        record, name = names[verdict.index], names[verdict.index]
        if (side := verdict.place.field) in SIDES:
            name = f"{record}, {side}"
        if verdict.state != "not judged":
            verdicts.setdefault(name, [])
        for finding in verdict.findings:
            broken = record if finding.place == verdict.place.row else name
            verdicts.setdefault(broken, []).append(finding.rule)
            # the number of a pair among the packaged ones says nothing of its reproduction
            example = Example(broken, re.sub(r"^row \d+ was", "it was", finding.found), finding.expected)
            known = simplest.get(finding.rule)
            if known is None or costs[example.record] < costs[known.record]:
                simplest[finding.rule] = example
    examples = {rule: asdict(example) for rule, example in sorted(simplest.items())}
    return {"verdicts": {name: " ".join(rules) for name, rules in verdicts.items()}, "examples": examples}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON Lines file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def tokenizer_file(name: str, words: int = 0) -> Path:
    """Return Mistral's tokenizer file of a checkpoint of the scoreboard; a derived one is written once.

    Args:
        name: Its name.
        words: Ids of text of a derived one, if it is to have only the first of them: it then loads at once.
    """
    bare = name.removesuffix(HUB)
    file: Path = _derived_tekken().derived_tokenizer(bare, words=words) if bare in DERIVED else shipped_tokenizer(bare)
    return file


def _derived_tekken() -> Any:
    sys.path.append(str(ROOT / "tests" / "support"))
    import derived_tekken

    return derived_tekken


@cache
def loaded(file: Path) -> CheckpointTokenizer:
    """Return the tokenizer of a file, whose oracle is loaded once for all names and rows."""
    return CheckpointTokenizer(file)


def oracle(tokenizer: str) -> Oracle:
    """Return Mistral's own tokenization."""
    return loaded(tokenizer_file(tokenizer)).oracle


@cache
def cases(tokenizer: str) -> list[Case]:
    """Return the packaged rows that a tokenizer's version encodes."""
    return [case for case in packaged_cases() if case.fits(oracle(tokenizer))]


@cache
def pair_cases(tokenizer: str) -> list[PairCase]:
    """Return the packaged pairs that a tokenizer's version encodes."""
    return [case for case in packaged_pairs() if case.fits(oracle(tokenizer))]


def checkpoint(name: str, folder: Path) -> Path:
    """Return the tokenizer file of a name; for a name that ends in `-hub`, a folder that is made here.

    A derived file is written into the folder.
    """
    bare = name.removesuffix(HUB)
    if bare in DERIVED:
        folder.mkdir()
        file: Path = _derived_tekken().write_derived(bare, folder)
    else:
        file = shipped_tokenizer(bare)
    if name == bare:
        return file
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    if bare not in DERIVED:
        shutil.copy(file, folder / (TEKKEN if file.suffix == ".json" else f"tokenizer.model{file.suffix}"))
    return folder


def record(column: Column, tokenizer: str) -> None:
    """Run a runner on the packaged rows or pairs, and write the verdict on what it makes."""
    data: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "environment": {}, "refused": ""}
    verdicts: dict[str, Any] = {"verdicts": {}, "examples": {}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = extract(
                column.runner,
                GivenRows.packaged(column.runner, oracle(tokenizer), column.task).rows,
                checkpoint(tokenizer, Path(folder) / tokenizer),
                Path(folder) / "encoded.jsonl",
                config=column.config,
                time_limit=TIME_LIMIT,
                task=column.task,
            )
        except RunnerError as error:
            # killed, or not done in time: that is no verdict of the trainer on its rows
            if "ends with exit code" not in error.found:
                raise
            data["refused"] = error.found.splitlines()[0].removesuffix("; it printed last:").partition(": ")[2]
            data["environment"] = _environment(column.runner)
        else:
            data["environment"] = dict(made.environment)
            if column.task:
                is_rated = column.task not in column.runner.tasks.pairs
                verdicts = judged_pairs(made.file, tokenizer, is_rated=is_rated)
            else:
                names = [case.name for case in cases(tokenizer)]
                verdicts = judged(dict(zip(names, read_lines(made.file), strict=True)), tokenizer)
    column.write(column.kind, tokenizer, data | verdicts)


def _environment(runner: Runner) -> dict[str, str]:
    """Return the versions that a runner reports, for one whose report is lost because it refuses every row."""
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows.jsonl", Path(folder) / "encoded.jsonl"
        rows.touch()
        command = [interpreter(runner), runner.script, "--config", runner.config, "--checkpoint", folder]
        subprocess.run([*command, "--rows", rows, "--output", output], capture_output=True, check=False)
        return dict(read_lines(output)[0]["environment"])


def record_real(column: Column, tokenizer: str) -> None:
    """Run a runner on real dialogues, and write what the audit counts."""
    rows = real_rows()
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder) / "encoded.jsonl"
        try:
            tokenizer_path = shipped_tokenizer(tokenizer)
            made = extract(column.runner, rows, tokenizer_path, encoded, config=column.config, time_limit=TIME_LIMIT)
        except RunnerError as error:
            if "ends with exit code" not in error.found:
                raise
            column.write("real", tokenizer, None)
            return
        audit = Audit(FileRows(made.file), oracle(tokenizer))
        for _ in audit.verdicts():
            pass
    corpus = f"chatterbot-corpus {version('chatterbot-corpus')}"
    data = {
        "date": datetime.now(UTC).date().isoformat(),
        "version": made.environment[column.runner.distribution],
        "rows": len(rows),
        "of": corpus,
        "sound": audit.states["sound"],
        "classes": dict(sorted(audit.counts.items())),
    }
    column.write("real", tokenizer, data)


def real_rows() -> list[Row]:
    """Return the English dialogues of the package chatterbot-corpus, with two turns or more."""
    from importlib.resources import files

    import yaml

    rows = []
    for file in sorted((files("chatterbot_corpus") / "data" / "english").iterdir(), key=lambda file: file.name):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn) for turn in talk[: len(talk) // 2 * 2]]
            if turns:
                roles = ("user", "assistant") * (len(turns) // 2)
                messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
                rows.append(parse_row({"messages": messages}))
    return rows
