"""Signs in one row of a fault that its whole file may have, such as a wrong decoding; `file_faults` counts them.

A row may be about such a sign. So code, quotations and texts about markup or missing values do not count.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.fim import FimRow
from pytest_mistral_lora.chat.pairs import is_wanted, prompt_of
from pytest_mistral_lora.chat.rows import Row, text_of, weight_of
from pytest_mistral_lora.conformance.dataset.fim import fim_signs
from pytest_mistral_lora.conformance.dataset.tally import DatasetTally, SignCount
from pytest_mistral_lora.conformance.dataset.texts import without_code, without_quotations

# the bytes 80 to BF, which follow the first byte of a letter in UTF-8, read as Latin-1 or as Windows-1252
_TAIL = f"[\u0080-\u00bf{bytes(range(0x80, 0xA0)).decode('cp1252', errors='ignore')}]"
_SEQUENCE = f"(?:[Â-ß]{_TAIL}|[à-ï]{_TAIL}{_TAIL}|[ð-ô]{_TAIL}{_TAIL}{_TAIL})"
# a space or a quotation mark may also follow a capital letter: NÃO MAÇÃ»
_ENDS = r"[\u00a0\u00bb\u203a\u2018-\u201d\u2026\u2013\u2014\u2022]"
# é reads as Ã©, and a closing quotation mark begins with â€; of other letters two must follow each other, because a
# single one may be the end of a quotation, such as É»
_MOJIBAKE = re.compile(
    f"(?:[ÂÃ](?!(?<=[A-ZÀ-ÖØ-Þ][ÂÃ]){_ENDS}){_TAIL}|â[\u0080€]{_TAIL}|ð[\u009fŸ]{_TAIL}{_TAIL}|{_SEQUENCE}{{2}})"
)
_RUN = re.compile(f"{_SEQUENCE}+")
# in UTF-8, each match of _MOJIBAKE has these bytes, and most texts have none: this search takes a tenth of the time
_PAIR = re.compile(rb"\xc3[\x82-\xb4][\xc2\xc5\xc6\xcb\xe2]")

# of prose; those that a sentence names have no word at both sides
_ENTITY = re.compile(r"&(?:(?:#0?39|#x27|apos|rsquo);(?=\w)|(?:quot|#0?34|[lr]dquo|nbsp);|amp;(?=\s?\w))")
_ABOUT_MARKUP = re.compile(r"</|/>|html|xml|entit|escap|ampersand|encod|http|www\.|quer(?:y|ies)\b", re.IGNORECASE)

_BLOCK = "(?:p|div|span|h[1-6]|ul|ol|li|blockquote|pre|article|section|table|html|body)"
# a text that is one piece of HTML, or a line break in the middle of prose
_HTML = re.compile(rf"\A\s*<{_BLOCK}(?:\s[^<>]*)?>.*</{_BLOCK}>\s*\Z|<br\s?/?>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_ABOUT_HTML = re.compile(
    r"html|xml|css|svg|vue|react|markdown|markup|code\b|script|snippet|template|\btags?\b|\bweb|\bpage\b|newsletter|\be-?mail",
    re.IGNORECASE,
)

_FIELDS = (
    "instructions?|input|output|prompt|question|query|context|response|answer|completion|text|document|passage|content"
    "|messages?|history|system(?:_prompt)?|user_(?:input|message|query)|chat_history"
)
_NAMES = (
    "(?:user_?|assistant_?|bot_?|first_?|last_?|company_?|author_?)?name|user|char|author|company|date|city|country"
)
# {name}, {{ name }}, <<name>>, and <NAME> in capitals; <name> may be a tag, and \text{name} is a formula
_FIELD, _NAME = (
    re.compile(rf"(?<!\w)\{{{{1,2}}\s?(?:{words})\s?\}}{{1,2}}|<<(?:{words})>>|(?-i:<{capitals}>)", re.IGNORECASE)
    for words, capitals in ((_FIELDS, "(?:INPUT|PROMPT|QUESTION|CONTEXT)"), (_NAMES, "(?:NAME|AUTHOR|COMPANY)"))
)
_MEDIUM = re.compile(r"<(?:image|video|audio)(?:_\d+)?>")
_MEDIUM_AT_END = re.compile(_MEDIUM.pattern + r"\Z")

_OPENINGS = ("[INST]", "<s>[INST]", "<s> [INST]", "[SYSTEM_PROMPT]", "<s>[SYSTEM_PROMPT]")
_CLOSINGS = ("[/INST]", "</s>")
_LONGEST_END = 40
"""Characters at an end of a text in which a marker or a word for a missing value stands."""

_NO_VALUE = frozenset(
    (
        "nan",
        "NaN",
        "<NA>",
        "NaT",
        "null",
        "NULL",
        "undefined",
        "[object Object]",
        "<noinput>",
        "<nooutput>",
        "nooutput>",
    )
)
_NO_ANSWER = frozenset(("None", "none", "N/A", "n/a"))
_ABOUT_VALUES = re.compile(
    r"[`(){}=;<>]|\b(?:python|pandas|numpy|java|javascript|typescript|sql|code|script|function|method|program|variable"
    r"|returns?|prints?|outputs?|evaluat\w*|json|yaml|excel|null|none|nan|undefined|n/a|empty|missing|not)\b",
    re.IGNORECASE,
)

# <tool_call> and other tags of other families are ML628's
_CALL_WORDS = ('"name"', "<function", "[TOOL_CALLS]", "Action Input:")
_CALL = re.compile(
    r'\A\s*(?:```(?:json)?\s*)?\[?\s*\{\s*"name"\s*:\s*"[\w.-]+"\s*,\s*"(?:arguments|parameters)"\s*:\s*[{"]'
    r"|\A\s*(?:<function_?call>|\[TOOL_CALLS\])|^Action: ?[\w.-]+ *\nAction Input:",
    re.MULTILINE,
)

# the last three are the full stop and the marks of Chinese and Japanese
_SENTENCES = re.compile(r"[.!?](?:\s|\Z)|[\u3002\uff01\uff1f]")
_OPEN_ENDS = frozenset(",;:-\u2013\u2014(")

CALLS, CALLS_AS_TEXT, NO_PROMPT = "calls", "calls_as_text", "no_system_prompt"
"""Signs that are no fault by themselves: rows may differ in them."""

ANSWER_UNITS = {"characters": 120, "tokens": 30}
"""The units of an answer's length, each with the least length that may be a cut: labels and names are shorter."""

