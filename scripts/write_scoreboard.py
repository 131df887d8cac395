"""What other trainers make of rows: record it with the trainers themselves, and write it down as docs/scoreboard/.

    python scripts/write_scoreboard.py                       the pages, from what is recorded
    python scripts/write_scoreboard.py --record trl          run TRL on every tokenizer, and record what it makes
    python scripts/write_scoreboard.py --check               change nothing; exit 1 if a page is not up to date

A runner that is recorded has to be installed here, or in the environment of `mistral-lora runner setup NAME`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.checkpoint.backends import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.fault_classes import CLASSES
from pytest_mistral_lora.conformance.encoded.verdicts import row_findings
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import Case, packaged_cases
from pytest_mistral_lora.runners.extract import extract
from pytest_mistral_lora.runners.runner import RUNNERS, Runner

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "scoreboard"
RECORDED = PAGES / "recorded"
TOKENIZERS = ("spm-v1", "spm-v3", "spm-v7", "tekken-240911")
REAL_TOKENIZERS = ("spm-v3", "tekken-240911")
OURS = "pytest-mistral-lora"


@dataclass(frozen=True)
class Column:
    """A runner with one of its configurations.

    Attributes:
        runner: The runner.
        config: The configuration.
    """

    runner: Runner
    config: Path

    @property
    def name(self) -> str:
        """Its name in the tables, and of its records."""
        return self.config.stem

    @cached_property
    def recorded(self) -> dict[str, Recorded]:
        """What is recorded, by tokenizer."""
        files = {tokenizer: RECORDED / self.name / f"{tokenizer}.jsonl" for tokenizer in TOKENIZERS}
        return {name: Recorded.read(file, name) for name, file in files.items() if file.is_file()}

    @property
    def about(self) -> str:
        """What the configuration says of itself."""
        return self.config.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")

    def command(self, tokenizer: str) -> str:
        """Return the command that makes a column of a table again."""
        config = self.config.relative_to(ROOT)
        return f"mistral-lora audit --runner {self.runner.name} --config {config} --tokenizer {tokenizer}"


COLUMNS = tuple(
    Column(runner, config)
    for runner in RUNNERS.values()
    for config in (runner.config, *sorted(runner.config.parent.glob(f"{runner.name}-*.yaml")))
)


@dataclass(frozen=True)
class Recorded:
    """What a runner made of the packaged rows.

    Attributes:
        tokenizer: Our name of the tokenizer.
        environment: Version by distribution.
        refused: Why the runner made nothing of any row; empty where it made something.
        lines: What it made of each case, by name: ids and labels, or an error.
    """

    tokenizer: str
    environment: dict[str, str]
    refused: str
    lines: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path, tokenizer: str) -> Recorded:
        """Read a record."""
        head, *lines = read_lines(file)
        return cls(tokenizer, head["environment"], head["refused"], {line.pop("case"): line for line in lines})

    @cached_property
    def findings(self) -> dict[str, list[Finding]]:
        """What is wrong with each case, by name."""
        return {case.name: list(self._findings(case)) for case in cases(self.tokenizer) if case.name in self.lines}

    def _findings(self, case: Case) -> Iterator[Finding]:
        line = self.lines[case.name]
        if "error" in line:
            yield Finding("ML502", f"the row was dropped: {line['error']}", case.name, row=case.row.to_jsonl())
        else:
            yield from row_findings(case.row, line["input_ids"], line["labels"], oracle(self.tokenizer))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the values of a JSON Lines file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def oracle(tokenizer: str) -> Oracle:
    """Return Mistral's own tokenization."""
    return Oracle(shipped_tokenizer(tokenizer))


@cache
def cases(tokenizer: str) -> list[Case]:
    """Return the packaged rows that a tokenizer's version encodes."""
    return [case for case in packaged_cases() if oracle(tokenizer).version in case.versions]


def record(column: Column, tokenizer: str) -> None:
    """Run a runner on the packaged rows, and write what it makes."""
    file = RECORDED / column.name / f"{tokenizer}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    named = cases(tokenizer)
    head: dict[str, Any] = {"environment": {}, "refused": ""}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = extract(
                column.runner,
                [case.row for case in named],
                shipped_tokenizer(tokenizer),
                Path(folder) / "encoded.jsonl",
                config=column.config,
            )
        except RunnerError as error:
            head["refused"] = error.found.splitlines()[0].removesuffix("; it printed last:")
        else:
            head["environment"] = dict(made.environment)
            lines = read_lines(made.file)
    kept = [
        {"case": case.name, **{key: line[key] for key in ("error", "input_ids", "labels") if key in line}}
        for case, line in zip(named, lines, strict=False)
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *kept)))


