"""The texts of a row: its script, and signs of another pipeline, such as escapes or the markers of other models.

Also the text without its form, which shows that two rows are the same.

A row may talk about such signs. So only a text that is built of them counts, outside of code and quotations. If many
rows of a file have such a text, it is an error, else a note.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pytest_mistral_lora.chat.fim import FimRow
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.finding import Finding


@dataclass(frozen=True, slots=True)
class TextSign:
    """A sign that a converter went wrong.

    Attributes:
        rule: The rule if many rows of a file have it: an error.
        note: The rule if few have it.
        share: The least share of a file's eligible rows that counts as many.
        of: Name of the eligible rows without the sign, in the counts of a file; empty if all rows are eligible.
    """

    rule: str
    note: str
    share: float
    of: str = ""

    def is_systematic(self, counts: Counter[tuple[int, str]], files: int) -> bool:
        """Return whether many rows of one of the files have the sign; a single row is never many."""
        for file in range(files):
            with_sign = counts[file, self.rule]
            rows = counts[file, self.of] + with_sign if self.of else counts[file, "judged"]
            if with_sign > 1 and with_sign >= self.share * rows:
                return True
        return False


SIGNS = (
    TextSign("ML624", "ML625", 0.5, "rows_with_letters_beyond_ascii"),
    TextSign("ML626", "ML627", 0.5, "rows_with_newlines"),
    TextSign("ML628", "ML629", 0.05),
    TextSign("ML630", "ML631", 0.05),
)

# fenced and inline code, and quotations within a line
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]*\"|(?<!\w)'[^'\n]*'|\[[^\]\n]*\]", re.DOTALL)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_LETTER = r"\\(?:u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]{2,6}\}|U000[0-9a-fA-F]{5}|x[89a-fA-F][0-9a-fA-F]|3[0-7]{2}\\2[0-7]{2})"
# beside a letter, or one after the other: caf\u00e9, \u4f60\u597d; eight digits are neither a path nor a formula
_LETTERS = re.compile(rf"\w{_LETTER}|(?<!\\){_LETTER}(?:\w|{_LETTER})|(?<!\\)\\U000[0-9a-fA-F]{{5}}")
_ENTITIES = re.compile(r"\w(&(?:#\d{2,6}|#x[0-9a-fA-F]{2,5}|[A-Za-z]{2,8}\d?);)")
# an escaped break behind a text, and the letters after it; or in front of a real one
_BREAK = re.compile(r"[^\s\\(\[{'\"`/](?:\\r)?\\n(?:\\r|\\n)*(?![\s,;)\]'\"])([A-Za-z]*)")
_BREAK_BEFORE_BREAK = re.compile(r"[^\s\\(\[{'\"`/]\\n(?=\n)")
# another escape in the word: C:\docs\new, \alpha\neq
_OTHER_ESCAPE = re.compile(r"\\(?![nrt\"'])|^[A-Za-z]:\\")
# what follows the n of a formula's command: \neq, \nu, \nRightarrow
_FORMULA = re.compile(
    r"e|eq|eg|u|abla|atural|i|ot|otin|mid|exists|ode|sim|cong|parallel|[vV][dD]ash|[A-Za-z]*arrow|triangle\w*"
    r"|ormal\w*|onumber|oindent|olimits|obreak|ew(?:line|command|page)|(?:leq|geq|less|gtr|prec|succ|sub|sup)\w*"
)
_MARKER = (
    r"<\|/?[^\W\d]\w*(?: \w+)*\|>|\[\|[^\W\d]\w*\|\]|<\uff5c[^\uff5c\n]{1,30}\uff5c>"
    r"|<(?:start|end)_of_turn>|<</?SYS>>|<(?:bos|eos|sop|eop|eoh|eoa|eom|AI|用户)>|<(?:reserved_|extra_id_|unused)\d+>"
    r"|\[gMASK\]|</?(?:tool_calls?|tool_response|function_calls|function_results)>|<function=[\w.-]+>"
    r"|### (?:Instruction|Response|Input|Human|Assistant|User):"
)
_MARKED = ("<", "### ", "[|", "[gMASK]")
# at an end of a text, or twice at an end of a line
_MARKERS = re.compile(
    rf"\A\s*({_MARKER})|({_MARKER})\s*\Z|(?:^({_MARKER})|({_MARKER})$)(?=[\s\S]*(?:^(?:{_MARKER})|(?:{_MARKER})$))",
    re.MULTILINE,
)
_ASKING = r"(?:### )?(?:(?i:user|human)|GPT4(?: Correct)? User|用户|问)\s*[:\uff1a]"
_ANSWERING = r"(?:### )?(?:(?i:assistant|bot|ai)|GPT4(?: Correct)? Assistant|助手|答)\s*[:\uff1a]"
_ASKS = re.compile(rf"\A\s*(?:\[Round \d+\]\s*)?{_ASKING}")
_ASKED = re.compile(rf"(?:^|\s){_ASKING}")
_ANSWERS = re.compile(rf"\A\s*{_ANSWERING}")
_ANSWER_NEXT = re.compile(rf"\s{_ANSWERING}\s*\Z")
_THOUGHT = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|scratchpad|reflection|inner_monologue|chain_of_thought|cot)"
_THINKING = re.compile(
    rf"\A\s*<{_THOUGHT}(?:\s[^<>\n]*)?>|</{_THOUGHT}>|\A\s*(?:\u25c1think\u25b7|<\|begin_of_thought\|>|\[THINK\])",
    re.IGNORECASE,
)


def sign_findings(row: Row, *, thinks: bool) -> Iterator[tuple[str, Finding | None]]:
    """Yield the signs of a row: the name of a count of rows, and its finding, if any.

    Args:
        row: The row.
        thinks: Whether the tokenizer has control tokens for thinking.
    """
    seen: dict[str, Finding | None] = {}
    if isinstance(row, FimRow):
        # escapes, markers and tags are at home in code
        return
    for index, role, text in _prose(row):
        place = f"{row.place}, messages[{index}].content"
        if not text.isascii():
            seen.setdefault("rows_with_letters_beyond_ascii", None)
        if "\n" in text:
            seen.setdefault("rows_with_newlines", None)
        if found := _escaped_letter(text):
            seen.setdefault("ML624", Finding("ML624", f"the text has {found!r} as letters", place))
        if "\\n" in text and (found := _escaped_break(text)):
            beside = "beside a line break" if "\n" in text else "and no line break"
            seen.setdefault("ML626", Finding("ML626", f"the text has {found!r} {beside}", place))
        if marker := _marker(text):
            seen.setdefault("ML628", Finding("ML628", f"the text is marked up with {marker}", place))
        if role == "assistant" and (thought := _THINKING.search(without_code(text))):
            expected = 'a chunk {"type": "thinking", "thinking": "..."}' if thinks else ""
            # without control tokens, letters are the only way to write a thought
            rule = "ML630" if thinks else "ML631"
            seen.setdefault(rule, Finding(rule, f"a thought is written as {thought[0].strip()}", place, expected))
    for index, role in _roles_in_letters(row):
        place = f"{row.place}, messages[{index}].content"
        seen.setdefault("ML628", Finding("ML628", f"the text is marked up with {role}", place))
    # a row with both is no evidence for the other side
    for rule, plain in (("ML624", "rows_with_letters_beyond_ascii"), ("ML626", "rows_with_newlines")):
        if rule in seen:
            seen.pop(plain, None)
    yield from seen.items()


def markup_of(row: Row) -> tuple[int, str] | None:
    """Return the number of a message that is marked up for a model of another family, and its markers; None without."""
    for index, _, text in _prose(row):
        if marker := _marker(text):
            return index, marker
    return next(_roles_in_letters(row), None)


def _prose(row: Row) -> Iterator[tuple[int, str, str]]:
    """Yield the number, the role and the text of each message that can have signs."""
    for index, message in enumerate(row.messages):
        text = text_of(message.get("content"))
        # a tool's result is mostly JSON, and so are the answers of many datasets
        if message["role"] != "tool" and text and not _is_json(text):
            yield index, message["role"], text


def without_code(text: str) -> str:
    """Return a text with a space for each part in backticks."""
    return _CODE.sub(" ", text) if "`" in text else text


def without_quotations(text: str) -> str:
    """Return a text with a space for each part in backticks, quotation marks or square brackets."""
    return _QUOTED.sub(" ", text)


def _escaped_letter(text: str) -> str:
    """Return an escape that stands for a letter beyond ASCII, in a text of prose; empty without one."""
    found = _LETTERS.search(without_quotations(text)) if "\\" in text else None
    if found is not None:
        return found[0]
    # in HTML, entities are in place
    entities = _ENTITIES.finditer(without_code(text)) if "&" in text and "</" not in text else ()
    return next((entity[0] for entity in entities if not html.unescape(entity[1]).isascii()), "")


def _escaped_break(text: str) -> str:
    """Return the surroundings of a line break written as a backslash and an n, in a text of prose; empty without one.

    If the text also has real line breaks, only an escaped break before a real one counts.
    """
    prose = without_quotations(text)
    if "\n" in text:
        found = _BREAK_BEFORE_BREAK.search(prose)
        return prose[max(0, found.start() - 10) : found.end()] if found else ""
    words = [word for word in prose.split() if "\\n" in word and not _OTHER_ESCAPE.search(word)]
    breaks = [escape for word in words for escape in _BREAK.finditer(word) if not _FORMULA.fullmatch(escape[1])]
    # a small letter may follow in a verse or a path: a single break does not count
    found = next((escape for escape in breaks if not escape[1][:1].islower() or len(breaks) > 1), None)
    return found.string[max(0, found.start() - 10) : found.end() + 10] if found else ""


def _marker(text: str) -> str:
    """Return the marker of another model family that a text is built of; empty without one."""
    found = _MARKERS.search(without_code(text)) if any(sign in text for sign in _MARKED) else None
    return next(filter(None, found.groups())) if found else ""


def _roles_in_letters(row: Row) -> Iterator[tuple[int, str]]:
    """Yield the number of a user's message, and the words by which it and its answer name their roles."""
    for index, message in enumerate(row.messages):
        text = text_of(message.get("content"))
        if message["role"] != "user" or not (request := _ASKED.search(text)):
            continue
        after = row.messages[index + 1 : index + 2]
        answer = text_of(after[0].get("content")) if after and after[0]["role"] == "assistant" else ""
        found = _ANSWER_NEXT.search(text) or (_ASKS.match(text) and _ANSWERS.match(answer))
        if found:
            yield index, f"{request[0].strip()} and {found[0].strip()}"


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


