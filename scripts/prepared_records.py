"""The folders that trainers prepare, judged with and without messages: recorded with the trainers, and read again."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
from prepared_page import PREPARED, read_prepared
from scoreboard_records import HUB, ROOT, TIME_LIMIT, Column, cases, checkpoint, loaded, oracle, real_rows

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.runners.extract import extract

_SCRIPT = ROOT / "scripts" / "prepare_rows.py"
_MARK = "mistral_lora_row"
_NEEDS_MISTRALS_FILE = ("axolotl-mistral-common",)
"""Configurations that read Mistral's own tokenizer file."""
_NEEDS_TRAINING_TEMPLATE = ("trl-assistant-only",)
"""Configurations that need a chat template with generation blocks."""
_MOST_NAMES = 3

Verdicts = list[tuple[str, frozenset[str]]]
"""The state of each row, and the rules that it breaks."""


def record_prepared(column: Column, tokenizer: str) -> None:
    """Let a trainer prepare the packaged rows and real dialogues, and write how its folders are judged."""
    packaged = {case.name: case.row for case in cases(tokenizer)}
    real = {f"dialogue {number}": row for number, row in enumerate(real_dialogues())}
    data: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat()}
    for kind, rows in (("packaged", packaged), ("real", real)):
        data[kind] = _record(column, tokenizer, rows)
        print(f"  {kind}: {json.dumps(data[kind])}", flush=True)
    records = read_prepared()
    records.setdefault(column.name, {})[tokenizer] = data
    write_text(PREPARED, json.dumps(records, ensure_ascii=False, indent=1) + "\n")


def real_dialogues() -> list[Row]:
    """Return 250 dialogues of chatterbot-corpus, and 250 of chitchat-dataset."""
    sys.path.append(str(ROOT / "benchmarks"))
    from rows import chats

    found = real_rows()[:250]
    for chat in chats():
        turns = chat["messages"]
        messages = turns[: len(turns) // 2 * 2]
        if messages and all(message["content"] for message in messages):
            found.append(parse_row({"messages": messages}))
        if len(found) == 500:
            break
    return found


def _record(column: Column, tokenizer: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prepared-") as temporary:
        folder = Path(temporary)
        # the script has these from its environment
        os.environ |= {"PREPARED_BY": column.runner.name, "PREPARED_IN": str(folder / "kept")}
        try:
            made = extract(
                replace(column.runner, script=_SCRIPT),
                list(rows.values()),
                _checkpoint(column, tokenizer, folder / tokenizer),
                folder / "encoded.jsonl",
                config=column.config,
                time_limit=TIME_LIMIT,
            )
        except RunnerError as error:
            # killed, or not done in time: that is no verdict of the trainer on its rows
            if "ends with exit code" not in error.found:
                raise
            return {"refused": error.found.splitlines()[0].removesuffix("; it printed last:").partition(": ")[2]}
        version = made.environment[column.runner.distribution]
        return {"version": version} | compared(folder / "kept", rows, oracle(tokenizer))


def _checkpoint(column: Column, tokenizer: str, folder: Path) -> Path:
    """Return the checkpoint that a configuration is given."""
    if column.name in _NEEDS_MISTRALS_FILE:
        return checkpoint(tokenizer + HUB, folder)
    file = checkpoint(tokenizer, folder)
    if column.name not in _NEEDS_TRAINING_TEMPLATE:
        return file
    fast = loaded(file).fast
    fast.chat_template = training_template(file)
    fast.save_pretrained(folder)
    return folder


def compared(kept: Path, rows: Mapping[str, Row], judge: Oracle) -> dict[str, Any]:
    """Return how many rows of some folders have the same verdict with and without their messages.

    Args:
        kept: The folder of the folders.
        rows: The rows that the folders were made of, by name; the column `mistral_lora_row` counts them from 0.
        judge: Mistral's own tokenization.

    Returns:
        `columns` alone, if a folder has no ids. Else `rows`, `prepared`, `sound`, `same`, `other` and `not_checked`,
        which are numbers of rows, and `differences`: the number of the rows and their first names, by the rules with
        messages and those without.
    """
    names = list(rows)
    counts: Counter[str] = Counter()
    differences: dict[str, list[str]] = {}
    for folder in sorted(state.parent for state in kept.rglob("state.json")):
        prepared = datasets.load_from_disk(str(folder))
        if "input_ids" not in prepared.column_names:
            return {"columns": sorted({*prepared.column_names} - {_MARK})}
        numbers = prepared[_MARK]
        without = _verdicts_without(prepared, folder, judge)
        for number, alone, whole in zip(numbers, without, _verdicts_with(prepared, rows, judge), strict=True):
            if number < 0:
                # a row alone is given to the trainer twice, the second time without its number
                continue
            counts["prepared"] += 1
            counts["sound"] += whole[0] == "sound"
            if alone == whole and alone[0] != "not judged":
                counts["same"] += 1
                continue
            counts["not_checked" if alone[0] == "not judged" else "other"] += 1
            differences.setdefault(f"{_shown(whole)} → {_shown(alone)}", []).append(names[number])
    return {
        "rows": len(rows),
        **{key: counts[key] for key in ("prepared", "sound", "same", "other", "not_checked")},
        "differences": {key: [len(found), *found[:_MOST_NAMES]] for key, found in sorted(differences.items())},
    }


def _shown(verdict: tuple[str, frozenset[str]]) -> str:
    state, rules = verdict
    return " ".join([*([state] if state == "not judged" else []), *sorted(rules)]) or state


def _verdicts_without(prepared: datasets.Dataset, folder: Path, judge: Oracle) -> Verdicts:
    """Judge a folder without messages: the trainer's own, or a copy if it has them."""
    if "messages" not in prepared.column_names:
        return list(_verdicts(folder, judge))
    with tempfile.TemporaryDirectory(prefix="without-") as copy:
        prepared.remove_columns([name for name in ("messages", "tools") if name in prepared.column_names]).save_to_disk(
            copy
        )
        return list(_verdicts(Path(copy), judge))


def _verdicts_with(prepared: datasets.Dataset, rows: Mapping[str, Row], judge: Oracle) -> Verdicts:
    """Judge the same rows beside the messages that they were made of."""
    sources = list(rows.values())
    with tempfile.TemporaryDirectory(prefix="with-") as copy:
        file = Path(copy) / "encoded.jsonl"
        lines = [json.dumps({**row, **sources[row[_MARK]].to_json()}) for row in prepared]
        write_text(file, "".join(f"{line}\n" for line in lines))
        return list(_verdicts(file, judge))


def _verdicts(path: Path, judge: Oracle) -> Iterator[tuple[str, frozenset[str]]]:
    *of_rows, _ = Audit(FileRows(path), judge).verdicts()
    for verdict in of_rows:
        yield verdict.state, frozenset(finding.rule for finding in verdict.findings)
