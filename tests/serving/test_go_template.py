"""The TEMPLATE of Ollama: its prompts, rendered by Go, have the ids of mistral-common but on the rows that are named.

`ollama/prompts.json` was rendered by the package `template` of ollama/ollama (fb30760, 2026-08-21) with Go 1.27.3.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.ollama.go_template import GoTemplate, go_template, read_go_template
from pytest_mistral_lora.field.servers.ollama.modelfile_checks import plain_rows

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


@pytest.mark.parametrize(
    ("template", "texts", "actions"),
    [
        ("a {{ .X }} b", ("a ", " b"), (".X",)),
        ("a {{- .X }}\n{{- /* not this }} */ -}}\n b", ("a", "b"), (".X",)),
        ("a {{-1 }}{{ -1 -}} b", ("a ", "", "b"), ("-1", "-1")),
        ('{{- "a}}\\n" }} {{ `b\\n` }}c', ("a}}\n b\\nc",), ()),
        ("{{if  and $.System(eq $i\n$turn)}}{{end}}", ("", "", ""), ("if and $.System ( eq $i $turn )", "end")),
        (
            '{{ $m.Role }}{{ $m .Role }}{{ printf "%s" "\\x41" | json }}',
            ("",) * 4,
            ("$m.Role", "$m .Role", 'printf "%s" "\\x41" | json'),
        ),
        ('{{ "\\x41" }}', ("", ""), ('"\\x41"',)),
    ],
)
def test_a_template_is_read_as_go_reads_it(template: str, texts: tuple[str, ...], actions: tuple[str, ...]) -> None:
    assert read_go_template(template) == GoTemplate(texts, actions)


@pytest.mark.parametrize(
    "template", ["{{ .X }", "{{ .X", '{{ "a }}', "{{ .X ? }}", "{{ /* }}", "{{ '' }}", '{{ "a\nb" }}']
)
def test_what_go_does_not_read_is_refused(template: str) -> None:
    with pytest.raises(InputError):
        read_go_template(template)
