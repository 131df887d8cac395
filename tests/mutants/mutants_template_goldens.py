"""Goldens that are damaged, or that the library no longer keeps."""

from __future__ import annotations

import json
from typing import Any

from bench_template import recorded
from gallery import Artifact, mutant

from pytest_mistral_lora.conformance.user_goldens import rendering_checks as rendering_checks


@mutant("ML001", says="$.labels: is missing")
def _a_golden_without_labels(artifact: Artifact) -> None:
    """A key of a golden is missing."""
    del artifact["golden"]["labels"]


@mutant("ML001", says='$.note: "x"; expected no such key')
def _a_golden_with_an_unknown_key(artifact: Artifact) -> None:
    """A golden has a key that goldens do not have."""
    artifact["golden"]["note"] = "x"


@mutant("ML001", says="'other', but the file is rows-1.json")
def _a_golden_of_another_name(artifact: Artifact) -> None:
    """A golden says that it is another case than its file."""
    artifact["golden"]["case"] = "other"


@mutant("ML001", says='$.input_ids[0]: "1"; expected integer')
def _a_golden_with_texts_for_ids(artifact: Artifact) -> None:
    """The ids of a golden are texts."""
    artifact["golden"]["input_ids"] = [str(token) for token in artifact["golden"]["input_ids"]]


@mutant("ML001", says="messages[0].role: 'bot'")
def _a_golden_without_a_row(artifact: Artifact) -> None:
    """The row of a golden is none."""
    artifact["golden"]["row"] = {"messages": [{"role": "bot"}]}


@mutant("ML001", says="differ from what the spans say")
def _a_golden_with_shifted_labels(artifact: Artifact) -> None:
    """The labels of a golden are shifted by one."""
    artifact["golden"]["labels"] = [-100, *artifact["golden"]["labels"][:-1]]


@mutant("ML001", says="they do not partition input_ids")
def _a_golden_with_a_hole(artifact: Artifact) -> None:
    """A span of a golden is missing."""
    del artifact["golden"]["spans"][2]


@mutant("ML001", says="the assistant's text is")
def _a_golden_with_another_answer(artifact: Artifact) -> None:
    """The ids of a golden hold another answer than its row."""
    artifact["golden"]["input_ids"] = recorded(_saying("Something else."))["input_ids"]
    for name in ("labels", "spans"):
        artifact["golden"][name] = recorded(_saying("Something else."))[name]


def _saying(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]}


@mutant("ML001", says="rows-1.json")
def _a_golden_that_is_cut_off(artifact: Artifact) -> None:
    """The file of a golden is cut off."""
    artifact["golden"] = json.dumps(artifact["golden"])[:100]


@mutant("ML002")
def _an_id_has_moved(artifact: Artifact) -> None:
    """One id is not the one that was recorded."""
    artifact["golden"]["input_ids"][3] += 1


@mutant("ML003")
def _a_label_has_moved(artifact: Artifact) -> None:
    """EOS carried no loss when the golden was recorded."""
    artifact["golden"]["spans"][-1]["supervised"] = False
    artifact["golden"]["labels"][-1] = -100


@mutant("ML005")
def _a_deviation_that_was_not_recorded(artifact: Artifact) -> None:
    """The template does what it did not do when the golden was recorded."""
    artifact["rows"] = [_saying("A space follows. ")]
    artifact["golden"] = recorded(artifact["rows"][0]) | {"deviations": []}


@mutant("ML007", says="the row is not the one that was recorded")
def _a_row_that_has_changed(artifact: Artifact) -> None:
    """The question of a row is another than when it was recorded."""
    artifact["rows"][0]["messages"][0]["content"] += "?"


@mutant("ML007", says="the row is not recorded")
def _a_row_that_is_not_recorded(artifact: Artifact) -> None:
    """A row was added to the folder of goldens and is not recorded."""
    artifact["rows"].append(_saying("Another."))
