"""Trainers, run on the packaged rows and pairs and on real dialogues, and the verdicts on what they make."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from boards.inputs import cases, checkpoint, oracle, pair_cases, real_rows
from boards.results import Example
from boards.trainers import Configuration
from pytest_mistral_lora.chat.kinds.preference import SIDES
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import Case
from pytest_mistral_lora.runners import Trainer, interpreter
from pytest_mistral_lora.runners.extract import Extraction, extract
from pytest_mistral_lora.runners.given_rows import GivenRows

TIME_LIMIT = 3600.0
"""Seconds for a recording: a runner that refuses a file is given smaller ones, on cores that may be busy."""


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


def made_by(
    configuration: Configuration, rows: Sequence[Row], tokenizer: str, folder: Path, script: Path | None = None
) -> Extraction | str:
    """Run a trainer on rows, and return what it made, or why it makes nothing of a plain row.

    Args:
        configuration: The trainer with its configuration.
        rows: The rows.
        tokenizer: The name of the tokenizer.
        folder: An empty folder, in which it runs.
        script: The script that runs in place of the one that takes ids and labels out.

    Raises:
        RunnerError: If it was killed, or not done in time: that is no verdict of the trainer on its rows.
    """
    runner = configuration.runner if script is None else replace(configuration.runner, script=script)
    given = checkpoint(tokenizer, folder / tokenizer)
    if configuration.template:
        write_text(folder / configuration.template, training_template(given))
    try:
        with chdir(folder):
            return extract(
                runner,
                rows,
                given,
                folder / "encoded.jsonl",
                config=configuration.config,
                time_limit=TIME_LIMIT,
                task=configuration.task,
            )
    except RunnerError as error:
        if "ends with exit code" not in error.found:
            raise
        return error.found.splitlines()[0].removesuffix("; it printed last:").partition(": ")[2]


def today() -> str:
    """Return the day of a recording."""
    return datetime.now(UTC).date().isoformat()


def record(configuration: Configuration, tokenizer: str) -> None:
    """Run a trainer on the packaged rows or pairs, and write the verdict on what it makes."""
    runner, task = configuration.runner, configuration.task
    data: dict[str, Any] = {"date": today(), "environment": {}, "refused": "", "verdicts": {}, "examples": {}}
    with tempfile.TemporaryDirectory() as folder:
        rows = GivenRows.packaged(runner, oracle(tokenizer), task).rows
        made = made_by(configuration, rows, tokenizer, Path(folder))
        if isinstance(made, str):
            data |= {"refused": made, "environment": _environment(runner)}
        elif task:
            data |= judged_pairs(made.file, tokenizer, is_rated=task not in runner.tasks.pairs)
        else:
            names = [case.name for case in cases(tokenizer)]
            data |= judged(dict(zip(names, read_lines(made.file), strict=True)), tokenizer)
        if not isinstance(made, str):
            data["environment"] = dict(made.environment)
    configuration.write(configuration.kind, tokenizer, data)


def _environment(runner: Trainer) -> dict[str, str]:
    """Return the versions that a runner reports, for one whose report is lost because it refuses every row."""
    with tempfile.TemporaryDirectory() as folder:
        rows, output = Path(folder) / "rows.jsonl", Path(folder) / "encoded.jsonl"
        rows.touch()
        command = [interpreter(runner), runner.script, "--config", runner.config, "--checkpoint", folder]
        subprocess.run([*command, "--rows", rows, "--output", output], capture_output=True, check=False)
        return dict(read_lines(output)[0]["environment"])


def record_real(configuration: Configuration, tokenizer: str) -> None:
    """Run a trainer on real dialogues, and write what the audit counts."""
    rows = real_rows()
    with tempfile.TemporaryDirectory() as folder:
        made = made_by(configuration, rows, tokenizer, Path(folder))
        if isinstance(made, str):
            configuration.write("real", tokenizer, None)
            return
        # faults of the dialogues themselves are no faults of the trainer
        audit = Audit(FileRows(made.file), oracle(tokenizer), judges_texts=False)
        for _ in audit.verdicts():
            pass
    data = {
        "date": today(),
        "version": made.environment[configuration.runner.distribution],
        "rows": len(rows),
        "of": f"chatterbot-corpus {version('chatterbot-corpus')}",
        "sound": audit.states["sound"],
        "classes": dict(sorted(audit.counts.items())),
    }
    configuration.write("real", tokenizer, data)
