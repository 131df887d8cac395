from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from derived_tekken import DERIVED, derived_tokenizer

from pytest_mistral_lora.chat.compare import compare
from pytest_mistral_lora.chat.deviations import DEVIATIONS, Deviation
from pytest_mistral_lora.chat.oracle import VERSION, shipped_tokenizer
from pytest_mistral_lora.chat.template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.training.recipe import Recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(version("transformers") < "5", reason="the pages say what mutants do under the newest libraries")
@pytest.mark.parametrize("script", ["write_docs.py"])
def test_pages_and_goldens_are_what_their_scripts_write(script: str) -> None:
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout) == (0, "")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, tuple[CheckpointTokenizer, ChatTemplate]]:
    names = {deviation.tokenizer for deviation in DEVIATIONS}
    loaded = {name: CheckpointTokenizer(path_of(name)) for name in names}
    return {name: (tokenizer, ChatTemplate(tokenizer.fast)) for name, tokenizer in loaded.items()}


def path_of(name: str) -> Path:
    return derived_tokenizer(name) if name in DERIVED else shipped_tokenizer(name)


@pytest.mark.parametrize("deviation", DEVIATIONS, ids=lambda deviation: deviation.id)
def test_the_example_of_a_deviation_shows_it_and_nothing_else(
    deviation: Deviation, tokenizers: dict[str, tuple[CheckpointTokenizer, ChatTemplate]]
) -> None:
    tokenizer, template = tokenizers[deviation.tokenizer]
    oracle = tokenizer.oracle
    assert deviation.applies(version=oracle.version, kind=oracle.kind, mistral_common=VERSION)
    comparison = compare(deviation.example, oracle, template)
    assert (comparison.deviations, comparison.unexplained) == ((deviation.id,), "")
    assert not comparison.equal


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/bridges.md", "examples/accelerate/README.md"])
def test_every_key_that_a_page_names_is_one_of_a_recipe(page: str) -> None:
    named = set(re.findall(r"`(base|data|lora|training|evaluation)\.(\w+)", (ROOT / page).read_text(encoding="utf-8")))
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    wrong = [f"{section}.{key}" for section, key in named if key not in sections[section].model_fields]
    # the manifest's section of the same name
    assert set(wrong) <= {"training.memory_relief"}
