"""Texts that another pipeline left: JSON escapes, markers of other model families, thinking written as letters.

A row may speak of such things. So only a text that is built of them counts, outside of code and quotations. It is an
error if many rows of a file are so, and else a note.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.finding import Finding


@dataclass(frozen=True, slots=True)
class TextSign:
    """A sign that a converter went wrong.

    Attributes:
        rule: The rule if many rows of a file have it: an error.
        note: The rule if few have it.
        share: The share of a file's rows from which they are many, of those that could have it.
        of: Name of the rows that could have it and do not, in the counts of a file; empty for all rows.
    """

    rule: str
    note: str
    share: float
    of: str = ""

    def is_systematic(self, counts: Counter[tuple[int, str]], files: int) -> bool:
        """Return whether many rows of one of the files have the sign; a single row never is."""
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
_LETTER = r"\\(?:u[0-9a-fA-F]{4}|x[89a-fA-F][0-9a-fA-F])"
# beside a letter, or one after the other: caf\u00e9, \u4f60\u597d
_LETTERS = re.compile(rf"\w{_LETTER}|(?<!\\){_LETTER}(?:\w|{_LETTER})")
# between two texts without spaces, or at the end; not the \neq and \nRightarrow of formulas
_NEWLINES = re.compile(r"[\w.!?:;)*}\]](?:\\r)?\\n(?:\\n)*(?![a-z\s,;)\]]|[RL][a-z]*arrow|V[dD]ash)")
_MARKER = (
    r"<\|(?:im_start|im_end|im_sep|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|endoftext|end"
    r"|user|assistant|system|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN|start_of_role|end_of_role|return|message|channel)\|>"
    r"|<(?:start|end)_of_turn>|<</?SYS>>|<\uff5c[^\uff5c\n]{1,30}\uff5c>"
    r"|### (?:Instruction|Response|Input|Human|Assistant|User):"
)
# at an end of a text, or twice at the beginning of a line
_MARKERS = re.compile(rf"\A\s*({_MARKER})|({_MARKER})\s*\Z|^({_MARKER})(?=[\s\S]*^(?:{_MARKER}))", re.MULTILINE)
_THINKING = re.compile(r"\A\s*<(?:think|thinking|thought)>|</(?:think|thinking|thought)>", re.IGNORECASE)


def sign_findings(row: Row, *, thinks: bool) -> Iterator[tuple[str, Finding | None]]:
    """Yield the signs of a row: the name of a count of rows, and the finding if it is one.

    Args:
        row: The row.
        thinks: Whether the tokenizer has control tokens for thinking.
    """
    seen: dict[str, Finding | None] = {}
    for index, message in enumerate(row.messages):
        text = text_of(message.get("content"))
        # a tool's result is mostly JSON, and so are the answers of many datasets
        if message["role"] == "tool" or not text or _is_json(text):
            continue
        place = f"{row.place}, messages[{index}].content"
        if not text.isascii():
            seen.setdefault("rows_with_letters_beyond_ascii", None)
        if "\n" in text:
            seen.setdefault("rows_with_newlines", None)
        if "\\" in text:
            prose = _QUOTED.sub(" ", text)
            if found := _LETTERS.search(prose):
                seen.setdefault("ML624", Finding("ML624", f"the text has {found[0]!r} as letters", place))
            if "\n" not in text and (found := _NEWLINES.search(prose)):
                around = prose[max(0, found.start() - 10) : found.end() + 10]
                seen.setdefault("ML626", Finding("ML626", f"the text has {around!r} and no line break", place))
        if ("<" in text or "### " in text) and (found := _MARKERS.search(_CODE.sub(" ", text))):
            marker = next(filter(None, found.groups()))
            seen.setdefault("ML628", Finding("ML628", f"the text is marked up with {marker}", place))
        if message["role"] == "assistant" and (found := _THINKING.search(_CODE.sub(" ", text))):
            expected = 'a chunk {"type": "thinking", "thinking": "..."}' if thinks else ""
            # without tokens for it, letters are the only way to write a thought
            rule = "ML630" if thinks else "ML631"
            seen.setdefault(rule, Finding(rule, f"a thought is written as {found[0].strip()}", place, expected))
    # a row with both is no evidence for the other side
    for rule, plain in (("ML624", "rows_with_letters_beyond_ascii"), ("ML626", "rows_with_newlines")):
        if rule in seen:
            seen.pop(plain, None)
    yield from seen.items()


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
    """Return the script of a letter; nothing for another character."""
    if not character.isalpha():
        return ""
    # a wide or a mathematical letter is one of its script
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    first = _AFTER_SCRIPT.split(name)[0].title()
    return _SCRIPTS.get(first, first)
