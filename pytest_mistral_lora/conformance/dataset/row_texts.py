"""The texts of a row, each with what stands around it: a sign that the row asks for, or speaks of, is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.chat.tool_arguments import argument_object

# fenced and inline code, and quotations within a line; no part is searched twice for its end
_FENCED = r"(?:```|~~~).*?(?:```|~~~|\Z)|`[^`\n]*`|<code>.*?(?:</code>|\Z)"
_QUOTED = re.compile(
    _FENCED + r"|\"[^\"\n]*\"|(?<!\w)'[^'\n]*'|\[[^\[\]\n]*\]|\u201c[^\u201c\u201d\n]*\u201d"
    r"|\u201e[^\u201c-\u201e\n]*[\u201c\u201d]|\u00ab[^\u00ab\u00bb\n]*\u00bb|\u300c[^\u300c\u300d\n]*\u300d",
    re.DOTALL,
)
_CODE = re.compile(_FENCED, re.DOTALL)

ENCODINGS = re.compile(
    r"mojibake|encod|decod|unicode|utf-?\d|u\+[0-9a-f]{4}|latin|cp125|windows-125|ascii|char(?:acter )?set|codec|garbl"
    r"|corrupt|damaged|broken|repair|restor|\bfix|clean|letters?\b|accents?\b|umlaut|kodier|zeichen|codage|encodage"
    r"|codifica|r[eé]par|corrig|korrig|кодиров|исправ|乱码|编码|文字化け|인코딩",
    re.IGNORECASE,
)
"""Texts about encodings and their repair."""

LOST_LETTERS = re.compile(r"unicode|u\+fffd|\\ufffd|encod|decod|replacement char|mojibake|utf-?\d", re.IGNORECASE)
"""Texts about U+FFFD."""

ESCAPES = re.compile(
    r"escap|unicode|utf-?\d|ascii|json|encod|decod|code ?points?|string literal|properties file", re.IGNORECASE
)
"""Texts about escapes of letters."""

MARKUP = re.compile(
    r"</|/>|html|xml|entit|escap|ampersand|encod|http|www\.|quer(?:y|ies)\b|mark ?up|\btags?\b", re.IGNORECASE
)
"""Texts about entities of HTML, or with tags."""

HTML = re.compile(
    r"html|xml|css|svg|vue|react|markdown|mark(?:ed)? ?up|code\b|script|snippet|template|\btags?\b|\bweb|\bpages?\b"
    r"|newsletter|\be-?mail|\belements?\b|heading|paragraph|\bbold\b|italic|underlin|strike|struck|hyperlink|\bbutton"
    r"|\bformat",
    re.IGNORECASE,
)
"""Texts about HTML."""

TEMPLATES = re.compile(
    r"\{[{%#]|\{\w+\}|<%|template|placeholder|variable|jinja|mustache|handlebars|liquid|f-string|format|\bcode\b|script"
    r"|snippet|langchain|macro|merge field|mail ?merge|\bletter|\be-?mails?\b|\bmails?\b|\bform\b|\bprompts?\b"
    r"|\bcards?\b|vue\b|react\b|angular|svelte|component|ansible|helm|\bsms\b|\bmessages?\b|notification|invitation"
    r"|anonymi[sz]|redact|signature|persona\b|role-?play|vorlage|modèle|plantilla|modello|шаблон|模板|テンプレート",
    re.IGNORECASE,
)
"""Texts about templates and placeholders, or with one."""

FORMATS = re.compile(
    r"alpaca|vicuna|chatml|llama|gemma|zephyr|qwen|deepseek|mistral|\bphi\b|format|template|prompt|marker|tokens?\b"
    r"|mark ?up|render|convert|translate [^\n]{0,80} to\b|json|parse|special|\btags?\b|tool[ _]call"
    r"|function call|layout|syntax|dialog|transcript|continue|role-?play|vorlage|modèle|plantilla|modello|шаблон|模板"
    r"|格式|テンプレート|形式",
    re.IGNORECASE,
)
"""Texts about the formats of prompts."""

_LOGS = re.compile(
    r"\b\d{1,2}:\d{2}(?::\d{2})?\b|\b\d{4}-\d{2}-\d{2}\b|\b(?:ERROR|WARN(?:ING)?|INFO|DEBUG|TRACE|FATAL|CRITICAL)\b"
    r"|\bSEVERE\b|\[(?:error|warn(?:ing)?|info|debug|trace|fatal|\w+[.:/-]\w[\w.:/-]*)\]|\b[\w.]{1,60}=\S"
    r"|\bat [\w.$<>]+ ?\(|Traceback|\b\w{0,60}(?:Exception|Error|Warning)\b ?:|\b\d{1,3}(?:\.\d{1,3}){3}\b|\w\[\d+\]:"
    r"|\b0x[0-9a-fA-F]+|exit (?:code|status)"
    r"|\A[\w.-]{1,60} +\| |\A\w{1,20}\([\w./-]{1,60}\)!?: |\bgoroutine\b|\bpanic:|\bcore dumped\b"
)
_SOURCE = re.compile(
    r"#include|\bprintf\b|\bputs\b|\bputchar\b|\bcout\b|std::|System\.out|console\.log|\bprint(?:ln)?\(|\bdef \w+\("
    r"|=>|\becho\b|&&|\bfmt\.|\breturn\b[^.;]{0,200};|\w\([^()]*\) ?[;{]|[;{}]\s?\\n|\\[bdswt]|\(\?:|\[\^|\\r\\n|\$\{"
    r"|\bSELECT\b|\bfunction\b ?\w*\("
)
LINES = re.compile(
    r"\blog(?:s|ged|ging|file|line)?\b|stack ?trace|traceback|stdout|stderr|console|terminal|escap|literal|serializ"
    r"|payload|\braw\b|json|csv|regex|regular expression|\bcode\b|program|function|script|python|java|\bshell\b|bash"
    r"|printf|crash|commit|error message|new ?lines?\b|line breaks?\b|line feed|backslash|\\n|\bC\b|c\+\+"
    r"|\bRust\b|\bGo\b|one line",
    re.IGNORECASE,
)
"""Texts about line breaks, logs or programs, or with an escaped line break."""


NO_VALUE = frozenset(
    ("nan", "NaN", "<NA>", "NaT", "undefined", "[object Object]", "<noinput>", "<nooutput>", "nooutput>")
)
"""What a table or a program writes where it has no text."""
NO_ANSWER = frozenset(("None", "none", "N/A", "n/a", "null", "NULL"))
"""Words that an answer may be, too."""
MISSING_VALUES = NO_VALUE | NO_ANSWER
"""Words for a missing value."""
EMPTY_CELLS = frozenset(("nan", "NaN", "<NA>", "NaT"))
"""What pandas writes for an empty cell of a table."""

# between letters of scripts that have spaces: Thai and Khmer break their lines there, and Persian needs one
_SPACED = r"[A-Za-z0-9\u00c0-\u052f]"
_INVISIBLE = re.compile(rf"{_SPACED}[^\w\s]?\s?[\u180e\u200b-\u200d\u2060-\u2064\ufeff]+\s?[^\w\s]?{_SPACED}")
_ABOUT_INVISIBLE = re.compile(
    r"unicode|utf-?\d|u\+200|zero[- ]width|invisible|hidden|watermark|white ?space", re.IGNORECASE
)


# the same around a whole conversation is a rendered text
STRUCK = re.compile(r"<s>(?:(?!</?s>|\[/?INST\]).){1,300}</s>", re.DOTALL)
"""A short text that HTML strikes through."""


def without_code(text: str) -> str:
    """Return a text with a space for each part in backticks, tildes or `<code>`."""
    return _CODE.sub(" ", text) if "`" in text or "~~~" in text or "<code>" in text else text


def without_quotations(text: str) -> str:
    """Return a text with a space for each part in backticks, quotation marks or square brackets."""
    return _QUOTED.sub(" ", text)


def invisible_letters(said: RowText) -> str:
    """Return the surroundings of characters of no width between letters; empty if the row is about them or has them."""
    found = None if said.text.isascii() else _INVISIBLE.search(said.text)
    if found is None or said.repeats(found[0]) or said.speaks_of(_ABOUT_INVISIBLE):
        return ""
    return said.text[max(0, found.start() - 10) : found.end() + 10]


def is_log_or_source(text: str) -> bool:
    """Return whether a text looks like lines of a log or of a program, in which escapes are at home."""
    return _LOGS.search(text) is not None or _SOURCE.search(text) is not None


_NEAR = 20
"""Texts at the beginning of a conversation, and before a message, that can ask for what the message has."""


@dataclass(frozen=True, slots=True)
class RowText:
    """A text of a row.

    Attributes:
        index: The number of its message.
        role: The role of its message.
        text: The text.
        is_answer: Whether the model learns to write it.
    """

    index: int
    role: str
    text: str
    is_answer: bool
    _texts: Sequence[str]
    _answer: int

    @property
    def is_first(self) -> bool:
        """Whether no text is in front of it."""
        return not any(self.before())

    @property
    def answer(self) -> str:
        """The next answer, if this is a prompt; else empty."""
        return self._texts[self._answer] if self._answer >= 0 else ""

    def before(self) -> Iterator[str]:
        """Yield the texts before it in its row; of a long conversation, the first and the last of them."""
        last = max(_NEAR, self.index - _NEAR)
        return chain(islice(self._texts, min(_NEAR, self.index)), self._texts[last : self.index])

    def is_asked_for(self, subject: re.Pattern[str]) -> bool:
        """Return whether a text before it is about a subject."""
        return any(subject.search(text) for text in self.before() if text)

    def speaks_of(self, subject: re.Pattern[str]) -> bool:
        """Return whether it, a text before it, or the answer to it is about a subject."""
        return any(subject.search(text) for text in (self.text, self.answer, *self.before()) if text)

    def repeats(self, letters: str) -> bool:
        """Return whether a text before it has the same letters."""
        return any(letters in text for text in self.before())


def texts_of(row: Row) -> Iterator[RowText]:
    """Yield the texts of a row that are not empty; the results of tools are the tools' own."""
    return (said for said in _every_text(row) if said.role != "tool" and said.text)