_LONG_ANSWER, _LONG_ANSWER_WORDS = 40, 8
"""Characters or words of an answer that is no label."""


def note_file_signs(tally: DatasetTally, file: int, row: Row, encoded: EncodedRow) -> None:
    """Add the signs of a row, and its last answer, to a tally that looks at the row's place.

    Args:
        tally: The tally.
        file: Index of the file.
        row: The row; of an answer that is not wanted, its prompt alone counts.
        encoded: Its whole encoding.
    """
    signs = _fim_row_signs(row) if isinstance(row, FimRow) else _signs(row if is_wanted(row) else prompt_of(row))
    for name, shown in signs:
        tally.signs.setdefault((file, name), SignCount()).add(tally.findings.at, shown)
    if isinstance(row, FimRow):
        # a completion ends within a sentence: only equal ones tell something
        tally.answers.append(_checksum(row.completion) if row.completion.strip() else 0)
        return
    if row.messages[0]["role"] == "system":
        prompt = zlib.crc32(_octets(text_of(row.messages[0].get("content"))))
        least, most = tally.system_prompts.get(file, (prompt, prompt))
        tally.system_prompts[file] = (min(least, prompt), max(most, prompt))
    if not is_wanted(row):
        tally.answers.append(0)
        return
    index = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
    answer = text_of(row.messages[index].get("content")).rstrip() if weight_of(row.messages[index]) else ""
    tally.answers.append(_checksum(answer) if answer else 0)
    # a call behind the text would count as tokens of the answer
    if answer and not row.messages[index].get("tool_calls"):
        lengths = {"characters": len(answer), "tokens": _tokens_of_last_turn(encoded)}
        for unit, length in lengths.items():
            tally.answer_lengths.setdefault((file, unit), Counter())[length] += 1
            if length >= ANSWER_UNITS[unit] and _is_open(answer):
                at_length = tally.open_answers.setdefault((file, unit), {}).setdefault(length, SignCount())
                at_length.add(tally.findings.at, f"messages[{index}].content: ends with {answer[-20:]!r}")


_OF_ANY_TEXT = ("decoded_wrongly", "letters_lost", "rendered")
"""Signs that are faults of code, too."""


def _fim_row_signs(row: FimRow) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a fill-in-the-middle row, and the letters that show it."""
    seen = dict(fim_signs(row))
    for index, message in enumerate(row.messages):
        for name, shown in _signs_of_text(message["content"], ""):
            if name in _OF_ANY_TEXT:
                seen.setdefault(name, f"{row.content_field(index)}: {shown}")
    yield from seen.items()


def _signs(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a row, and the first message and its letters that show it."""
    seen: dict[str, str] = {}
    before = ""
    if row.messages[0]["role"] != "system":
        seen[NO_PROMPT] = ""
    for index, message in enumerate(row.messages):
        text, role = text_of(message.get("content")), message["role"]
        if message.get("tool_calls"):
            seen.setdefault(CALLS, f"messages[{index}].tool_calls")
        # the results of a tool are its own
        if role != "tool" and text:
            for name, shown in (*_signs_of_text(text, before), *_missing_values(text, role, before)):
                seen.setdefault(name, f"messages[{index}].content: {shown}")
            is_about_calls = role == "assistant" and any(word in text for word in _CALL_WORDS)
            if is_about_calls and (call := _CALL.search(text)):
                seen.setdefault(CALLS_AS_TEXT, f"messages[{index}].content: {call[0].strip()[:40]!r}")
            before += text
    yield from seen.items()


