"""Each row format has a sample here: it is recognised, it is converted, and no other format takes it for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.formats.report import LOSSES, Report

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]

CONVERSATION = {"messages": MESSAGES}
GAP = {"prompt": "def f():", "suffix": "# end", "completion": "return 1"}

SAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "messages": ({"messages": MESSAGES}, CONVERSATION),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        CONVERSATION,
    ),
    "alpaca": (
        {"instruction": "Why?", "input": "This.", "output": "So."},
        {"messages": [{"role": "user", "content": "Why?\nThis."}, {"role": "assistant", "content": "So."}]},
    ),
    "prompt-completion": ({"prompt": "Why?", "completion": "So."}, CONVERSATION),
    "preference": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, CONVERSATION),
    "fim": (GAP, GAP),
}
"""A record of each format, and the row that it becomes."""


def test_each_format_has_a_sample() -> None:
    assert SAMPLES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("is_declared", [False, True], ids=["recognised", "declared"])
def test_a_sample_is_converted(name: str, is_declared: bool, tmp_path: Path) -> None:
    record, expected = SAMPLES[name]
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({**record, "id": 7}) + "\n", "utf-8")
    report = Report()
    [row] = convert([Source(path, Layout(name if is_declared else ""))], report, lossy=LOSSES)
    assert row == {**expected, "id": 7}
    assert [layout.format for layout in report.layouts] == [name]
    assert report.sources[0]["format"].startswith(FORMATS[name].title)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_recognised_by_the_keys_of_its_format(name: str) -> None:
    recognised = recognise(SAMPLES[name][0])
    assert recognised is not None
    assert recognised.name == name
    assert recognised.keys.items() <= FORMATS[name].keys.items()
