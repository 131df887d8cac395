"""The named faults of chat templates, and templates with a system prompt of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from derived_tekken import derived_tokenizer
from each_oracle import ALL, oracle_named
from faulty_templates import FAULTY, each_message
from sampling import sampled

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.chat.templates.faults import FAULTS
from pytest_mistral_lora.chat.templates.own_prompt import OwnSystemPrompt
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.template_traits import TemplateTraits, dropped_thoughts
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.goldens import packaged_cases

PROMPT = "You answer\nin one 'short' sentence, and never in \\LaTeX."
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}]
SAMPLE = ("spm-v1", "spm-v3", "derived-v13-thinking")
"""Tokenizers that differ in where a system prompt stands, and in their kind."""
BEHIND_A_PROMPT = ("answer-stripped", "chunks-not-joined", "empty-system-prompt-written", "tools-not-rendered")
"""Faults in a system prompt, a text, an answer and the tools."""
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def _chat(*messages: dict[str, Any], **more: Any) -> Row:
    return parse_row({"messages": list(messages), **more})


QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
MORE_ROWS = (
    _chat({"role": "system", "content": " Be kind.\n"}, QUESTION, ANSWER),
    _chat(QUESTION, ANSWER, {"role": "system", "content": "Be kind."}, QUESTION, ANSWER),
    _chat(
        QUESTION,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": " noon "},
        ANSWER,
        tools=TOOLS,
    ),
)
"""Forms that no packaged row has."""


CASES = (
    "single multi-turn system two-system-messages empty-system leading-spaces hostile-user consecutive-users "
    "text-chunks tool-round-trip tool-arguments-string tool-hostile tool-call-with-text thinking thinking-open"
)


def found_in(name: str, source: str) -> set[str]:
    """Return the names of the faults that a template shows on some rows, or the words of those without a name."""
    oracle = oracle_named(name)
    template = ChatTemplate(converted_tokenizer(name).fast, source)
    found: set[str] = set()
    cases = (case for case in packaged_cases() if case.fits(oracle) and case.name in CASES.split())
    for row in (*(case.row for case in cases), *MORE_ROWS):
        try:
            comparison = compare(row, oracle, template)
        except OracleRejection:
            continue
        found |= {difference.fault or difference.found for difference in comparison.differences}
    return found


ONLY_IN = {
    "chunks-not-joined": ("spm-v3", "derived-v13-thinking"),
    "answer-stripped": ("spm-v3", "derived-v13-thinking"),
    "system-prompt-dropped": ("spm-v3", "derived-v13-thinking"),
    "empty-system-prompt-written": ("spm-v3",),  # from v7 on, mistral-common writes an empty prompt, too
    "content-beside-call-dropped": ("derived-v13-thinking",),  # up to v3, mistral-common drops it itself
    "thinking-dropped": ("derived-v13-thinking",),
    "open-thinking-closed": ("derived-v13-thinking",),
    "later-system-message-dropped": ("derived-v13-thinking",),  # up to v3, all system messages are one text
    "results-not-quoted": ("spm-v3",),
    "result-stripped": ("derived-v13-thinking",),
}


@pytest.mark.parametrize("fault", [fault.id for fault in FAULTS])
def test_a_fault_is_found_by_its_name_alone(fault: str) -> None:
    for name in ONLY_IN.get(fault, ("derived-v13-thinking",)):
        assert found_in(name, _faulty(name, fault)) == {fault}, name


@pytest.mark.parametrize(
    "fault", sampled(sorted({fault.id for fault in FAULTS} - {"system-prompt-dropped"}), BEHIND_A_PROMPT)
)
def test_the_templates_own_system_prompt_hides_no_fault(fault: str) -> None:
    """A template that drops the row's system prompt for its own has no prompt that gives way to one."""
    for name in ONLY_IN.get(fault, ("derived-v13-thinking",)):
        faults = found_in(name, _faulty(name, fault, system_prompt=PROMPT))
        assert faults == {fault} or (fault == "empty-system-prompt-written" and faults), name


def test_two_faults_of_one_row_are_two_differences() -> None:
    name, faults = "derived-v13-thinking", ("user-text-stripped", "tools-not-rendered")
    oracle = oracle_named(name)
    source = "".join(FAULTY[fault] for fault in faults) + oracle.chat_template()
    row = _chat({"role": "user", "content": " Why? "}, ANSWER, tools=TOOLS)
    comparison = compare(row, oracle, ChatTemplate(converted_tokenizer(name).fast, source))
    assert {difference.fault for difference in comparison.differences} == set(faults)


