"""A Modelfile's TEMPLATE: mistral-common's prompt of rows of texts in Go's template language, and how to compare it.

A prompt with tools has no exact template: Ollama hands templates a tool as JSON with its keys in another order and
without spaces, or as values whose order is lost. The template therefore names no tools, so that Ollama either refuses a
request with tools, or (from 2026 on) renders it by the Jinja template in the GGUF file.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.versions import VERSIONS
from pytest_mistral_lora.errors import InputError

# The first loop finds the user's turn that the system prompt is put into: the first one, or the last one. A turn is all
# messages of the user up to the next answer, because mistral-common joins them, across system messages.
_TURN = """\
{{- $turn := -1 }}{{ $open := false }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}{{ if not $open }}%(when)s{{ $turn = $i }}%(end)s{{ end }}{{ $open = true }}
{{- else if eq $m.Role "assistant" }}{{ $open = false }}{{ end }}
{{- end }}
{{- $open = false }}
"""
_ROWS = """\
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}
{{- if $open }}{{ "\\n\\n" }}{{ $m.Content }}
{{- else }}{{ "%(begin)s" }}%(system)s%(text)s{{ end }}{{ $open = true }}
{{- else if eq $m.Role "assistant" }}{{ if $open }}{{ "%(close)s" }}{{ $open = false }}{{ end }}
{{- %(answer)s }}{{ "</s>" }}%(other)s{{ end }}
{{- end }}
{{- if $open }}{{ "%(close)s" }}{{ end }}"""


def go_template(oracle: Oracle) -> str:
    """Return the TEMPLATE of a tokenizer; BOS is left to the server.

    Raises:
        InputError: If its version has no template that is exact on rows of texts.
    """
    facts, space = oracle.facts, " " if oracle.kind == "spm" else ""
    if facts.settings:
        known = [older.name.removeprefix("v") for older in VERSIONS if not older.settings]
        raise InputError(
            f"no Go template is known to render version {facts.name} as mistral-common does",
            place=str(oracle.path),
            expected=f"a tokenizer of version {known[0]} to {known[-1]}",
            next_step="Serve it by llama.cpp or vLLM: --to llamacpp, --to vllm.",
        )
    if facts.system_in == "first-user-turn":
        # v1, whose markers are text with spaces
        return _in_turn(first=True, begin=" [INST] ", close=" [/INST]", space="", before_answer=" ")
    if facts.system_in == "last-user-turn":
        return _in_turn(first=False, begin="[INST]", close="[/INST]", space=space, before_answer=space)
    # system prompts are separate messages
    text = _text("$m.Content", space)
    other = f'{{{{ else if eq $m.Role "system" }}}}{{{{ "[SYSTEM_PROMPT]" }}}}{text}{{{{ "[/SYSTEM_PROMPT]" }}}}'
    parts = {"begin": "[INST]", "close": "[/INST]", "system": "", "text": text, "other": other}
    parts["answer"] = text.removeprefix("{{ ").removesuffix(" }}")
    return "{{- $open := false }}\n" + _ROWS % parts


def _in_turn(*, first: bool, begin: str, close: str, space: str, before_answer: str) -> str:
    """Return the template of a version that puts the system prompt before a turn of the user."""
    when, end = ("{{ if lt $turn 0 }}", "{{ end }}") if first else ("", "")
    system = (
        f'{{{{ if and $.System (eq $i $turn) }}}}{_spaced("$.System", space)}{{{{ "\\n\\n" }}}}{{{{ $m.Content }}}}'
    )
    text = f"{{{{ else }}}}{_text('$m.Content', space)}{{{{ end }}}}"
    parts = {"begin": begin, "close": close, "system": system, "text": text, "other": ""}
    parts["answer"] = _text("$m.Content", before_answer).removeprefix("{{ ").removesuffix(" }}")
    return _TURN % {"when": when, "end": end} + _ROWS % parts


def _spaced(value: str, space: str) -> str:
    return f'{{{{ "{space}" }}}}{{{{ {value} }}}}' if space else f"{{{{ {value} }}}}"


def _text(value: str, space: str) -> str:
    # an empty text has no token, and so no space before it
    return f"{{{{ if {value} }}}}{_spaced(value, space)}{{{{ end }}}}"


_SPACES = " \t\r\n"
_BEGIN = re.compile(rf"\{{\{{(?:-(?=[{_SPACES}]))?")
_END = re.compile(rf"[{_SPACES}]*+(?:(?<=[{_SPACES}])-)?\}}\}}")
# operands that touch, such as $m.Content, are one token
_TOKEN = re.compile(
    rf"[{_SPACES}]*+(?P<token>\"(?:[^\"\\\n]|\\.)*+\"|`[^`]*+`|'(?:[^'\\\n]|\\.)++'|/\*.*?\*/|:=|[=|(),]|[-+]?[$.\w]++)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class GoTemplate:
    """A template as what it writes between its actions; white space in actions, and what a `-` eats, is no part of it.

    Attributes:
        texts: What is written before each action, and behind the last one: text, and strings between quotes.
        actions: The tokens of each other action, joined by a space, such as `if $m.Content`.
    """

    texts: tuple[str, ...]
    actions: tuple[str, ...]

    def without_tests_of_empty_texts(self) -> GoTemplate:
        """Return the template with each `{{ if .X }} {{ .X }}{{ end }}` as ` {{ .X }}`: other for empty texts alone."""
        texts, actions, at = [self.texts[0]], list[str](), 0
        while at < len(self.actions):
            value, steps = self.actions[at].removeprefix("if "), 1
            is_test = self.actions[at : at + 3] == (f"if {value}", value, "end")
            if is_test and not self.texts[at + 1].strip() and not self.texts[at + 2]:
                texts[-1] += self.texts[at + 1]
                steps = 3
            actions.append(value if steps > 1 else self.actions[at])
            at += steps
            texts.append(self.texts[at])
        return GoTemplate(tuple(texts), tuple(actions))


def read_go_template(template: str) -> GoTemplate:
    """Return the texts and actions of a template.

    Raises:
        InputError: If an action is not closed, or has what is no token of the language.
    """
    texts, actions, at, eats = [""], list[str](), 0, False
    while True:
        begin = template.find("{{", at)
        text = template[at:] if begin < 0 else template[at:begin]
        text = text.lstrip(_SPACES) if eats else text
        opened = _BEGIN.match(template, begin) if begin >= 0 else None
        texts[-1] += text.rstrip(_SPACES) if opened and opened[0].endswith("-") else text
        if opened is None:
            return GoTemplate(tuple(texts), tuple(actions))
        at, tokens = opened.end(), list[str]()
        while not (closed := _END.match(template, at)):
            token = _TOKEN.match(template, at)
            if token is None:
                near = template[begin : at + 10]
                raise InputError(f"an action is not closed, or is none: {near!r}", expected="{{ an action }}")
            at = token.end()
            tokens += [token["token"]] if not token["token"].startswith("/*") else []
        at, eats = closed.end(), closed[0].startswith(("-", *_SPACES)) and closed[0].endswith("-}}")
        if (written := _written(tokens)) is not None:
            texts[-1] += written
        else:
            actions.append(" ".join(tokens))
            texts.append("")


def _written(tokens: list[str]) -> str | None:
    """Return the text that an action writes by itself, a string or a comment; None for another action."""
    if not tokens:
        return ""
    if len(tokens) == 1 and tokens[0].startswith("`"):
        return tokens[0][1:-1]
    if len(tokens) == 1 and tokens[0].startswith('"'):
        with suppress(ValueError):  # an escape that JSON does not have
            return str(json.loads(tokens[0], strict=False))
    return None
