"""The chat templates of v11 and v13, on files derived from a shipped vocabulary."""

from __future__ import annotations

import pytest
from converted import converted_tokenizer
from hypothesis import given, settings

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.strategies import tool_rows


@pytest.fixture(scope="module")
def newer_template(newer_name: str) -> ChatTemplate:
    return ChatTemplate(converted_tokenizer(newer_name).fast)


def test_packaged_rows_differ_by_named_deviations_only(newer_oracle: Oracle, newer_template: ChatTemplate) -> None:
    for case in filter(lambda case: case.fits(newer_oracle), packaged_cases()):
        comparison = compare(case.row, newer_oracle, newer_template)
        assert comparison.unexplained == "", case.name
        if comparison.equal and comparison.template and comparison.template.labels is not None:
            assert comparison.template.labels == comparison.oracle.labels, case.name


def test_arguments_that_are_pasted_are_predicted(newer_oracle: Oracle, newer_template: ChatTemplate) -> None:
    case = next(case for case in packaged_cases() if case.name == "tool-arguments-string")
    comparison = compare(case.row, newer_oracle, newer_template)
    assert comparison.deviations == ("tool-arguments-as-written",)


@settings(max_examples=12)
@given(row=tool_rows())
def test_generated_tool_rows_differ_by_named_deviations_only(
    newer_oracle: Oracle, newer_template: ChatTemplate, row: dict[str, object]
) -> None:
    assert compare(row, newer_oracle, newer_template).unexplained == ""