def _signs_of_text(text: str, before: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a text, and its letters that show it.

    Args:
        text: The text.
        before: The texts before it in its row, which may ask for such letters.
    """
    if not text.isascii():
        if _PAIR.search(_octets(text)) and (found := _MOJIBAKE.search(without_quotations(text))):
            yield "decoded_wrongly", _decoded(found)
        if "\ufffd" in text:
            at = text.index("\ufffd")
            yield "letters_lost", repr(text[max(0, at - 10) : at + 10])
    if "&" in text and (found := _ENTITY.search(without_code(text))) and not _ABOUT_MARKUP.search(before + text):
        yield "html_entities", repr(found.string[max(0, found.start() - 5) : found.end() + 5])
    if "<" in text and (found := _HTML.search(without_code(text))) and not _is_about_html(before, text):
        yield "html_tags", repr(found[0].strip()[:40])
    if "{" in text or "<" in text:
        for name, pattern in (("field_unfilled", _FIELD), ("name_unfilled", _NAME)):
            if pattern.search(text) and (found := pattern.search(without_quotations(text))):
                is_whole = found[0] == text.strip()
                yield ("message_unfilled" if is_whole else name), repr(found[0])
    start, end = text[:_LONGEST_END].lstrip(), text[-_LONGEST_END:].rstrip()
    if medium := _MEDIUM.match(start) or _MEDIUM_AT_END.search(end):
        yield "media_unfilled", repr(medium[0])
    if start.startswith(_OPENINGS):
        yield "rendered", repr(start[:20])
    elif end.endswith(_CLOSINGS):
        yield "rendered", repr(end[-20:])


def _is_about_html(before: str, text: str) -> bool:
    """Return whether a text, or those before it in its row, speak of HTML: not in the names within their tags."""
    return _ABOUT_HTML.search(_TAG.sub(" ", before + " " + text)) is not None


def _decoded(found: re.Match[str]) -> str:
    """Return a run of wrongly decoded letters, and the letters that its bytes stand for."""
    run = _RUN.match(found.string, found.start())
    text = run[0] if run else found[0]
    octets = b"".join(
        bytes([ord(letter)]) if ord(letter) < 0x100 else letter.encode("cp1252", "replace") for letter in text
    )
    return f"{text!r} for {octets.decode(errors='replace')!r}"


def _missing_values(text: str, role: str, before: str) -> Iterator[tuple[str, str]]:
    """Yield the name of a sign if a text is a word for a missing value, or a request ends with one.

    Args:
        text: The text.
        role: The role of its message.
        before: The texts before it in its row, which may ask for the word.
    """
    word = text.strip() if len(text) <= _LONGEST_END else ""
    if role == "assistant":
        if (word in _NO_VALUE or word in _NO_ANSWER) and not _ABOUT_VALUES.search(before):
            yield ("missing_value" if word in _NO_VALUE else "none_as_answer"), repr(word)
        return
    end = text[-_LONGEST_END:].rpartition("\n")[2].rpartition(": ")[2].strip()
    is_first = not before and (word in _NO_VALUE or word in _NO_ANSWER)
    if is_first or (end in _NO_VALUE and not _ABOUT_VALUES.search(text.removesuffix(end))):
        yield "missing_value", repr(end)


def _checksum(answer: str) -> int:
    """Return 32 bits for an answer, never 0; the last of them says whether it is long."""
    is_long = len(answer) >= _LONG_ANSWER or len(answer.split()) >= _LONG_ANSWER_WORDS
    # texts that share them by chance are no tenth of a file
    return zlib.crc32(_octets(answer)) & ~1 | is_long or 2


def _octets(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _tokens_of_last_turn(encoded: EncodedRow) -> int:
    """Return the tokens of the last turn's text; 0 if nothing tells them."""
    tokens = 0
    for span in reversed(encoded.spans):
        if span.turn != encoded.spans[-1].turn or span.turn is None:
            break
        tokens += span.end - span.start if span.kind == "text" else 0
    return tokens


def _is_open(answer: str) -> bool:
    """Return whether a text has sentences and ends within one."""
    last = answer[-1]
    return (last.isalnum() or last in _OPEN_ENDS) and _SENTENCES.search(answer) is not None
