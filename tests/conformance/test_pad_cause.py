"""A pad token that is EOS is the one cause of the EOS that a collator has masked by its id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import write_cut

from pytest_mistral_lora import Row, audit
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

Record = dict[str, Any]
SAID = [
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": f"It is {n}."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": f"Now it is {n + 1}."},
    ]
    for n in range(3)
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mistral's file and those of transformers, of few words: each audit loads it."""
    folder = tmp_path_factory.mktemp("sound")
    CheckpointTokenizer(write_cut(folder, words=2000)).fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("pads") / "checkpoint"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "</s>"}))
    return folder


def encoded(folder: Path, has_messages: bool = True) -> list[Record]:
    """Return rows whose EOS are masked, padded with EOS to one length."""
    oracle = Oracle(folder / "tekken.json")
    records = []
    for said in SAID:
        made = oracle.encode(Row.from_dict({"messages": said}))
        labels = [-100 if token == 2 else label for token, label in zip(made.input_ids, made.labels, strict=True)]
        pad, count = 60 - len(labels), len(labels)
        record = {"input_ids": [*made.input_ids, *[2] * pad], "labels": [*labels, *[-100] * pad]}
        record["attention_mask"] = [1] * count + [0] * pad
        records.append(record | ({"messages": said} if has_messages else {}))
    return records


@pytest.mark.parametrize("has_messages", [True, False])
def test_masked_eos_are_one_finding_about_the_pad_token(has_messages: bool, folder: Path) -> None:
    verdict = audit(encoded(folder, has_messages), tokenizer=folder)
    [finding] = verdict.findings
    assert (finding.rule, str(finding.place), finding.covers) == ("ML204", str(folder), (("ML546", 3),))
    assert "encode the rows again" in finding.next_step


def test_a_fault_beside_the_masked_eos_stays(folder: Path) -> None:
    records = encoded(folder)
    records[1]["labels"][2] = records[1]["input_ids"][2]  # a token of the prompt
    first, *others = audit(records, tokenizer=folder).findings
    assert (first.rule, first.covers) == ("ML204", (("ML546", 3),))
    assert [(finding.rule, str(finding.place)) for finding in others] == [("ML547", "rows[1]")]


def test_an_eos_that_is_masked_alone_has_another_cause(folder: Path) -> None:
    records = encoded(folder)
    for record in records:
        eos = record["input_ids"].index(2)
        record["labels"][eos] = 2
    assert {finding.rule for finding in audit(records, tokenizer=folder).findings} == {"ML546"}


def test_a_pad_token_that_is_no_eos_masks_none(sound: Path) -> None:
    assert {finding.rule for finding in audit(encoded(sound), tokenizer=sound).findings} == {"ML546"}


def test_sound_rows_that_are_padded_with_eos_have_no_finding(folder: Path) -> None:
    records = encoded(folder)
    for record in records:
        real = [n for n, kept in enumerate(record["attention_mask"]) if kept]
        for n in real:
            if record["input_ids"][n] == 2:
                record["labels"][n] = 2
    assert audit(records, tokenizer=folder).findings == ()