NO_SCRIPT = "no letters"
# Python has no scripts of characters, but a letter's name begins with it: OLD PERSIAN SIGN A, KATAKANA-HIRAGANA …
_AFTER_SCRIPT = re.compile(r"(?: (?:CAPITAL|SMALL|LETTER|SIGN|SYLLABLE|CHARACTER|UNIFIED|ITERATION|CLOSING)|-).*")
_SCRIPTS = {"Cjk": "Han", "Ideographic": "Han", "Hiragana": "Kana", "Katakana": "Kana", "Modifier": ""}
"""Scripts by the first word of a letter's name, for those that have another name."""


def main_script(row: Row) -> str:
    """Return the Unicode script, such as `Latin` or `Han`, that most of the different letters of a row belong to.

    Kana count before Han, since Japanese has both.
    """
    letters = set().union(*(text_of(message.get("content")) for message in row.messages))
    scripts = Counter(script for letter in letters if (script := _script_of(letter)))
    if not scripts:
        return NO_SCRIPT
    most = min(scripts, key=lambda script: (-scripts[script], script))
    return "Kana" if most == "Han" and 5 * scripts["Kana"] >= scripts["Han"] else most


@cache  # there are 140,000 letters, and a dataset has some hundreds of them
def _script_of(character: str) -> str:
    """Return the script of a letter; empty for another character."""
    if not character.isalpha():
        return ""
    # a wide or a mathematical letter is one of its script
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    first = _AFTER_SCRIPT.split(name)[0].title()
    return _SCRIPTS.get(first, first)