def tool_texts(row: Row) -> Iterator[tuple[str, RowText]]:
    """Yield the texts that a row gives to tools and gets from them, each with its field: arguments and results."""
    for said in _every_text(row):
        if said.role == "tool" and said.text:
            for text in _strings_of_result(said.text):
                yield f"messages[{said.index}].content", replace(said, text=text)
        for number, call in enumerate(row.messages[said.index].get("tool_calls") or ()):
            field = f"messages[{said.index}].tool_calls[{number}].function.arguments"
            for text in strings_of(argument_object(call["function"].get("arguments"))[0]):
                yield field, replace(said, text=text)


def _strings_of_result(text: str) -> Iterator[str]:
    """Yield the strings of a result that is JSON with some, as tokenizers of v3 write each; the text itself if not."""
    value: Any = text
    if text.lstrip().startswith(("{", "[", '"')):
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
    return strings_of(value)


def strings_of(value: Any) -> Iterator[str]:
    """Yield the strings of a JSON value, but for its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings_of(item)


def _every_text(row: Row) -> Iterator[RowText]:
    texts = [text_of(message.get("content")) for message in row.messages]
    roles, answering = [message["role"] for message in row.messages], row.kind.answer_roles
    answer, answers = -1, [-1] * len(roles)
    for index in reversed(range(len(roles))):
        if roles[index] in answering:
            answer = index
        else:
            answers[index] = answer
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        yield RowText(index, role, text, role in answering, texts, answers[index])
