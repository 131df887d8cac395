"""The packaged goldens, and how a difference from one is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sampling import sampled

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.mask.row_laws import assistant_text_violation
from pytest_mistral_lora.conformance.targets import EMBEDDED, Target
from pytest_mistral_lora.conformance.template import checks, judge
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder, load


@pytest.mark.parametrize("name", sampled(SHIPPED, ("spm-v1", "spm-v3", "spm-v7", "tekken-240911")))
def test_every_packaged_golden_has_the_right_form(name: str) -> None:
    paths = golden_paths(goldens_folder() / "templates" / name)
    assert len(paths) >= 20
    oracle = Oracle(shipped_tokenizer(name))
    for path in paths:
        golden = load(path)
        assert golden.tokenizer["sha256"] == oracle.sha256
        assert assistant_text_violation(golden.row, golden.encoded, oracle) == "", path


def test_the_embedded_targets_are_what_is_shipped() -> None:
    assert tuple(SHIPPED) == EMBEDDED


def test_a_template_that_renders_no_row_is_not_called_equal_to_its_own_rendering(tmp_path: Path) -> None:
    target = Target("spm-v3")
    vars(target)["template"] = ChatTemplate(target.tokenizer.fast, "{{ raise_exception('no') }}")
    settings = Settings(1, None, "cpu", True, (), False, tmp_path)
    [check] = [one for one in checks(target, settings) if one.case == "apply-chat-template"]
    result = check.run()
    assert "renders none" in result.not_checked
    assert not result.findings


def test_a_difference_is_shown_token_by_token() -> None:
    target = Target("spm-v3")
    fast = target.tokenizer.fast
    vars(target)["template"] = ChatTemplate(fast, fast.chat_template.replace("{{- '[INST] ' }}", "{{- '[INST]' }}"))
    golden = load(goldens_folder() / "templates" / "spm-v3" / "single.json")
    [finding] = judge(target, golden).findings
    assert (finding.rule, str(finding.place)) == ("ML004", "spm-v3/single.json")
    assert "after [INST]: " in finding.words
    text = finding.text()
    assert ">     2  2592 '␣What'     -100       2  3963 'What'      -100" in text
    assert "recorded: mistral-common " in text
    assert "running:  mistral-common " in text
    assert json.loads(finding.row)["messages"][0]["content"] == "What is the capital of France?"
    assert finding.row in text