# a sign of a number: 3.14 is not 314, and -5 not 5
# (the sign before the digit beside it, because a pattern that begins with a look behind stops at every character)
_OF_NUMBER = re.compile(r"[.,:/](?<=\d[.,:/])(?=\d)|-(?<!\w-)(?=\d)")

# Markdown's **bold** and *italic*; not the signs of 2**3 and a*b
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]+)(?<=[^\s*])\1(?![\w*])")


class _Kept(dict[int, int | None]):
    """For `str.translate`: a character to itself, or to nothing if it is a space, a control or sentence punctuation."""

    def __missing__(self, code: int) -> int | None:
        kind = unicodedata.category(chr(code))
        # brackets and signs of code count: f(x) is not f[x], and C# not C
        is_dropped = kind[0] in "ZC" or (kind in ("Po", "Pd", "Pi", "Pf") and chr(code) not in "#%&@*/\\")
        self[code] = None if is_dropped else code
        return self[code]


_KEPT = _Kept()
_ASCII_DROPPED = bytes(code for code in range(128) if _KEPT[code] is None)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


def _kept(text: str) -> str:
    """Return `text.translate(_KEPT)`, in a tenth of the time for a text that is mostly ASCII."""
    left = text.encode().translate(None, _ASCII_DROPPED).decode()
    return left if left.isascii() else _BEYOND_ASCII.sub(lambda run: run[0].translate(_KEPT), left)


def without_form(value: Any) -> Any:
    """Return a text without its form, or a value of JSON with such texts, its keys in order."""
    if isinstance(value, Mapping):
        return {key: without_form(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [without_form(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _EMPHASIS.sub(r"\2", unicodedata.normalize("NFKC", value).casefold())
    # letters of no script stand for the signs of numbers, which would be dropped
    signed = _OF_NUMBER.sub(lambda found: f"\u2295{ord(found[0])}\u2295", text)
    return _kept(unicodedata.normalize("NFKC", signed)) or text
