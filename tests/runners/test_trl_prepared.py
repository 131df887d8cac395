"""What TRL's SFTTrainer has prepared, judged without its messages. Left out, with the reason, without TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pytest_mistral_lora import training_template
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.row_pass import LOST_IN_IDS
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.records.goldens import packaged_cases

trl = pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

# TRL, PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

SPM = "spm-v3"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("prepared") / "base", shipped_tokenizer(SPM))


def is_plain(row: Row) -> bool:
    """Return whether Arrow can hold a row beside others as it is, and its ids show its texts.

    To SentencePiece, ▁ is a space: read back, it is one that should have been stripped. A text that TRL turns into the
    id of an image is not told from an image, which is not checked.
    """
    return all(
        {*message} == {"role", "content"}
        and isinstance(message["content"], str)
        and not any(letters in message["content"] for letters in ("▁", "[IMG"))
        for message in row.messages
    )


def prepared(base: Path, output: Path, **settings: Any) -> Dataset:
    """Return the rows that TRL makes of the plain packaged ones."""
    oracle = Oracle(shipped_tokenizer(SPM))
    rows = [case.row for case in packaged_cases() if case.fits(oracle) and is_plain(case.row)]
    tokenizer = BaseFolder(base).tokenizer().fast
    tokenizer.chat_template, tokenizer.pad_token = training_template(base), "<unk>"
    arguments = {"max_length": None, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    trainer = trl.SFTTrainer(
        model=str(base),
        args=trl.SFTConfig(str(output), **(arguments | settings)),
        train_dataset=Dataset.from_list([{"messages": list(row.messages)} for row in rows]),
        processing_class=tokenizer,
    )
    made: Dataset = trainer.train_dataset
    return made


def rules_of_rows(dataset: Dataset, folder: Path) -> dict[int, set[str]]:
    """Return the rules that each wrong row breaks, by its number."""
    dataset.save_to_disk(folder)
    audit = Audit(FileRows(folder), Oracle(shipped_tokenizer(SPM)))
    verdicts = [verdict for verdict in audit.verdicts() if verdict.index is not None and verdict.state != "sound"]
    return {int(verdict.index): {finding.rule for finding in verdict.findings} for verdict in verdicts}


@pytest.mark.parametrize(
    ("settings", "of_all"),
    [
        ({"assistant_only_loss": True}, set()),
        # each token is trained on
        ({"assistant_only_loss": False}, {"ML543"}),
    ],
)
def test_the_rows_that_are_wrong_are_so_without_their_messages(
    settings: dict[str, Any], of_all: set[str], base: Path, tmp_path: Path
) -> None:
    made = prepared(base, tmp_path / "out", **settings)
    whole = rules_of_rows(made, tmp_path / "whole")
    alone = rules_of_rows(made.remove_columns("messages"), tmp_path / "alone")
    assert alone.keys() == whole.keys()
    # ids that are no conversation have one class without their messages
    readable = {number for number, rules in alone.items() if "ML560" not in rules}
    shown = {number: whole[number] - LOST_IN_IDS.keys() for number in readable}
    assert {number: alone[number] for number in readable} == shown
    assert all(of_all <= alone[number] for number in readable)
    assert len(alone) < len(made) or of_all


def test_packed_rows_are_judged_conversation_by_conversation(base: Path, tmp_path: Path) -> None:
    """TRL leaves out the messages of what it packs."""
    made = prepared(base, tmp_path / "out", assistant_only_loss=True, packing=True, max_length=2048)
    assert "messages" not in made.column_names
    sound = prepared(base, tmp_path / "out", assistant_only_loss=True)
    wrong = rules_of_rows(sound.remove_columns("messages"), tmp_path / "padded")
    packed = rules_of_rows(made, tmp_path / "packed")
    # a <s> of the template at a wrong place cuts a conversation in two, of which the first has no EOS
    assert set.union(*packed.values()) - {"ML522"} == set.union(*wrong.values())
