"""A law that fails on a generated row shows the smallest row that breaks it, as one line to paste."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.mask.checks import checks
from pytest_mistral_lora.conformance.targets import Target

SETTINGS = Settings(30, None, "cpu", True, (), False, Path())
SMALLEST = {"messages": [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]}


class _Shouting(Oracle):
    """Writes answers with an exclamation mark."""

    def encode(self, row: Any) -> EncodedRow:
        return super().encode(_shouted(row) if isinstance(row, Row) else row)


class _OtherPrompt(Oracle):
    """Asks at inference without the beginning of the row."""

    def encode_prompt(self, row: Any) -> tuple[int, ...]:
        return super().encode_prompt(row)[1:]


def _shouted(row: Row) -> Row:
    data = row.to_json()
    for message in data["messages"]:
        # beside calls, a text is refused
        is_text = isinstance(message.get("content"), str) and not message.get("tool_calls")
        if message["role"] == "assistant" and is_text:
            message["content"] += "!"
    return parse_row(data)


def findings(
    oracle: Oracle, case: str, template: ChatTemplate | None = None, settings: Settings = SETTINGS
) -> list[Any]:
    target = Target("spm-v3")
    if template is None:
        tokenizer = type("Loaded", (), {"oracle": oracle})()
        vars(target)["tokenizer"] = tokenizer
    else:
        vars(target)["template"] = template
    [check] = [check for check in checks(target, settings) if check.case == case]
    return list(check.judge().findings)


@pytest.mark.parametrize(
    ("broken", "case", "rule"),
    [
        (_Shouting, "supervised-text-is-what-is-said", "ML109"),
        pytest.param(_Shouting, "mistral-common-agrees", "ML107", marks=pytest.mark.slow),
        pytest.param(_OtherPrompt, "prompt-is-the-beginning", "ML112", marks=pytest.mark.slow),
    ],
)
def test_a_broken_encoder_is_found_with_the_smallest_row(broken: type[Oracle], case: str, rule: str) -> None:
    [found] = findings(broken(shipped_tokenizer("spm-v3")), case)
    assert found.rule == rule
    assert json.loads(found.row) == SMALLEST
    assert "\n" not in found.row


@pytest.mark.slow
def test_a_broken_template_is_found_with_the_smallest_row_and_the_row_can_be_pasted(tmp_path: Path) -> None:
    target = Target("spm-v3")
    broken = ChatTemplate(target.tokenizer.fast, target.template.source.replace("{{- '[INST] ' }}", "{{- '[INST]' }}"))
    first, again = (
        findings(target.oracle, "template-agrees", broken),
        findings(target.oracle, "template-agrees", broken),
    )
    assert [found.rule for found in first] == ["ML004"]
    assert first == again, "the search is not the same in every run"
    assert json.loads(first[0].row) == SMALLEST
    (tmp_path / "pasted.jsonl").write_text(first[0].row + "\n", encoding="utf-8")
    assert [row.to_json() for row in read_rows(tmp_path / "pasted.jsonl")] == [SMALLEST]


@pytest.mark.slow
def test_a_wrong_generation_block_is_found_on_generated_rows() -> None:
    target = Target("spm-v3")
    answer = "{{- render_content(content=message['content'], context_name='assistant message contents') -}}"
    source = target.template.source.replace(answer, answer + "{% generation %}{% endgeneration %}")
    # ML009 needs a row whose every answer is a call: Hypothesis also draws the constants of the modules that the
    # tests before have imported, so the rows of a short search differ from run to run
    many = replace(SETTINGS, examples=100)
    found = findings(target.oracle, "template-agrees", ChatTemplate(target.tokenizer.fast, source), many)
    assert {finding.rule for finding in found} == {"ML006", "ML009"}


def test_a_verdict_that_changes_from_call_to_call_is_a_finding_and_no_traceback() -> None:
    """A tokenizer with dropout gives the same text other ids each time."""

    class Chance(Oracle):
        asked = 0

        def encode(self, row: Any) -> EncodedRow:
            Chance.asked += 1
            return super().encode(_shouted(row) if isinstance(row, Row) and Chance.asked % 7 == 0 else row)

    [found] = findings(Chance(shipped_tokenizer("spm-v3")), "mistral-common-agrees")
    assert found.rule == "ML107"
