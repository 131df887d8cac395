"""The mutants of texts, tools, answers and repeats: as chat rows, ids with messages, ids alone, batches of a guard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_dataset as bench
import pytest
from gallery import Mutant, mutants
from mistral_common.exceptions import MistralCommonException
from preference_records import answer_ids
from sampling import sampled_case

from pytest_mistral_lora.chat.kinds.fim import parse_fim_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.row_source import RowSource
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.cases import OF_ENCODED_ROWS
from pytest_mistral_lora.conformance.dataset.checks import dataset_results
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.row_pass import LOST_IN_IDS
from pytest_mistral_lora.conformance.targets import DatasetTarget, Target
from pytest_mistral_lora.errors import OracleRejection, RowError
from pytest_mistral_lora.formats.row_sources import FileRows, rows_source

pytestmark = pytest.mark.gallery

Data = dict[str, Any]

OBSERVED = frozenset(rule.id for case in OF_ENCODED_ROWS for rule in RULES.of("dataset", case))
"""The rules that see the conversations of every source."""
SAID_BY_IDS: Mapping[str, str] = {
    "ML606": "labels of a template are those of the ids: ML541 to ML551",
    "ML613": "the ids show whether a text became a control token: ML523, and else ML612",
    "ML656": "ids of an answer without a text are ML567",
}
"""Rules of chat rows that encoded rows are judged by in their ids, each with what is judged."""
LOST_IN_PART: Mapping[str, str] = {
    "ML619": "ids have the arguments as mistral-common spells them: a key that is there twice is there once",
    "ML621": "ids of calls and names of results are not in the ids of each version",
    "ML643": "ids have no schema of the answer, and before v7 the system prompt is a part of the user's text",
    "ML646": "before v7 the system prompt is a part of the user's text",
    "ML649": "the ids of U+2581 are those of a space, which is ML528 or ML529 at the end of an answer",
    "ML651": "ids have neither the schema of the answer nor strict",
    "ML663": "before v7 mistral-common itself writes the system prompt into a text of the user",
    "ML668": "beside ids is what a trainer keeps, such as `label`",
    "ML669": "beside ids is what a trainer keeps",
}
"""Rules that see conversations that are read back from ids, but not each fault: each with what the ids do not have."""
OF_WHOLE_FILES = frozenset(
    [
        "ML608",
        "ML609",
        "ML624",
        "ML626",
        "ML628",
        "ML630",
        "ML636",
        "ML637",
        "ML638",
        "ML639",
        "ML643",
        "ML644",
        "ML645",
        "ML646",
        "ML647",
        "ML658",
        "ML659",
        "ML660",
        *(f"ML{number}" for number in range(661, 669)),
        "ML671",
        "ML672",
        "ML673",
        "ML674",
    ]
)
"""Rules that only all rows of a file show: they do not fire on a sample, such as the batches of a guard.

Those that are errors of many rows have a note for one row, which fires there: `texts.SIGNS`.
"""
MUTANTS = [one for one in mutants(bench) if one.fires & OBSERVED]
_EVERY = 6
CASES = [
    sampled_case(one, name=one.name, is_kept=not number % _EVERY and not one.slow) for number, one in enumerate(MUTANTS)
]


def tokenizer_of(name: str) -> CheckpointTokenizer:
    return bench.newer_tokenizer(name) if name.startswith("derived-") else bench.shared_tokenizer()


def encoded(oracle: Oracle, data: Data) -> Data:
    """Return a record with its ids, as the oracle encodes it."""
    if "messages" in data:
        made = oracle.encode({key: data[key] for key in ("messages", "tools", "response_format") if key in data})
    elif "suffix" in data:
        made = oracle.encode(parse_fim_row(data))
    else:
        ids = {}
        for name in (name for name in ("chosen", "rejected", "completion") if name in data):
            ids["prompt_ids"], ids[f"{name}_ids"] = answer_ids(oracle, data["prompt"], data[name], data.get("tools"))
        return data | ids
    return data | {"input_ids": list(made.input_ids), "labels": list(made.labels or ())}


def ids_alone(line: Data) -> Data:
    return {key: value for key, value in line.items() if key.endswith("_ids") or key in ("labels", "label")}


def rows_of(mutant: Mutant, folder: Path) -> tuple[CheckpointTokenizer, list[Data]]:
    """Return the rows of a mutant that the oracle encodes, with their ids."""
    artifact = bench.BENCH.make(folder)
    mutant.change(artifact)
    tokenizer = tokenizer_of(artifact["tokenizer"])
    lines = []
    for row in artifact["rows"]:
        if isinstance(row, dict):
            try:
                lines.append(encoded(tokenizer.oracle, row))
            except (OracleRejection, RowError, MistralCommonException):
                continue  # no row that could have ids
    return tokenizer, lines


def write(folder: Path, lines: Sequence[Data], name: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def found(rows: RowSource, oracle: Oracle) -> set[str]:
    return {finding.rule for verdict in Audit(rows, oracle).verdicts() for finding in verdict.findings}


def of_target(target: DatasetTarget) -> set[str]:
    return {finding.rule for result in dataset_results(target).values() for finding in result.findings}


def without_ids(line: Data) -> Data:
    return {key: value for key, value in line.items() if not key.endswith("_ids") and key != "labels"}


@pytest.mark.parametrize("mutant", CASES)
def test_a_rule_on_rows_sees_each_source_or_is_listed(mutant: Mutant, tmp_path: Path) -> None:
    tokenizer, lines = rows_of(mutant, tmp_path)
    messages = [without_ids(line) for line in lines]
    judge, chat_rows = Target.of_loaded(tokenizer), write(tmp_path, messages, "chat.jsonl")
    of_file = of_target(DatasetTarget("chat.jsonl", chat_rows, judge=judge))
    assert of_target(DatasetTarget("rows", judge=judge, source=rows_source(messages))) == of_file
    of_chat_rows = of_file & OBSERVED
    alone = [ids_alone(line) for line in lines]
    oracle, judged_by_ids = tokenizer.oracle, SAID_BY_IDS.keys()
    beside = found(FileRows(write(tmp_path, lines, "beside.jsonl")), oracle)
    assert found(rows_source(lines), oracle) == beside
    assert of_chat_rows - beside <= judged_by_ids
    lost = judged_by_ids | LOST_IN_IDS.keys() | LOST_IN_PART.keys()
    file = write(tmp_path, alone, "alone.jsonl")
    of_ids = found(FileRows(file), oracle)
    assert found(rows_source(alone), oracle) == of_ids
    assert of_chat_rows - of_ids <= lost
    of_guard = found(FileRows(file, is_sample=True), oracle)
    assert of_chat_rows - of_guard <= lost | OF_WHOLE_FILES
    # a guard has the rows with messages, too
    assert not of_guard & OF_WHOLE_FILES - {"ML628", "ML629"}
