"""How pairs and rated answers are written for Axolotl: the columns that the `type` of a dataset reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from pytest_mistral_lora.runners import TRAINERS

pytest.importorskip("datasets", reason="the runners' own library")

AXOLOTL = TRAINERS["axolotl"]
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Warm?"}
YES, NO = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
PAIR = {"prompt": [SYSTEM, ASKED], "chosen": YES, "rejected": NO}
RATED = {"prompt": [ASKED], "completion": YES, "label": False}

Written = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@pytest.fixture
def script(scripts: None) -> ModuleType:
    import axolotl_rows

    return axolotl_rows


@pytest.fixture
def written(script: ModuleType) -> Written:
    """Return a row as it is written for an entry of `datasets`."""

    def write(row: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = script._in_form({**row, script.MARK: 3}, dataset)
        assert made.pop(script.MARK) == 3
        return made

    return write


def test_a_pair_has_messages_and_one_message_a_side(written: Written) -> None:
    made = written(PAIR, {"type": "chat_template.default", "field_messages": "asked", "field_chosen": "good"})
    assert made == {"asked": [SYSTEM, ASKED], "good": YES[0], "rejected": NO[0]}


def test_orpo_has_a_conversation_a_side_and_the_system_prompt_beside_them(written: Written) -> None:
    made = written(PAIR, {"type": "chat_template.argilla"})
    assert made == {"system": "Be brief.", "chosen": [ASKED, *YES], "rejected": [ASKED, *NO]}
    assert written({**PAIR, "prompt": [ASKED]}, {"type": "chat_template.argilla"})["system"] == ""


def test_argilla_s_pairs_have_a_conversation_a_side(written: Written) -> None:
    made = written(PAIR, {"type": "chat_template.argilla_chat"})
    assert made == {"chosen": [SYSTEM, ASKED, *YES], "rejected": [SYSTEM, ASKED, *NO]}


def test_fields_of_one_s_own_are_texts(written: Written) -> None:
    made = written(PAIR, {"type": {"field_prompt": "question", "field_rejected": "bad"}})
    assert made == {"question": "Warm?", "system": "Be brief.", "chosen": "Yes.", "bad": "No."}
    made = written(RATED, {"type": {"field_label": "good"}})
    assert made == {"prompt": "Warm?", "system": "", "completion": "Yes.", "good": False, "label": False}


def test_without_a_type_rows_are_trl_s(written: Written) -> None:
    assert written(PAIR, {}) == PAIR
    assert written(RATED, {"type": None}) == RATED


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({**PAIR, "chosen": [*YES, *YES]}, "chat_template.default", "`chosen` has 2 messages"),
        ({**PAIR, "rejected": [*NO, *NO]}, {}, "`rejected` has 2 messages"),
        ({**RATED, "prompt": [ASKED, *YES, ASKED]}, {}, "the prompt has earlier turns or tools"),
        ({**RATED, "tools": [{}]}, {}, "the prompt has earlier turns or tools"),
    ],
)
def test_a_row_that_a_type_cannot_hold_is_refused_by_itself(
    row: dict[str, Any], kind: Any, words: str, script: ModuleType, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"datasets": [{"path": "x", "type": kind}]}))
    task = script.Task([{**row, script.MARK: 7}], tmp_path, config, tmp_path, name="kto" if "label" in row else "dpo")
    [(number, made)] = script.encode(task)
    assert (number, made["error"].partition(",")[0]) == (7, words)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [(PAIR, "chatml.intel", "pairs need chat_template.default"), (RATED, "chatml.intel", "need a type with fields")],
)
def test_a_type_of_other_rows_is_refused(row: dict[str, Any], kind: str, words: str, written: Written) -> None:
    with pytest.raises(ValueError, match=words):
        written(row, {"type": kind})


@pytest.mark.parametrize("task", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_the_default_configuration_of_each_task_is_given_our_rows(
    task: str, script: ModuleType, tmp_path: Path
) -> None:
    rows = [{**(RATED if task == "kto" else PAIR), script.MARK: 0}]
    given = script.Task(rows, Path("base"), AXOLOTL.default_config(task), tmp_path, name=task)
    made = yaml.safe_load(Path(script.configuration(given)).read_text())
    assert (made["rl"], made["base_model"]) == (task, "base")
    [dataset] = made["datasets"]
    assert dataset["ds_type"] == "json"
    assert [json.loads(line) for line in Path(dataset["path"]).read_text().splitlines()] == rows


def test_both_forms_of_a_batch_have_the_same_columns(script: ModuleType) -> None:
    made = {
        "chosen_input_ids": [1, 2],
        "chosen_labels": [-100, 2],
        "rejected_input_ids": [1, 3, 4],
        "rejected_labels": [-100, 3, 4],
    }
    of_trl = {
        "input_ids": torch.tensor([[1, 2, 0], [1, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 1, 0], [0, 1, 1]]),
    }
    assert script._columns(of_trl, "dpo") == made
    of_orpo = {key: torch.tensor([values]) for key, values in made.items()}
    of_orpo |= {f"{side}_attention_mask": torch.ones_like(of_orpo[f"{side}_labels"]) for side in ("chosen", "rejected")}
    assert script._columns(of_orpo, "orpo") == made
    rated = {name: values[:1] for name, values in of_trl.items()} | {"label": [True]}
    assert script._columns(rated, "kto") == {
        "completion_input_ids": [1, 2],
        "completion_labels": [-100, 2],
        "label": True,
    }