def record_real(column: Column, tokenizer: str) -> None:
    """Run a runner on real dialogues, and write what the audit counts."""
    file = RECORDED / column.name / f"{tokenizer}-real.json"
    rows = real_rows()
    with tempfile.TemporaryDirectory() as folder:
        encoded = Path(folder) / "encoded.jsonl"
        try:
            made = extract(column.runner, rows, shipped_tokenizer(tokenizer), encoded, config=column.config)
        except RunnerError:
            file.unlink(missing_ok=True)
            return
        audit = Audit(made.file, oracle(tokenizer))
        for _ in audit.verdicts():
            pass
    data = {"rows": len(rows), "sound": audit.states["sound"], "classes": dict(sorted(audit.counts.items()))}
    write_text(file, json.dumps(data) + "\n")


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


@cache
def our_findings(tokenizer: str) -> dict[str, list[Finding]]:
    """Return what is wrong with our own trainer's encoding of each case."""
    encoder = Encoder("mistral-common", CheckpointTokenizer(shipped_tokenizer(tokenizer)))
    found = {}
    for case in cases(tokenizer):
        encoded = encoder.encode(case.row)
        found[case.name] = list(row_findings(case.row, encoded.input_ids, encoded.labels or (), oracle(tokenizer)))
    return found


def board_page() -> str:
    """Return docs/scoreboard/README.md."""
    lines = [*_INTRODUCTION.splitlines(), "", *_configurations(), "", *_summary(), "", *_real(), ""]
    for tokenizer in TOKENIZERS:
        lines += [f"## {tokenizer}, row by row", "", *_cases_table(tokenizer), ""]
    return "\n".join(lines[:-1]) + "\n"


_INTRODUCTION = """\
# What other trainers make of rows

Made by `python scripts/write_scoreboard.py` from what the trainers themselves wrote (`recorded/`), by
`python scripts/write_scoreboard.py --record NAME` in the environments of `mistral-lora runner setup NAME`.
[../runners.md](../runners.md) says how their rows are taken; [reproductions.md](reproductions.md) has the smallest row
that shows each difference.

What is right is what mistral-common encodes, with loss on the assistants' tokens alone. A cell says `sound` where ids
and labels are exactly that, or which rules are broken: each is one class of [../rules.md](../rules.md). The rows are
the packaged ones (`goldens/cases.json`) that the tokenizer's version can encode. The trainers get a checkpoint folder
that is made of the tokenizer file as for the Hub: `tokenizer.json`, and the chat template that mistral-common
generates. A checkpoint whose own files differ may come out otherwise; the commands take any as `--tokenizer`.

The configurations are each trainer's defaults for chat rows, and the variants that are listed; not tried are other
templates, packing, several datasets, GPUs, and training itself. Ids and labels do not depend on the last two."""


def _configurations() -> Iterator[str]:
    yield "## What was run"
    yield ""
    yield "| configuration | what it is | versions | command for one column |"
    yield "|---|---|---|---|"
    for column in COLUMNS:
        link = f"[{column.name}](../../{column.config.relative_to(ROOT).as_posix()})"
        for one in list(column.recorded.values())[:1]:
            yield f"| {link} | {column.about} | {_versions(one.environment)} | `{column.command('TOKENIZER')}` |"
    yield f"| {OURS} | this package's own trainer, `backend: mistral-common` | | `mistral-lora train recipe.yaml` |"


def _versions(environment: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.items())


def _summary() -> Iterator[str]:
    yield "## In short"
    yield ""
    yield f"| configuration | {' | '.join(TOKENIZERS)} |"
    yield "|---|" + "---|" * len(TOKENIZERS)
    for column in COLUMNS:
        recorded = column.recorded
        if recorded:
            cells = [_short(recorded[name]) if name in recorded else "not run" for name in TOKENIZERS]
            yield f"| {column.name} | {' | '.join(cells)} |"
    yield f"| {OURS} | {' | '.join(_counted(our_findings(name)) for name in TOKENIZERS)} |"


def _short(one: Recorded) -> str:
    return f"refused: {_cell(one.refused)}" if one.refused else _counted(one.findings)


