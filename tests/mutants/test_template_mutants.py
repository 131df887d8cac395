"""Chat templates that are broken on purpose, each with the rule that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FINAL_EOS = "        {{- eos_token }}\n        {%- set ns.prev_tool=false %}"
SYSTEM = "{%- if (ns.index == ns.max_idx_user) and system_message != '' %}"
ANSWER = "{{- render_content(content=message['content'], context_name='assistant message contents') -}}"


def edited(old: str, new: str) -> Callable[[str], str]:
    def edit(source: str) -> str:
        assert source.count(old) == 1, f"{source.count(old)} times: {old}"
        return source.replace(old, new)

    return edit


MUTANTS = {
    "a space less after [INST]": (edited("{{- '[INST] ' }}", "{{- '[INST]' }}"), "ML004"),
    "a space more after [INST]": (edited("{{- '[INST] ' }}", "{{- '[INST]  ' }}"), "ML004"),
    "a space before [/INST]": (edited("{{- '[/INST]' }}", "{{- ' [/INST]' }}"), "ML004"),
    "no space before the answer": (edited("                {{- ' ' }}\n", ""), "ML004"),
    "dropped system prompt": (edited(SYSTEM, "{%- if false %}"), "ML004"),
    "system prompt only if the row ends with the user": (
        edited(SYSTEM, "{%- if loop.last and system_message != '' %}"),
        "ML004",
    ),
    "system prompt in the first user turn": (
        edited(SYSTEM, "{%- if ns.index == 0 and system_message != '' %}"),
        "ML004",
    ),
    "invented system prompt": (
        edited("{%- set default_system_message = '' %}", "{%- set default_system_message = 'Be helpful.' %}"),
        "ML004",
    ),
    "no EOS": (edited(FINAL_EOS, "        {%- set ns.prev_tool=false %}"), "ML004"),
    "EOS twice": (edited(FINAL_EOS, "        {{- eos_token ~ eos_token }}\n{%- set ns.prev_tool=false %}"), "ML004"),
    "BOS twice": (edited("{{- bos_token }}", "{{- bos_token ~ bos_token }}"), "ML004"),
    "no BOS": (edited("{{- bos_token }}", ""), "ML004"),
    "trimmed answer": (edited(ANSWER, "{{- message['content'] | trim -}}"), "ML004"),
    "tools beside the first user turn": (
        edited("{%- if (ns.index == ns.max_idx_user) and has_tools %}", "{%- if ns.index == 0 and has_tools %}"),
        "ML004",
    ),
    "dropped tools": (edited("{{- available_tools }}", ""), "ML004"),
    "generation block without EOS": (
        edited(
            ANSWER,
            "{% generation %}" + ANSWER + "{% endgeneration %}",
        ),
        "ML006",
    ),
    "reads the clock": (edited("{{- '[INST] ' }}", "{{- '[INST] ' ~ strftime_now('%Y') ~ ' ' }}"), "ML004"),
    "cannot be parsed": (edited("{{- bos_token }}", "{{- bos_token "), "ML004"),
}


def test_the_template_as_it_is_breaks_no_rule(pristine: Path, findings_of: Callable[..., list]) -> None:
    assert findings_of(pristine, "template") == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_template_is_caught(name: str, checkpoint: Path, findings_of: Callable[..., list]) -> None:
    edit, rule = MUTANTS[name]
    file = checkpoint / "chat_template.jinja"
    file.write_text(edit(file.read_text()))
    found = findings_of(checkpoint, "template")
    assert {finding.rule for finding in found} == {rule}
    assert all(finding.row for finding in found)


def test_a_difference_is_shown_token_by_token(checkpoint: Path, findings_of: Callable[..., list]) -> None:
    file = checkpoint / "chat_template.jinja"
    file.write_text(file.read_text().replace("{{- '[INST] ' }}", "{{- '[INST]' }}"))
    [finding] = findings_of(checkpoint, "template", "single")
    text = finding.text()
    assert text.startswith("ML004 spm-v3/single.json: the chat template differs from mistral-common: after [INST]:")
    assert "> 2    2592 '▁What'     -100   3963 'What'      -100" in text
    assert "recorded: mistral-common " in text
    assert "running:  mistral-common " in text
    assert '{"messages": [{"role": "user", "content": "What is the capital of France?"}' in text
