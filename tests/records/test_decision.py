from __future__ import annotations

import json
from typing import Any

import pytest
from manifests import COMMIT, SHA, adapter, merged

from pytest_mistral_lora.records.notes import decision_text


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]


def test_it_has_the_parts_of_a_decision_record() -> None:
    text = decision_text(adapter())
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Fine-tune mistralai/Mistral-7B-v0.3 with LoRA on train.jsonl",
        "## Why",
        "## Context",
        "## Decision",
        "## Supervised tokens",
        "## Evaluation",
        "## Consequences",
        "## Reproduce",
    ]


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "revision", "c" * 40),
        (None, "base_weights_sha256", "d" * 64),
        (None, "dataset_sha256", "e" * 64),
        (None, "seed", 987654),
        ("tokenizer", "sha256", "f" * 64),
        ("template", "sha256", "1" * 64),
        ("lora", "r", 987654),
        ("training", "learning_rate", 0.0123),
        ("lora", "modules_to_save", ["lm_head"]),
        ("training", "order_seed", 987654),
        ("training", "quantization", "nf4"),
        ("training", "kernels", "liger"),
        ("training", "skipped_steps", 987654),
        ("training", "schedule", {"name": "linear", "warmup_steps": 987, "total_steps": 654}),
        ("masking", "supervised_tokens", 37),
        ("environment", "packages", {"torch": "9.8.7"}),
    ],
)
def test_each_fact_of_the_manifest_is_in_the_text(part: str | None, key: str, value: Any) -> None:
    manifest = adapter()
    before = decision_text(manifest)
    (manifest[part] if part else manifest)[key] = value
    after = decision_text(manifest)
    for leaf in leaves(value):
        assert str(leaf) not in before
        assert str(leaf) in after


def test_evaluation_results_are_shown_with_their_commands() -> None:
    manifest = adapter()
    manifest["evaluation"] = [{"command": "measure --it", "results": {"loss | nats": 0.25, "verdict": "equal"}}]
    text = decision_text(manifest)
    assert "`measure --it`" in text
    assert "0.25" in text
    assert '"equal"' in text


def test_a_bar_in_a_name_ends_no_cell() -> None:
    manifest = adapter()
    manifest["dataset"]["files"][0]["path"] = "a|b.jsonl"
    manifest["evaluation"] = [{"command": "measure", "results": {"loss | nats": "x|y"}}]
    rows = [line for line in decision_text(manifest).splitlines() if line.startswith("| ") and line != "| | |"]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}


def test_the_recipe_in_it_is_complete() -> None:
    text = decision_text(adapter())
    assert json.loads(text.rpartition("```json")[2].partition("```")[0]) == adapter()["recipe"]
    assert text.endswith("```\n")


def test_a_merged_model_is_said_to_be_one() -> None:
    text = decision_text({**adapter(), **merged()})
    assert "Status: trained and merged" in text
    assert "This folder holds a whole model, merged in float32" in text
    assert f"SHA-256 `{SHA}`" in text
    assert "This folder holds no model" in decision_text(adapter())
    assert "Deployed" not in text + decision_text(adapter())


def test_the_code_of_the_run_is_named() -> None:
    manifest = adapter()
    assert f"git checkout {COMMIT}\n" in decision_text(manifest)
    manifest["environment"]["code"]["dirty"] = True
    assert f"git checkout {COMMIT}  # plus uncommitted changes\n" in decision_text(manifest)
    manifest["environment"]["code"] = None
    assert "git checkout" not in decision_text(manifest)


def test_the_same_run_gives_the_same_text() -> None:
    assert decision_text(adapter()) == decision_text(adapter())
