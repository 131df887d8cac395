"""Every class that is trained, through every step; the table of the documentation has the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
import yaml
from class_steps import CASES, HEADER, Case, ClassRun
from safetensors.torch import load_file
from sampling import sampled

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.of_field  # the run is exported, too
@pytest.mark.parametrize("case", sampled(CASES, ("wrapped-ministral3-tied",)))
def test_every_step_works_and_the_page_has_it(case: Case, tmp_path: Path) -> None:
    if not hasattr(transformers, case.architecture.text.name):
        pytest.skip(f"transformers {case.architecture.text.since} has the class")
    run = ClassRun(case, tmp_path)
    run.make_steps()
    assert run.row() in PAGE.read_text(encoding="utf-8")
    if case.architecture.is_wrapped:
        before, after = (load_file(folder / "model.safetensors") for folder in (run.base, run.merged))
        assert before.keys() == after.keys()
        changed = {name for name in before if before[name].ne(after[name]).any()}
        assert changed
        assert all(name.startswith("language_model.model.layers.") for name in changed)
        for name in ("preprocessor_config.json", "processor_config.json", "generation_config.json"):
            assert (run.base / name).read_bytes() == (run.merged / name).read_bytes()
        _other_verbs(run)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_and_a_killed_run_goes_on(case: Case, tmp_path: Path) -> None:
    if not hasattr(transformers, case.architecture.text.name):
        pytest.skip(f"transformers {case.architecture.text.since} has the class")
    run = ClassRun(case, tmp_path)
    run.write_base()
    run.make_lives()


def _other_verbs(run: ClassRun) -> None:
    """Ask the merged wrapper, compare it with itself and export its run: the layers keep their full names."""
    adapted = json.loads((run.output / "adapter_config.json").read_text())["target_modules"]
    assert adapted == json.loads((run.output / "manifest.json").read_text())["lora"]["modules"]
    assert main(["smoke", str(run.merged)]) == 0
    assert main(["verify", str(run.merged), "--base", str(run.base), "--parent", str(run.output)]) == 0
    assert main(["diff", str(run.output), str(run.output)]) == 0
    CheckpointTokenizer(run.base).fast.save_pretrained(run.base)
    recipe = json.loads((run.output / "manifest.json").read_text())["recipe"]
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output": "again"}))
    assert main(["export", str(run.folder / "recipe.yaml"), "--to", "trl", "--output", str(run.folder / "trl")]) == 0
    (exported,) = (run.folder / "trl").glob("*.yaml")
    assert sorted(yaml.safe_load(exported.read_text())["lora_target_modules"]) == adapted


def test_the_page_has_a_row_for_each_class_and_no_other() -> None:
    table = PAGE.read_text(encoding="utf-8").partition(HEADER)[2].partition("\n\n")[0]
    assert len(table.splitlines()) == len(CASES)
