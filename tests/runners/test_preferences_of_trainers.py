"""What other trainers make of pairs and rated answers. Left out, with the reason, where they have no environment."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from preference_records import Data
from preference_rows import EMPTY, ROWS, SIDES, rated

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.runners import TRAINERS, Environment

Faults = dict[tuple[str, str], set[str]]
"""The rules that are found, by the title of a pair and the side; a pair that is left out has no side."""

TITLED = {**ROWS, "empty-answer": EMPTY}


def on_both(rule: str, *titles: str) -> Faults:
    return {(title, side): {rule} for title in titles for side in SIDES}


OF_TEXT: Faults = {
    **on_both("ML523", "hostile-prompt"),
    ("hostile-answer", "chosen"): {"ML523", "ML534", "ML567"},
    ("trailing-spaces", "chosen"): {"ML529"},
    ("empty-answer", "rejected"): {"ML567"},
}
"""What a trainer that encodes rendered text makes of texts."""

LLAMAFACTORY: Faults = {
    **OF_TEXT,
    # into the first turn, as its templates put the system prompt
    **on_both("ML526", "system-multi-turn"),
    **on_both("ML530", "tool-call", "tool-arguments", "tool-result-in-prompt"),
}

_TOOLS = ("tool-call", "tool-arguments", "tool-result-in-prompt", "tool-result-in-answer")
_TEXTS = (
    "single",
    "equal-beginnings",
    "beginning-of-the-other",
    "digits",
    "newlines",
    "scripts",
    "long-prompt",
    "long-answers",
)

MS_SWIFT: Faults = {
    # its default system prompt, in every first turn
    **on_both("ML527", *_TEXTS, "trailing-spaces", "hostile-answer"),
    **on_both("ML534", "system"),
    **{("multi-turn", side): {"ML521", "ML527", "ML528"} for side in SIDES},
    **{("system-multi-turn", side): {"ML521", "ML526", "ML527", "ML528"} for side in SIDES},
    # where all texts are the same, the space that is missing passes for a turn
    ("repeated-text", "chosen"): {"ML521", "ML527", "ML533"},
    ("repeated-text", "rejected"): {"ML521", "ML527", "ML528"},
    **{("hostile-prompt", side): {"ML523", "ML534"} for side in SIDES},
    ("hostile-answer", "chosen"): {"ML527", "ML534", "ML567"},
    ("trailing-spaces", "chosen"): {"ML527", "ML529"},
    ("empty-answer", "chosen"): {"ML527"},
    ("empty-answer", "rejected"): {"ML567"},
}

AXOLOTL: Faults = {
    **OF_TEXT,
    **{(title, ""): {"ML502"} for title in (*_TOOLS, "empty-answer")},
}
del AXOLOTL["empty-answer", "rejected"]


@dataclass(frozen=True)
class Case:
    """A run of a trainer on all rows.

    Attributes:
        runner: The trainer.
        task: Its command; rated answers are given to the one of KTO, and pairs to the others.
        tokenizer: The tokenizer.
        faults: The faults of the rows.
        settings: What is set in the default configuration.
    """

    runner: str
    task: str
    tokenizer: str
    faults: Faults
    settings: Data = field(default_factory=dict)


CASES = [
    Case("llamafactory", "dpo", "spm-v3", {**LLAMAFACTORY, ("tool-result-in-answer", ""): {"ML502"}}),
    Case("llamafactory", "kto", "spm-v3", {**LLAMAFACTORY, **on_both("ML530", "tool-result-in-answer")}),
    Case(
        "llamafactory",
        "dpo",
        "tekken-240911",
        {**LLAMAFACTORY, ("tool-result-in-answer", ""): {"ML502"}},
        {"template": "ministral"},
    ),
    # without `agent_template`, it takes no tools
    Case("ms-swift", "dpo", "spm-v3", {**MS_SWIFT, **{(title, ""): {"ML502"} for title in _TOOLS}}),
    Case("ms-swift", "kto", "spm-v3", {**MS_SWIFT, **on_both("ML502", *_TOOLS)}),
    # the template of the checkpoint: right ids, and no labels that would be on the prompt, too
    Case(
        "ms-swift",
        "rm",
        "tekken-240911",
        {
            **on_both("ML523", "hostile-prompt"),
            ("hostile-answer", "chosen"): {"ML523", "ML534"},
            ("trailing-spaces", "chosen"): {"ML529"},
            ("tool-call", "chosen"): {"ML530", "ML553"},
            **{("tool-arguments", side): {"ML530", "ML553"} for side in SIDES},
            **{(title, ""): {"ML502"} for title in ("empty-answer", "tool-result-in-prompt", "tool-result-in-answer")},
        },
        {"model_type": "mistral_nemo", "system": "", "agent_template": "mistral", "template_backend": "jinja"},
    ),
    # its templates get no calls, and an empty answer ends it
    Case("axolotl", "dpo", "tekken-240911", AXOLOTL),
    Case("axolotl", "orpo", "spm-v3", AXOLOTL),
    # by hand, without a template: one question, and a last `</s>` that ends the answer
    Case(
        "axolotl",
        "kto",
        "spm-v3",
        {
            **OF_TEXT,
            **on_both("ML502", "multi-turn", "system-multi-turn", "repeated-text", *_TOOLS),
            # the format has no place for it
            **on_both("ML525", "system"),
            ("hostile-answer", "chosen"): {"ML534", "ML567"},
        },
    ),
    # without a type, TRL gives rows to the template, and tools, too
    Case(
        "axolotl",
        "kto",
        "tekken-240911",
        {**OF_TEXT, ("tool-result-in-answer", "chosen"): {"ML547"}, ("empty-answer", "rejected"): {"ML502"}},
        {
            "datasets": [{"path": "rows.jsonl"}],
            "chat_template": "tokenizer_default",
            "skip_prepare_dataset": True,
        },
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.runner}-{case.task}-{case.tokenizer}")
def test_the_faults_of_a_trainer_are_found_and_its_sound_rows_are_sound(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = TRAINERS[case.runner]
    if Environment(runner).state != "ready":
        pytest.skip(f"{runner.title} has no environment here; mistral-lora runner setup {runner.name}")
    rows = {(title, ""): row for title, row in TITLED.items()}
    if case.task in runner.tasks.rated:
        rows = {
            (title, side): row for title, pair in TITLED.items() for side, row in zip(SIDES, rated(pair), strict=True)
        }
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    default = runner.default_config(case.task)
    settings = {**yaml.safe_load(default.read_text()), **case.settings}
    if "dataset_dir" in settings:
        settings["dataset_dir"] = str(default.parent / settings["dataset_dir"])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = ["--runner", case.runner, "--task", case.task, "--config", str(config), "--tokenizer", case.tokenizer]
    assert main(["check", *words, "--dataset", str(file), "--output-format=jsonl"]) == 1
    places = {f"{file}:{number}": key for number, key in enumerate(rows, 1)}
    found: Faults = defaultdict(set)
    for finding in map(json.loads, capsys.readouterr().out.splitlines()[:-1]):
        place, _, side = finding["place"].partition(", ")
        if place in places:
            title, side_of_row = places[place]
            found[title, side_of_row or side].add(finding["rule"])
    assert found == case.faults
