"""The template proposed to TRL: its verdict is on the page, and its labels are those that transformers makes."""

from __future__ import annotations

import proposed_template
import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.assertions import assert_template_faithful
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.programs.templates import published_templates

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def proposed() -> tuple[proposed_template.Verdict, ...]:
    return proposed_template.verdicts(proposed_template.proposed_template())


def test_the_page_has_the_verdict() -> None:
    assert proposed_template.page() == proposed_template.PAGE.read_text(encoding="utf-8")


def test_each_system_prompt_is_dropped_and_nothing_else_of_a_chat() -> None:
    dropped = {verdict.case.name for verdict in proposed() if "system-prompt-dropped" in verdict.causes}
    with_prompt = {
        verdict.case.name
        for verdict in proposed()
        if any(message["role"] == "system" and message["content"] for message in verdict.case.row.messages)
    }
    assert dropped == with_prompt
    assert {"single", "multi-turn", "tool-call"} <= {verdict.case.name for verdict in proposed() if verdict.is_right}


def test_the_labels_are_those_of_the_mask_that_transformers_makes() -> None:
    tokenizer = converted_tokenizer(proposed_template.TOKENIZER).fast
    compared = 0
    for verdict in proposed():
        row, found = verdict.case.row, verdict.compared.template
        # neither transformers nor a template knows weights
        if found is None or any(message.get("weight") == 0 for message in row.messages):
            continue
        made = tokenizer.apply_chat_template(
            [dict(message) for message in row.messages],
            tools=list(row.tools) if row.tools else None,
            chat_template=proposed_template.proposed_template(),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert made["input_ids"] == list(found.input_ids), verdict.case.name
        trained = [int(label != IGNORE_INDEX) for label in found.labels or ()]
        assert made["assistant_masks"] == trained, verdict.case.name
        assert verdict.is_right or not verdict.compared.equal
        compared += 1
    assert compared >= 30


def test_it_is_for_the_checkpoints_that_the_page_names() -> None:
    [register] = [one for one in published_templates().templates if one.name == proposed_template.PUBLISHED]
    assert register.judged_with == proposed_template.TOKENIZER
    page = proposed_template.PAGE.read_text(encoding="utf-8")
    assert all(repository.removeprefix("mistralai/") in page for repository in register.repositories)


def test_an_empty_list_of_tools_is_written() -> None:
    tokenizer, template = converted_tokenizer("spm-v3").fast, proposed_template.proposed_template()
    text = tokenizer.apply_chat_template(ROW["messages"], tools=[], chat_template=template, tokenize=False)
    assert text.startswith("<s>[AVAILABLE_TOOLS] [[/AVAILABLE_TOOLS]")
    assert_template_faithful(ROW, tokenizer, template)


def test_another_published_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = proposed_template.published_source(proposed_template.PUBLISHED)
    monkeypatch.setattr(proposed_template, "published_source", lambda name: source.replace(b"[INST] ", b"[INST]"))
    with pytest.raises(ValueError, match=proposed_template.BODY_SHA256):
        proposed_template.proposed_template.__wrapped__()