def test_a_lost_token_beside_a_named_fault_is_a_difference_of_its_own() -> None:
    name = "derived-v13-thinking"
    oracle = oracle_named(name)
    source = FAULTY["user-text-stripped"] + "{%- set eos_token = '' %}" + oracle.chat_template()
    row = _chat({"role": "user", "content": " Why? "}, ANSWER)
    comparison = compare(row, oracle, ChatTemplate(converted_tokenizer(name).fast, source))
    assert [difference.shape for difference in comparison.differences] == ["user-text-stripped", "</s> → nothing"]


@pytest.mark.parametrize("name", sampled(ALL, SAMPLE))
def test_a_row_is_compared_behind_the_templates_own_system_prompt(name: str) -> None:
    oracle = oracle_named(name)
    template = ChatTemplate(converted_tokenizer(name).fast, oracle.chat_template(system_prompt=PROMPT))
    own = template.own_prompt()
    assert own is not None
    assert (own.text, own.placeholders) == (PROMPT, [])
    behind = []
    for case in (case for case in packaged_cases() if case.fits(oracle)):
        comparison = compare(case.row, oracle, template)
        assert comparison.unexplained == "", case.name
        if comparison.own_prompt:
            behind.append(case)
            assert comparison.oracle.input_ids != oracle.encode(case.row).input_ids
    assert behind
    assert all(case.row.messages[0]["role"] != "system" for case in behind)


def test_a_template_without_a_prompt_of_its_own_has_none() -> None:
    for name in SAMPLE:
        template = ChatTemplate(converted_tokenizer(name).fast, oracle_named(name).chat_template())
        assert template.own_prompt() is None
        assert template.own_prompt(tools=True) is None


def test_a_prompt_with_a_thought_is_compared_by_chunks() -> None:
    name, prompt = "derived-v13-thinking", "Think first.\n[THINK]Your draft.[/THINK]Then answer."
    oracle = oracle_named(name)
    template = ChatTemplate(converted_tokenizer(name).fast, oracle.chat_template(system_prompt=prompt))
    own = template.own_prompt()
    assert own is not None
    assert [chunk["type"] for chunk in own.content if isinstance(chunk, dict)] == ["text", "thinking", "text"]
    comparison = compare(_chat(QUESTION, ANSWER), oracle, template)
    assert (comparison.own_prompt, comparison.equal) == (True, True)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("", False),
        (each_message("dict(role=m.role, content=m.content)"), True),
        (each_message("dict(role=m.role, content=m.content, reasoning=m.reasoning)"), False),
    ],
    ids=["healthy", "dropped", "one field is read"],
)
def test_a_thought_that_is_dropped_as_a_field_is_found(change: str, lost: bool, tmp_path: Path) -> None:
    name = "derived-v13-thinking"
    shutil.copy(derived_tokenizer(name), tmp_path / "tekken.json")
    (tmp_path / "chat_template.jinja").write_text(change + oracle_named(name).chat_template(), encoding="utf-8")
    found = list(dropped_thoughts(TemplateTraits(Target("checkpoint", tmp_path))))
    assert [(finding.rule, finding.name) for finding in found] == [("ML225", "reasoning-content-dropped")] * lost


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Today is {today}, and yesterday was {yesterday}. {today}", ["{today}", "{yesterday}"]),
        (r"Write \boxed{answer}, {{name}} or {}.", []),
        ('Answer as {"name": "x"} in JSON.', []),
        ("Hello {user_name}!", ["{user_name}"]),
    ],
)
def test_names_in_braces_are_found(text: str, names: list[str]) -> None:
    assert OwnSystemPrompt(text).placeholders == names


def _faulty(name: str, fault: str, system_prompt: str | None = None) -> str:
    source = oracle_named(name).chat_template(system_prompt=system_prompt)
    if fault != "results-not-quoted":
        return FAULTY[fault] + source
    # mistral-common's template of v3 writes a result as JSON
    quoted = "(tool_message|tojson)"
    assert source.count(quoted) == 1
    return source.replace(quoted, """'{"content": ' ~ tool_content ~ ', "call_id": "' ~ tool_id ~ '"}'""")
