"""The page of published recipes is made of recorded facts, and its verdicts are those of the rules."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import published_recipes_page
import pytest
import yaml
from recipes_of_trainers import recordings, rows
from recipes_of_trainers.judging import Judged, judge_recipe
from recipes_of_trainers.reading import keys_of
from recipes_of_trainers.runs import PLAIN, key_of, read_runs
from recipes_of_trainers.sources import SOURCES, Source
from recipes_of_trainers.trainers import READERS

from pytest_mistral_lora.cli import main

pytestmark = pytest.mark.of_field
PAGE = published_recipes_page.PAGE.read_text(encoding="utf-8")
AXOLOTL, NEMO, UNSLOTH = "axolotl-ai-cloud/axolotl", "NVIDIA-NeMo/Automodel", "unslothai/notebooks"
LLAMAFACTORY = "hiyouga/LLaMA-Factory"
SMALL_4 = "examples/mistral4/qlora-text.yml"
DEVSTRAL = "examples/llm_finetune/devstral/devstral2_small_2512_squad_peft.yaml"
MINISTRAL = "examples/llm_finetune/mistral/ministral3_3b_squad_peft.yaml"
MAGISTRAL = "nb/Magistral_(24B)-Reasoning-Conversational.ipynb"
VISION = "examples/ministral3/vision/ministral3-3b-vision-qlora.yml"
VOXTRAL = "examples/voxtral/voxtral-mini-qlora.yml"
THINK = "examples/magistral/think/magistral-small-think-qlora.yaml"


def _facts(repository: str) -> tuple[Source, dict[str, Any]]:
    return next((source, facts) for source, facts in recordings.read() if source.repository == repository)


def _recipe(repository: str, path: str) -> dict[str, Any]:
    """Return the facts of a recipe, by its path or by the template that it registers."""
    _, facts = _facts(repository)
    found = (recipe for recipe in facts["recipes"] if path in (recipe["path"], _template(recipe)))
    return deepcopy(next(found))


def _template(recipe: Mapping[str, Any]) -> str:
    return str(recipe["keys"].get("template", {}).get("value", ""))


def _judged(repository: str, recipe: Mapping[str, Any]) -> Judged:
    return judge_recipe(*_facts(repository), recipe)


@pytest.mark.parametrize(
    ("repository", "path", "rule", "key"),
    [
        (AXOLOTL, SMALL_4, "ML451", "lora_target_modules"),
        (AXOLOTL, VOXTRAL, "ML409", "lora_target_modules"),
        (AXOLOTL, THINK, "ML533", "datasets[0].type"),
        (NEMO, DEVSTRAL, "ML450", "peft.match_all_linear"),
        (UNSLOTH, MAGISTRAL, "ML543", "SFTConfig(dataset_text_field)"),
        (LLAMAFACTORY, "ministral3", "ML526", "format_system"),
    ],
)
def test_a_known_fault_of_a_recipe_is_found_at_its_line(repository: str, path: str, rule: str, key: str) -> None:
    recipe = _recipe(repository, path)
    found = {fault.rule: fault for fault in _judged(repository, recipe).errors}
    assert found[rule].key == recipe["keys"][key]
    place = found[rule].key.get("path", recipe["path"])
    assert re.search(rf"\| \[{rule}\]\(.*{re.escape(str(found[rule].key['line']))}\]\(https://github\.com/", PAGE)
    assert place.rpartition("/")[2].replace("_", "\\_") in PAGE


@pytest.mark.parametrize(
    ("repository", "path"),
    [(NEMO, MINISTRAL), (AXOLOTL, VISION), (AXOLOTL, "examples/devstral/devstral-small-qlora.yml")],
)
def test_a_sound_recipe_has_no_finding(repository: str, path: str) -> None:
    judged = _judged(repository, _recipe(repository, path))
    assert judged.verdict == "sound"
    assert not judged.errors


def test_the_magistral_notebook_leaves_the_model_of_images_alone() -> None:
    assert "vision_tower" not in _judged(UNSLOTH, _recipe(UNSLOTH, MAGISTRAL)).layers


def test_the_fault_goes_if_the_recipe_is_mended() -> None:
    recipe = _recipe(NEMO, DEVSTRAL)
    line = recipe["keys"].pop("peft.match_all_linear")["line"]
    recipe["keys"]["peft.exclude_modules"] = {"value": ["*vision_tower*", "*multi_modal_projector*"], "line": line}
    assert _judged(NEMO, recipe).verdict == "sound"
    pattern = r"model.language_model.layers.[\d]+.self_attn.(q_a|q_b|kv_b|o)_proj"
    small = _recipe(AXOLOTL, SMALL_4)
    small["keys"]["lora_target_modules"]["value"] = pattern
    assert not _judged(AXOLOTL, small).errors


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        ("ministral3", "derived-v13"),
        ("mistral", "spm-v1"),
        *(
            pytest.param(*words, marks=pytest.mark.slow)
            for words in [
                ("mistral", "spm-v3"),
                ("ministral", "tekken-240718"),
                ("mistral_small", "derived-v7"),
                ("mistral_small", "derived-v11"),
                ("mistral_small", "derived-v13"),
                ("pixtral", "tekken-240911"),
            ]
        ),
    ],
)
def test_a_layout_of_slots_gives_the_verdicts_of_the_trainer_itself(template: str, tokenizer: str) -> None:
    meaning = READERS["slots"](_recipe(LLAMAFACTORY, template)["keys"], "")
    assert isinstance(meaning.rows, rows.Layout)
    recorded = read_runs()[key_of(LLAMAFACTORY, template, tokenizer)]["rows"]
    made = rows.judged_layout(meaning.rows, tokenizer)
    assert {name: list(rules) for name, rules in made.items()} == {name: recorded[name] for name in PLAIN}


def test_the_page_has_each_recorded_recipe_with_its_commit() -> None:
    for _source, facts in recordings.read():
        assert facts["commit"] in PAGE
        assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"])
        for recipe in facts["recipes"]:
            assert recipe["path"].rpartition("/")[2].replace("_", "\\_") in PAGE


def test_each_source_is_recorded_and_no_text_of_it_is_stored() -> None:
    assert [source.repository for source, _ in recordings.read()] == [source.repository for source in SOURCES]
    for _source, facts in recordings.read():
        for recipe in facts["recipes"]:
            for name, key in recipe["keys"].items():
                assert isinstance(key["line"], int), name
                values = key["value"] if isinstance(key["value"], list) else [key["value"]]
                # a sentence has many words; a pattern, a path or the slot of a template has few
                assert all(len(str(value).split()) < 8 for value in values), (recipe["path"], name)


@pytest.mark.slow
def test_the_page_is_made_of_the_facts() -> None:
    assert published_recipes_page.main(["--check"]) == 0


CONFIGURATIONS = [
    (source, recipe)
    for source, facts in recordings.read()
    for recipe in facts["recipes"]
    if source.reader in ("axolotl", "handbook")
]


@pytest.mark.parametrize("verb", ["check", "stats", "import"])
def test_no_recorded_configuration_ends_in_a_traceback(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, recipe in CONFIGURATIONS:
        Path("recipe.yaml").write_text(yaml.safe_dump(_nested(recipe["keys"])), encoding="utf-8")
        words = [verb, "recipe.yaml", *(["--to", "rows.jsonl"] if verb == "import" else [])]
        assert main(words) == 2, recipe["path"]
        refusal = capsys.readouterr().err
        assert refusal.startswith("error: "), recipe["path"]
        if verb == "check" and source.reader == "axolotl":
            assert "this is a configuration of Axolotl" in refusal, recipe["path"]


def _nested(keys: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mapping that the recorded keys were read from, as far as they were recorded."""
    nested: dict[str, Any] = {}
    for name, key in keys.items():
        at: Any = nested
        *outer, last = [part for part in re.split(r"[.\[\]]+", name) if part]
        for part, following in zip(outer, [*outer, last][1:], strict=True):
            empty: Any = [] if following.isdigit() else {}
            if part.isdigit():
                at.extend({} for _ in range(int(part) + 1 - len(at)))
                at = at[int(part)]
            else:
                at = at.setdefault(part, empty)
        at[last] = key["value"]
    return nested


