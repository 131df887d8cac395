"""Two processes under DDP share out the rows to answer: the answers and the files are those of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from tiny_runs import HELD_OUT, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.training.generate import record
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train

ANSWERED = 5


def files_of(output: Path) -> dict[str, bytes]:
    """Return the files of a run that do not name its machine, its number of processes, or the time."""
    own = {"manifest.json", "DECISION.md", "README.md"}
    found = (file for file in output.rglob("*") if file.is_file() and file.name not in own)
    return {str(file.relative_to(output)): file.read_bytes() for file in found}


def test_two_processes_answer_their_shares_and_write_the_files_of_one(base: Path, tmp_path: Path) -> None:
    outputs = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
        write_rows(folder / "eval.jsonl", HELD_OUT)
        data = recipe_data(
            base,
            # a row a step: the other process adds zero, so that the steps are equal bit for bit
            training={"steps": 4, "batch_size": 1, "logging_steps": 1},
            data={"eval": ["eval.jsonl"]},
            evaluation={"generations": ANSWERED, "generation_steps": 2, "max_new_tokens": 6, "checks": ["eos"]},
        )
        outputs[name] = folder / "out"
        (folder / "recipe.yaml").write_text(json.dumps(data))
        if name == "one":
            train(parse_recipe(data, folder=folder))
        else:
            script = Path(__file__).with_name("answering_processes.py")
            done = run_forked([sys.executable, script, folder / "recipe.yaml"])
            assert done.returncode == 0, done.stderr
    assert json.loads((outputs["two"] / "manifest.json").read_text())["training"]["devices"] == 2
    one, two = map(files_of, outputs.values())
    assert len([name for name in one if name.startswith("transcripts")]) == ANSWERED
    assert two == one
    for work, rounds in (("generated", 2), ("recorded", 1)):
        for rank in range(2):
            asked = (tmp_path / "two" / f"{work}-{rank}").read_text().splitlines()
            assert asked == [rows[-1][1] for rows in HELD_OUT[rank:ANSWERED:2]] * rounds


def test_answers_and_their_probabilities_are_of_one_path(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither runs under the autocast of the steps, which a saved adapter does not have."""
    found: dict[str, set[Any]] = {}

    def watched(name: str) -> None:
        sound = getattr(record, name)

        def watching(model: Any, *given: Any, **named: Any) -> Any:
            layers = [module for layer, module in model.named_modules() if layer.endswith("q_proj")]
            seen = found.setdefault(name, set())
            hooks = [
                layer.register_forward_hook(
                    lambda module, given, output: seen.add((torch.is_autocast_enabled("cpu"), output.dtype))
                )
                for layer in layers
            ]
            result = sound(model, *given, **named)
            for hook in hooks:
                hook.remove()
            return result

        monkeypatch.setattr(record, name, watching)

    for name in ("generate", "next_token_logits"):
        watched(name)
    evaluation = {"generations": 2, "generation_steps": 1, "max_new_tokens": 4}
    train(make_recipe(training={"steps": 2, "precision": "bf16"}, evaluation=evaluation))
    assert found == {name: {(False, torch.bfloat16)} for name in ("generate", "next_token_logits")}
