"""The folders that trainers prepare, judged with and without messages: recorded with the trainers, and read again."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boards.inputs import HUB, ROOT, cases, oracle, real_rows
from boards.tables import head
from boards.trainer_runs import made_by, today
from boards.trainers import CONFIGURATIONS, NEEDS_MISTRALS_FILE, RECORDED, Configuration
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.records.files import write_text

if TYPE_CHECKING:
    import datasets

FILE = RECORDED / "prepared.json"
"""What is recorded, by configuration and tokenizer."""
_IN_TRAINER = Path(__file__).parent / "in_trainer"
_SCRIPT = "import sys\n\nsys.path[:0] = {folders!r}\nimport prepare_rows\n\nprepare_rows.main({name!r}, {kept!r})\n"
"""What runs in place of the trainer's extraction script, which gets no words or variables of ours."""
_MARK = "mistral_lora_row"
_KINDS = ("packaged", "real")
_MOST_NAMES = 3

Verdicts = list[tuple[str, frozenset[str]]]
"""The state of each row, and the rules that it breaks."""


def read() -> dict[str, dict[str, Any]]:
    """Return what is recorded, by configuration and tokenizer."""
    if not FILE.is_file():
        return {}
    records: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return records


def record(configuration: Configuration, tokenizer: str) -> None:
    """Let a trainer prepare the packaged rows and real dialogues, and write how its folders are judged."""
    packaged = {case.name: case.row for case in cases(tokenizer)}
    real = {f"dialogue {number}": row for number, row in enumerate(real_dialogues())}
    data: dict[str, Any] = {"date": today()}
    for kind, rows in zip(_KINDS, (packaged, real), strict=True):
        data[kind] = prepared_and_judged(configuration, tokenizer, rows)
        print(f"  {kind}: {json.dumps(data[kind])}", flush=True)
    records = read()
    records.setdefault(configuration.name, {})[tokenizer] = data
    write_text(FILE, json.dumps(records, ensure_ascii=False, indent=1) + "\n")


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


def prepared_and_judged(configuration: Configuration, tokenizer: str, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Let a trainer prepare rows, and return how its folders are judged; `refused` alone, if it makes nothing."""
    with tempfile.TemporaryDirectory(prefix="prepared-") as temporary:
        folder = Path(temporary)
        script, name = folder / "prepare.py", configuration.runner.name
        folders = [str(_IN_TRAINER), str(configuration.runner.script.parent)]
        write_text(script, _SCRIPT.format(folders=folders, name=name, kept=str(folder / "kept")))
        given = tokenizer + HUB if configuration.name in NEEDS_MISTRALS_FILE else tokenizer
        made = made_by(configuration, list(rows.values()), given, folder, script)
        if isinstance(made, str):
            return {"refused": made}
        version = made.environment[configuration.runner.distribution]
        return {"version": version} | compared(folder / "kept", rows, oracle(tokenizer))


def compared(kept: Path, rows: Mapping[str, Row], judge: Oracle) -> dict[str, Any]:
    """Return how many rows of some folders have the same verdict with and without their messages.

    Args:
        kept: The folder of the folders.
        rows: The rows that the folders were made of, by name; the configuration `mistral_lora_row` counts them from 0.
        judge: Mistral's own tokenization.

    Returns:
        `columns` alone, if a folder has no ids. Else `rows`, `prepared`, `sound`, `same`, `other` and `not_checked`,
        which are numbers of rows, and `differences`: the number of the rows and their first names, by the rules with
        messages and those without.
    """
    import datasets

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


def verdicts_table() -> Iterator[str]:
    """Yield how many rows have the same verdict with and without messages, for each configuration and tokenizer."""
    yield from head("configuration", "tokenizer", "rows", "prepared", "same", "other", "not read back")
    records = read()
    for configuration in CONFIGURATIONS:
        for tokenizer, data in records.get(configuration.name, {}).items():
            for kind in _KINDS:
                version = data[kind].get("version", "")
                name = f"{configuration.name} ({version})" if version else configuration.name
                yield f"| {name} | {tokenizer} | {kind} | {' | '.join(_verdict(data[kind]))} |"
    missing = [configuration.name for configuration in CONFIGURATIONS if configuration.name not in records]
    if missing:
        yield from ("", f"Not run: {', '.join(missing)}.")


def _verdict(data: dict[str, Any]) -> tuple[str, str, str, str]:
    if "refused" in data:
        return ("refused", "", "", "")
    if "columns" in data:
        return (f"no ids: {', '.join(data['columns'])}", "", "", "")
    return (f"{data['prepared']} of {data['rows']}", *(str(data[key]) for key in ("same", "other", "not_checked")))


def differences_table() -> Iterator[str]:
    """Yield the differences of the verdicts with and without messages."""
    yield from head("with messages alone", "without messages alone", "rows", "configurations", "for example")
    counts: Counter[tuple[str, str]] = Counter()
    configurations: dict[tuple[str, str], list[str]] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for configuration, tokenizers in read().items():
        for kind, data in ((kind, data[kind]) for data in tokenizers.values() for kind in _KINDS):
            for difference, (count, *examples) in data.get("differences", {}).items():
                found = _change(difference)
                counts[found] += count
                configurations.setdefault(found, []).append(configuration)
                names.setdefault(found, []).extend(examples if kind == "packaged" else [])
    for found, count in sorted(counts.items()):
        lost, new = (_linked(rules) for rules in found)
        examples = ", ".join(list(dict.fromkeys(names[found]))[:_MOST_NAMES])
        yield f"| {lost} | {new} | {count} | {', '.join(dict.fromkeys(configurations[found]))} | {examples} |"


def _change(difference: str) -> tuple[str, str]:
    """Return the rules that are found with messages alone, and those without messages alone."""
    whole, alone = (side.split() for side in difference.split(" → "))
    if "judged" in alone:
        return "any", f"not read back: {' '.join(rule for rule in alone if rule in RULES)}"
    lost = " ".join(rule for rule in whole if rule in RULES and rule not in alone)
    new = " ".join(rule for rule in alone if rule in RULES and rule not in whole)
    return lost or "none", new or "none"


def _linked(rules: str) -> str:
    return " ".join(f"[{word}](rules.md#{word.lower()})" if word in RULES else word for word in rules.split())