def _counted(findings: dict[str, list[Finding]]) -> str:
    sound = sum(not found for found in findings.values())
    counts = Counter(finding.rule for found in findings.values() for finding in found)
    classes = "".join(f"<br>{CLASSES[rule]} {count}" for rule, count in sorted(counts.items()))
    return f"{sound} of {len(findings)} sound{classes}"


def _real() -> Iterator[str]:
    yield "## On real dialogues"
    yield ""
    yield "All English dialogues of the package chatterbot-corpus 1.3.3, as user and assistant by turns:"
    yield "`python scripts/write_scoreboard.py --record NAME --real`."
    yield ""
    yield "| configuration | tokenizer | rows | sound | rules that are broken, in how many places |"
    yield "|---|---|---|---|---|"
    for column in COLUMNS:
        for tokenizer in REAL_TOKENIZERS:
            file = RECORDED / column.name / f"{tokenizer}-real.json"
            if file.is_file():
                data = json.loads(file.read_text(encoding="utf-8"))
                classes = ", ".join(f"{CLASSES[rule]} {count}" for rule, count in data["classes"].items())
                yield f"| {column.name} | {tokenizer} | {data['rows']} | {data['sound']} | {classes} |"


def _cases_table(tokenizer: str) -> Iterator[str]:
    columns = {column.name: column.recorded.get(tokenizer) for column in COLUMNS}
    found = {name: one.findings for name, one in columns.items() if one is not None and not one.refused}
    found[OURS] = our_findings(tokenizer)
    yield f"| row | {' | '.join(found)} |"
    yield "|---|" + "---|" * len(found)
    for case in cases(tokenizer):
        cells = [_rules(findings[case.name]) for findings in found.values()]
        yield f"| {case.name} | {' | '.join(cells)} |"


def _rules(findings: list[Finding]) -> str:
    return " ".join(f"[{f.rule}](../rules/{f.rule}.md)" for f in findings) or "sound"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:200]


def reproductions_page() -> str:
    """Return docs/scoreboard/reproductions.md: the smallest row that shows each difference of each configuration."""
    lines = ["# The smallest row that shows each difference", "", *_REPRODUCTIONS.splitlines()]
    for column in COLUMNS:
        for rule, (tokenizer, finding) in sorted(_smallest(column).items()):
            versions = _versions(column.recorded[tokenizer].environment)
            lines += ["", f"## {column.name}: {CLASSES[rule]} ({rule}), on {tokenizer}", "", versions, ""]
            lines += [f"```console\n$ {column.command(tokenizer)} --dataset row.jsonl\n```", ""]
            lines += [f"```json\n{finding.row}\n```", "", f"{finding.found}", ""]
            lines += ["```text", *finding.detail.splitlines(), "```"] if finding.detail else []
    return "\n".join(lines).rstrip("\n") + "\n"


_REPRODUCTIONS = """\
Each has the configuration, the row (`row.jsonl`), and the tokens: what mistral-common encodes, and what the trainer
made. They are made by `python scripts/write_scoreboard.py`, from what the trainers wrote."""


def _smallest(column: Column) -> dict[str, tuple[str, Finding]]:
    """Return for each rule that a configuration breaks the finding with the shortest row, and its tokenizer."""
    every = [
        (finding, tokenizer)
        for tokenizer, one in column.recorded.items()
        for found in one.findings.values()
        for finding in found
    ]
    shortest: dict[str, tuple[str, Finding]] = {}
    for finding, tokenizer in sorted(every, key=lambda pair: len(pair[0].row)):
        shortest.setdefault(finding.rule, (tokenizer, finding))
    return shortest


def main() -> int:
    """Record, or write the pages, or say which are not up to date (exit code 1)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", choices=[*RUNNERS], help="run this runner, and record what it makes")
    parser.add_argument("--real", action="store_true", help="with --record, on real dialogues")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    given = parser.parse_args()
    for column in COLUMNS:
        if column.runner.name == given.record:
            for tokenizer in REAL_TOKENIZERS if given.real else TOKENIZERS:
                print(f"{column.name} on {tokenizer}", flush=True)
                (record_real if given.real else record)(column, tokenizer)
    return _write(check=given.check)


def pages() -> dict[str, str]:
    """Return every page by its name."""
    return {"README.md": board_page(), "reproductions.md": reproductions_page()}


def _write(*, check: bool) -> int:
    stale = 0
    for name, text in pages().items():
        path = PAGES / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"scoreboard/{name} {'is not up to date' if check else 'written'}")
            if not check:
                write_text(path, text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