def test_keys_are_read_with_their_lines() -> None:
    text = "# a comment\nbase_model: m\ndatasets:\n  - path: d\n    type: chat_template\nlora:\n  names: [q, k]\n"
    assert keys_of("a.yml", text) == {
        "base_model": {"value": "m", "line": 2},
        "datasets[0].path": {"value": "d", "line": 4},
        "datasets[0].type": {"value": "chat_template", "line": 5},
        "lora.names": {"value": ["q", "k"], "line": 7},
    }
    script = "deepspeed --module x \\\n  --model m/n \\\n  --flag \\\n"
    assert keys_of("a.sh", script)["model"] == {"value": "m/n", "line": 2}


def test_keys_of_a_notebook_have_the_lines_of_its_file() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["train(wrong = 1)\n"]},
        {
            "cell_type": "code",
            "source": ["!pip install x\n", "name = 'm'\n", "model = load(name,\n", "    rank = 8)\n"],
        },
        {"cell_type": "code", "source": ["if False:\n", "    load(rank = 9)"]},
        {"cell_type": "code", "source": "a = 1\nsave(to = 'x')"},
    ]
    text = json.dumps({"cells": cells}, indent=1)
    found = keys_of("a.ipynb", text)
    lines = text.split("\n")
    assert "train(wrong)" not in found
    assert found["load"]["value"] == "m"
    assert found["load(rank)"]["value"] == 8
    assert "rank = 8" in lines[found["load(rank)"]["line"] - 1]
    assert "save(to" in lines[found["save(to)"]["line"] - 1]


def test_recipes_are_recorded_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    example = checkout / "examples" / "mistral" / "lora.yml"
    example.parent.mkdir(parents=True)
    example.write_text("# about\nbase_model: mistralai/Mistral-7B-v0.1\nadapter: lora\nwandb_name: mine\n", "utf-8")
    (checkout / "examples" / "mistral" / "README.md").write_text("base_model: none\n", "utf-8")
    own = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*own, "commit", "-qm", "One"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    monkeypatch.setattr(recordings, "FOLDER", tmp_path / "facts")
    file = recordings.record(AXOLOTL, checkout, "2026-11-30")
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert facts["recipes"] == [
        {
            "path": "examples/mistral/lora.yml",
            "keys": {
                "base_model": {"value": "mistralai/Mistral-7B-v0.1", "line": 2},
                "adapter": {"value": "lora", "line": 3},
            },
        }
    ]
    assert re.fullmatch(r"[0-9a-f]{40}", facts["commit"])
