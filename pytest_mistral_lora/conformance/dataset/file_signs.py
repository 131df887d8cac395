"""Signs in one row of a fault that its whole file may have, such as a wrong decoding; `file_faults` counts them.

A row may be about such a sign, or its prompt may ask for it or have it. So code, quotations and such rows do not count.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, imported, text_of
from pytest_mistral_lora.conformance.dataset.row_texts import (
    EMPTY_CELLS,
    ENCODINGS,
    FORMATS,
    HTML,
    LOST_LETTERS,
    MARKUP,
    NO_ANSWER,
    NO_VALUE,
    STRUCK,
    TEMPLATES,
    RowText,
    invisible_letters,
    is_log_or_source,
    texts_of,
    tool_texts,
    without_code,
    without_quotations,
)
from pytest_mistral_lora.conformance.dataset.sign_count import SignCount
from pytest_mistral_lora.conformance.row_pass import JudgedRecord, extend_states
from pytest_mistral_lora.conformance.row_table import reordered

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.row_table import Order

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

_BLOCK = "(?:p|div|blockquote|article|section)"
# a text that is one piece of HTML, with a sentence in it, or a line break in the middle of prose
_HTML = re.compile(
    rf"\A\s*<{_BLOCK}(?:\s[^<>]*)?>.*</[a-z1-6]+>\s*\Z|(?<=\S)<br\s?/?>(?=\s*\w)", re.DOTALL | re.IGNORECASE
)
_TAG = re.compile(r"<[^<>]*>")
_SENTENCE = re.compile(r"\w[.!?:\u3002\uff01\uff1f]|\w\W+\w+\W+\w+\W+\w+\W+\w+\W+\w+")

_FIELDS = (
    "instructions?|input|output|prompt|question|query|context|response|answer|completion|text|document|passage|content"
    "|messages?|history|system(?:_prompt)?|user_(?:input|message|query)|chat_history"
)
_NAMES = "(?:user_?|assistant_?|bot_?|first_?|last_?|company_?|author_?)?name|author|company|date|city|country"
# {name}, {{ name }}, <<name>>, and <NAME> in capitals; <name> may be a tag, and \text{name} is a formula
_FIELD, _NAME = (
    re.compile(rf"(?<![\w/{{])\{{{{1,2}}\s?(?:{words})\s?\}}{{1,2}}|<<(?:{words})>>|(?-i:<{capitals}>)", re.IGNORECASE)
    for words, capitals in ((_FIELDS, "(?:INPUT|PROMPT|QUESTION|CONTEXT)"), (_NAMES, "(?:NAME|AUTHOR|COMPANY)"))
)
_MEDIUM = re.compile(r"<(?:image|video|audio)(?:_\d+)?>")
_MEDIUM_AT_END = re.compile(_MEDIUM.pattern + r"\Z")
_ABOUT_TAGS = re.compile(r"html|xml|\btags?\b|\belements?\b|\bweb|\bcode\b|svg", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{\{\s?\w+\s?\}\}|\{\w+\}|<<\w+>>")
# a statement, a block, a filter or an attribute of Jinja or Handlebars; other templates
_STATEMENT = re.compile(r"\{%|%\}|\{\{[#/^>]|\{\{\s*[\w.]+\s*(?:\||\.)|\{\{\s*\w+\.\w|<%|\$\{|\{\{-|\{\{\s?char\s?\}\}")

_OPENINGS = ("[INST]", "<s>[INST]", "<s> [INST]", "[SYSTEM_PROMPT]", "<s>[SYSTEM_PROMPT]")
_CLOSINGS = ("[/INST]", "</s>")
_INSTRUCTION = re.compile(r"(?:<s>\s?)?\[INST\][^\[]*(?:\[/INST\])?")
_LONGEST_END = 40
"""Characters at an end of a text in which a marker or a word for a missing value stands."""

_ABOUT_VALUES = re.compile(
    r"[`(){}=;<>]|\b(?:python|pandas|numpy|java|javascript|typescript|sql|code|script|function|method|program|variable"
    r"|returns?|prints?|outputs?|evaluat\w*|json|yaml|excel|null|none|nan|undefined|n/a|empty|missing|not|slope|divid\w*|limit|zero)\b",
    re.IGNORECASE,
)
_ASKS_FOR_VALUES = re.compile(
    r"\b(?:any|if|list|names?|named|extract\w*|find|identif\w*|detect\w*|recogni\w*|fields?|entit\w*|keys?|values?|slots?"
    r"|attributes?|classif\w*|label\w*|parse|annotat\w*|mention\w*)\b|extra[ei]|extrah|estra[ei]|извлек|найди|提取|抽出"
    r"|추출|找出",
    re.IGNORECASE,
)
"""Requests for a value that a text may not have."""
_NAMES_VALUES = re.compile(
    r"\b(?:null|none|nan|undefined|n/a|numpy|np|pandas|pd|float|math|log|sqrt|missing|empty|invalid|divid\w*|zero)\b"
    r"|/ ?0",
    re.IGNORECASE,
)
"""Texts that name such a value, or how a program comes to one."""
_FIELD_VALUE = re.compile(
    # no two white spaces in a row: a text may have 40,000 line breaks
    rf"^(?:#+ )?(?:{_FIELDS}|inputs?|notes?):[ \t]*\n?({'|'.join(map(re.escape, sorted(NO_VALUE)))})[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)

# <tool_call> and other tags of other families are ML628's
_CALL_WORDS = ('"name"', "<function", "[TOOL_CALLS]", "Action Input:")
_CALL = re.compile(
    # no two \s* in a row, which would take a minute for an answer of 40,000 line breaks
    r'\A\s*(?:```(?:json)?\s*)?(?:\[\s*)?\{\s*"name"\s*:\s*"[\w.-]+"\s*,\s*"(?:arguments|parameters)"\s*:\s*[{"]'
    r"|\A\s*(?:<function_?call>|\[TOOL_CALLS\])|^Action: ?[\w.-]+ *\nAction Input:",
    re.MULTILINE,
)

# the last three are the full stop and the marks of Chinese and Japanese
_SENTENCES = re.compile(r"[.!?](?:\s|\Z)|[\u3002\uff01\uff1f]")
_OPEN_ENDS = frozenset(",;:-\u2013\u2014(")

CALLS, CALLS_AS_TEXT, NO_PROMPT = "calls", "calls_as_text", "no_system_prompt"
"""Signs that are no fault by themselves: rows may differ in them."""

OF_A_PROGRAM = "answers_of_a_program"
"""The count of the last answers of a file that look like an error message."""

ROWS = "rows"
"""The count of the rows of a file."""
EMPTY_CELL, INVISIBLE = "empty_cell", "invisible"
"""The signs of pandas' word for an empty cell where a row may be about it, and of characters of no width."""
LETTERS_LOST, ANSWERS = "letters_lost", "answers"
"""The sign of an answer with U+FFFD, and the count of the texts of a file that answer, and have a loss."""

_END_WORDS = 64
EACH_ANSWER = -1
"""The number that each answer has among those of its words."""
_WORDS, _FIRST_WORDS, _FEW_WORDS, _BEGINNING = 1021, 24, 3, 400
"""As many numbers for words, first words of an answer, words of a short one, and characters with the first words."""
ANSWER_UNITS = {"characters": 120, "tokens": 30}
"""The units of an answer's length, each with the least length that may be a cut: labels and names are shorter."""

_LONG_ANSWER, _LONG_ANSWER_WORDS = 40, 8
"""Characters or words of an answer that is no label."""

# "can't", "sorry" and their like, in the languages that most datasets have; each begins with letters that stand for
# themselves, and the search for these in lower case takes a hundredth of that of an alternation
_REFUSING_WORDS = (
    *("can't", "can\u2019t", "cant", "cannot", "can not", "unable", "not able", "won't", "won\u2019t", "wont"),
    *("will not", "sorry", r"apolog\w+", "decline", "refuse", "not allowed", "not permitted", "not comfortable"),
    *("not possible", "not appropriate", "not going to", "against my", "no information", "don't know"),
    *("don't have", "don\u2019t know", "don\u2019t have", "dont know", "dont have", "do not know", "do not have"),
    *("leider", "tut mir leid", r"kann \w+(?: \w+){0,6} nicht", "nicht helfen", "nicht möglich", "nicht erlaubt"),
    *(r"désol[ée]e?", r"desol[ée]e?", "ne peux pas", "ne puis pas", "ne suis pas", "ne peut pas"),
    *("malheureusement", "lo siento", "no puedo", "no podemos", "lamento", "lamentablemente", "mi dispiace"),
    *("non posso", "purtroppo", "spiacente", "desculpe", "não posso", "sinto muito", "infelizmente", "helaas"),
    *(r"kan \w+(?: \w+){0,5} niet", "tyvärr", "kan inte", "kan ikke", "desværre", "dessverre", "beklager"),
    *("przepraszam", "nie mogę", "niestety", "omlouvám", "nemohu", "bohužel", "üzgünüm", "maalesef", "maaf"),
    *("tidak bisa", "tidak dapat", "không thể", "xin lỗi", "valitettavasti", "en voi", r"sajnál\w*", r"nem tud\w*"),
    "nu pot",
)
_REFUSING_LETTERS = (
    *("извин", "не могу", "не можем", "сожалени", "вибач", "на жаль", "не можу", "λυπ", "δεν μπορ", "آسف", "عذر"),
    *("لا أستطيع", "لا يمكن", "מצטער", "לא יכול", "क्षमा", "माफ़", "抱歉", "对不起", "對不起", "无法", "無法", "不能"),
    *("申し訳", "できません", "すみません", "ごめん", "죄송", "수 없", "ขอโทษ", "ไม่สามารถ"),
)
_REFUSING_STEMS = tuple(re.split(r"[\\\[(]", word)[0] for word in (*_REFUSING_WORDS, *_REFUSING_LETTERS))
_REFUSING_STEMS_IN_ASCII = tuple(filter(str.isascii, _REFUSING_STEMS))
_REFUSAL = re.compile(rf"\b(?:{'|'.join(_REFUSING_WORDS)})\b|{'|'.join(_REFUSING_LETTERS)}")
"""A refusal in a text in lower case."""
_OF_A_PROGRAM = re.compile(
    # each begins with a letter: `re` then looks at the places of these letters alone
    r"error\b(?<!\werror)|exception|time(?:d )?-?out|rate limit|try again|overload|quota|unavailable|not available"
    r"|status code|http \d{3}\b(?<!\whttp \d{3})|code \d{3}\b(?<!\wcode \d{3})|connection|server"
)
"""What a program's error says, in a text in lower case."""


@dataclass
class FileSigns:
    """The signs of the rows of files, and their last answers.

    Attributes:
        signs: Rows by file and by the name of a sign that they show.
        counts: Number of rows by file; of those of a kind, and of texts, also by name.
        system_prompts: The least and the greatest checksum of the system prompts of each file.
        words: For each file, with and without a system prompt, the number of last answers with each of some words.
        last: A checksum of each row's last answer, whose last bit says whether it is long; 0 without an answer. They
            take 4 bytes a row, in the order of the table of rows.
        lengths: For each file and unit, the number of last answers by length.
        open_ends: For each file and unit, those that end without the mark of a sentence's end, by length.
        end_words: For each file, unit and length, the checksums of the last two words of these, with their numbers.
        figures: The rows that have each fault of a file, and the first of them, by its name, once it was reported.
    """

    signs: dict[tuple[int, str], SignCount] = field(default_factory=dict)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    system_prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    words: dict[tuple[int, bool], Counter[int]] = field(default_factory=dict)
    last: array[int] = field(default_factory=lambda: array("I"))
    lengths: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    open_ends: dict[tuple[int, str], dict[int, SignCount]] = field(default_factory=dict)
    end_words: dict[tuple[int, str, int], Counter[int]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, record: JudgedRecord) -> None:
        """Add a record: its first row; of an answer that is not wanted, its prompt alone counts."""
        row, file, at = record.rows[0], record.file, record.at
        self.counts[file, ROWS] += 1
        if row.kind.count:
            self.counts[file, row.kind.count] += 1
        judged = row.kind.wanted_part(row)
        for name, shown in _signs(judged) if row.kind.is_chat else _signs_of_kind(row):
            self.signs.setdefault((file, name), SignCount()).add(at, shown, record.place)
        weights = judged.trained_weights()
        answers = (message for message, weight in zip(judged.messages, weights, strict=True) if weight)
        self.counts[file, ANSWERS] += sum(bool(text_of(message.get("content"))) for message in answers)
        if not row.kind.is_chat:
            # such as a completion, which ends within a sentence: only equal ones tell something
            written = "".join(text_of(row.messages[index].get("content")) for index in row.assistant_groups()[-1])
            self.last.append(_checksum(written) if written.strip() else 0)
            return
        if row.messages[0]["role"] == "system":
            prompt = zlib.crc32(_octets(text_of(row.messages[0].get("content"))))
            self._note_system_prompt(file, prompt, prompt)
        if not row.kind.counts_as_wanted(row):
            self.last.append(0)
            return
        index = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
        # of a row that is wanted, the whole is judged
        answer = text_of(row.messages[index].get("content")).rstrip() if weights[index] else ""
        asked = any(answer in text_of(message.get("content")) for message in row.messages[:index]) if answer else False
        is_label = not _is_long(answer) or asked or is_refusal(answer)
        self.last.append(_checksum(answer, is_label=is_label) if answer else 0)
        self.words.setdefault((file, row.messages[0]["role"] == "system"), Counter()).update(_words_of(row, answer))
        self.counts[file, OF_A_PROGRAM] += _is_of_a_program(answer.lower())
        # a call behind the text would count as tokens of the answer
        if answer and not row.messages[index].get("tool_calls"):
            lengths = {"characters": len(answer), "tokens": _tokens_of_last_turn(record.layouts[0])}
            for unit, length in lengths.items():
                self.lengths.setdefault((file, unit), Counter())[length] += 1
                if length >= ANSWER_UNITS[unit] and _is_open(answer):
                    at_length = self.open_ends.setdefault((file, unit), {}).setdefault(length, SignCount())
                    at_length.add(at, f"messages[{index}].content: ends with {answer[-20:]!r}", record.place)
                    self.end_words.setdefault((file, unit, length), Counter()).update(_end_words(answer))

    def _note_system_prompt(self, file: int, least: int, most: int) -> None:
        known = self.system_prompts.get(file, (least, most))
        self.system_prompts[file] = (min(known[0], least), max(known[1], most))

    def extend(self, other: FileSigns) -> None:
        """Add other rows."""
        extend_states(self.signs, other.signs)
        self.counts.update(other.counts)
        for file, (least, most) in other.system_prompts.items():
            self._note_system_prompt(file, least, most)
        self.last.extend(other.last)
        for at, words in other.words.items():
            self.words.setdefault(at, Counter()).update(words)
        for unit, lengths in other.lengths.items():
            self.lengths.setdefault(unit, Counter()).update(lengths)
        for unit, within in other.open_ends.items():
            extend_states(self.open_ends.setdefault(unit, {}), within)
        for end, words in other.end_words.items():
            self.end_words.setdefault(end, Counter()).update(words)

    def reorder(self, order: Order) -> None:
        """Put the answers in another order, as `JudgedTable.reorder` does."""
        self.last = reordered(self.last, order)


_OF_ANY_TEXT = ("decoded_wrongly", LETTERS_LOST, "rendered")
"""Signs that are faults of code, too."""


def _signs_of_kind(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a row that is no conversation, and the letters that show it."""
    seen: dict[str, str] = dict(imported(row.kind.signs)(row)) if row.kind.signs else {}
    for said in texts_of(row):
        # a completion repeats the code around it
        alone = RowText(0, said.role, said.text, said.is_answer, [said.text], -1)
        for name, shown in _signs_of_text(alone):
            if name in _OF_ANY_TEXT:
                seen.setdefault(name, f"{row.content_field(said.index)}: {shown}")
    yield from seen.items()


def _signs(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a row, and the first message and its letters that show it.

    Each answer whose letters were lost counts.
    """
    seen: dict[str, str] = {}
    is_about_calls = False
    if row.messages[0]["role"] != "system":
        seen[NO_PROMPT] = ""
    for index, message in enumerate(row.messages):
        if message.get("tool_calls"):
            seen.setdefault(CALLS, f"messages[{index}].tool_calls")
    # a declared schema allows the word for no value, or forbids it, which is an error of its row
    is_declared = row.response_format is not None and row.response_format.get("type", "text") != "text"
    for place, said in tool_texts(row):
        for name, shown in _signs_of_tool(said):
            seen.setdefault(name, f"{place}: {shown}")
    for said in texts_of(row):
        place = f"messages[{said.index}].content"
        for name, shown in (*_signs_of_text(said), *(() if is_declared else _missing_values(said))):
            if name != LETTERS_LOST:
                seen.setdefault(name, f"{place}: {shown}")
            elif row.trained_weights()[said.index]:
                yield name, f"{place}: {shown}"
        is_about_calls = is_about_calls or any(word in said.text for word in _CALL_WORDS)
        if said.is_answer and is_about_calls and (call := _CALL.search(said.text)):
            seen.setdefault(CALLS_AS_TEXT, f"{place}: {call[0].strip()[:40]!r}")
    yield from seen.items()


def _signs_of_text(said: RowText) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a text, and its letters that show it."""
    text = said.text
    if not text.isascii():
        if _PAIR.search(_octets(text)) and (found := _wrong_decoding(said)):
            yield "decoded_wrongly", found
        if "\ufffd" in text and said.is_answer and not said.repeats("\ufffd") and not said.is_asked_for(LOST_LETTERS):
            at = text.index("\ufffd")
            yield LETTERS_LOST, repr(text[max(0, at - 10) : at + 10])
        if found := invisible_letters(said):
            yield INVISIBLE, repr(found)
    if said.is_answer:
        yield from _markup_signs(said)
    if "{" in text or "<" in text:
        yield from _unfilled(said)
    start, end = text[:_LONGEST_END].lstrip(), text[-_LONGEST_END:].rstrip()
    medium = None if said.is_answer else _MEDIUM.match(start) or _MEDIUM_AT_END.search(end)
    if medium and not said.speaks_of(_ABOUT_TAGS):
        yield "media_unfilled", repr(medium[0])
    if (start.startswith(_OPENINGS) or end.endswith(_CLOSINGS)) and not _is_rendered_on_request(said):
        yield "rendered", repr(start[:20] if start.startswith(_OPENINGS) else end[-20:])


def _signs_of_tool(said: RowText) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of an argument of a call or of a result, which may be what its tool likes."""
    text, word = said.text, said.text.strip()
    if not text.isascii():
        if _PAIR.search(_octets(text)) and (found := _wrong_decoding(said)):
            yield "decoded_wrongly", found
        if found := invisible_letters(said):
            yield INVISIBLE, repr(found)
    if word in NO_VALUE and not said.is_asked_for(_NAMES_VALUES) and not said.repeats(word):
        if said.role != "tool" and not said.is_asked_for(_ABOUT_VALUES):
            yield "missing_value", repr(word)
        elif word in EMPTY_CELLS:
            yield EMPTY_CELL, repr(word)


def _wrong_decoding(said: RowText) -> str:
    """Return letters of a wrong decoding, with those that they stand for; empty if the row is about them."""
    prose = without_quotations(said.text)
    if _MOJIBAKE.search(prose) is None or said.speaks_of(ENCODINGS):
        return ""
    for run, meant in _wrong_runs(prose):
        # the answer repairs it, or repeats what it was given
        if not (_is_repaired(meant, said.answer) or said.repeats(run)):
            return f"{run!r} for {meant!r}"
    return ""


def repairs_decoding(prompt: RowText) -> bool:
    """Return whether the answer to a prompt has the letters that a wrong decoding of the prompt stands for."""
    return any(_is_repaired(meant, prompt.answer) for _, meant in _wrong_runs(prompt.text))


def _wrong_runs(text: str) -> Iterator[tuple[str, str]]:
    """Yield each run of wrongly decoded letters, and the letters that its bytes stand for."""
    found = _MOJIBAKE.search(text)
    while found:
        run, meant = _decoded(found)
        yield run, meant
        found = _MOJIBAKE.search(text, found.start() + len(run))


def _is_repaired(meant: str, answer: str) -> bool:
    """Return whether an answer has some letters, perhaps after a second step of repair."""
    if meant in answer:
        return True
    again = _MOJIBAKE.search(meant)
    return again is not None and _decoded(again)[1] in answer


def _decoded(found: re.Match[str]) -> tuple[str, str]:
    """Return a run of wrongly decoded letters, and the letters that its bytes stand for."""
    run = _RUN.match(found.string, found.start())
    text = run[0] if run else found[0]
    octets = b"".join(
        bytes([ord(letter)]) if ord(letter) < 0x100 else letter.encode("cp1252", "replace") for letter in text
    )
    return text, octets.decode(errors="replace")


def _markup_signs(answer: RowText) -> Iterator[tuple[str, str]]:
    """Yield the signs of HTML in an answer that its prompt neither asks for nor has."""
    text = answer.text
    found = _ENTITY.search(without_code(text)) if "&" in text else None
    if found and not (answer.repeats(found[0]) or answer.speaks_of(MARKUP)):
        yield "html_entities", repr(found.string[max(0, found.start() - 5) : found.end() + 5])
    if "<" in text and (found := _HTML.search(without_code(text))):
        words = _TAG.sub(" ", text)
        is_prose = _SENTENCE.search(words) is not None
        if is_prose and not (HTML.search(words) or answer.is_asked_for(HTML) or _has_tags(answer)):
            yield "html_tags", repr(found[0].strip()[:40])


def _has_tags(answer: RowText) -> bool:
    """Return whether a prompt has tags beside its request; a page of a forum is nothing but tags."""
    prompts = [text for text in answer.before() if text]
    is_page = len(prompts) == 1 and _HTML.match(prompts[0]) is not None
    return not is_page and any(_TAG.search(without_code(text)) for text in prompts)


def _unfilled(said: RowText) -> Iterator[tuple[str, str]]:
    """Yield the placeholders of a text, unless the row is about templates or programs."""
    text = said.text
    is_meant: bool | None = None
    for name, pattern in (("field_unfilled", _FIELD), ("name_unfilled", _NAME)):
        if pattern.search(text) and (found := pattern.search(without_quotations(text))):
            if is_meant is None:
                is_meant = _is_template(said)
            # a name that the prompt hides, and that of the addressee, which is filled in when the text is sent
            is_kept = name == "name_unfilled" and said.is_answer and (said.repeats(found[0]) or _is_addressed(found))
            if not (is_meant or is_kept or found[0] in said.answer):
                is_whole = found[0] == text.strip()
                yield ("message_unfilled" if is_whole else name), repr(found[0])


_SALUTATION = re.compile(
    r"(?:\A|[\n.!?] *)(?:dear|hello|hi|hey|welcome|good (?:morning|afternoon|evening)|thank you|thanks|sehr geehrte\w*"
    r"|liebe\w*|hallo|bonjour|ch[eè]re?|hola|estimad[oa]s?|querid[oa]s?|ciao|gentile|car[oa]|olá|beste|geachte)"
    r"(?: \w+\.?)?,? \Z",
    re.IGNORECASE,
)


def _is_addressed(found: re.Match[str]) -> bool:
    """Return whether a placeholder stands behind a salutation."""
    return _SALUTATION.search(found.string[max(0, found.start() - 40) : found.start()]) is not None


def _is_template(said: RowText) -> bool:
    """Return whether a text with placeholders is one of a template or a program, or is asked for."""
    if _STATEMENT.search(said.text) or len({*_PLACEHOLDER.findall(said.text)}) > 2 or is_log_or_source(said.text):
        return True
    if said.is_answer:
        return said.is_asked_for(TEMPLATES)
    # in a prompt, the placeholder itself is no request
    return TEMPLATES.search(_PLACEHOLDER.sub(" ", said.text)) is not None or said.is_asked_for(TEMPLATES)


def _is_rendered_on_request(said: RowText) -> bool:
    """Return whether a row asks for control tokens in a text, or about those in a prompt."""
    if said.is_answer:
        opens = said.text.lstrip().startswith(_OPENINGS)
        is_struck = not opens and not STRUCK.sub("", said.text).rstrip().endswith(_CLOSINGS)
        return (
            is_struck
            or said.is_asked_for(FORMATS)
            or any(said.repeats(marker) for marker in (*_OPENINGS, *_CLOSINGS) if marker in said.text)
        )
    around = _INSTRUCTION.sub(" ", said.text)
    return around.strip(" \n") != "" and FORMATS.search(around) is not None


def _missing_values(said: RowText) -> Iterator[tuple[str, str]]:
    """Yield the name of a sign if a text is a word for a missing value, or a request ends with one."""
    text = said.text
    if said.is_answer:
        word = text.strip() if len(text) <= _LONGEST_END else ""
        if (word in NO_VALUE or word in NO_ANSWER) and not said.repeats(word):
            is_asked_for = said.is_asked_for(_ABOUT_VALUES)
            if word in NO_VALUE and not is_asked_for:
                yield "missing_value", repr(word)
            elif word in EMPTY_CELLS and not said.is_asked_for(_NAMES_VALUES):
                yield EMPTY_CELL, repr(word)
            elif not is_asked_for and not said.is_asked_for(_ASKS_FOR_VALUES):
                yield "none_as_answer", repr(word)
        return
    whole = text.strip()
    if said.is_first and (whole in NO_VALUE or whole in NO_ANSWER):
        yield "missing_value", repr(whole)
        return
    # a line of its own, or behind the name of a field: other names are those of a record
    field = _FIELD_VALUE.search(text)
    start, _, end = text[-_LONGEST_END:].rstrip().rpartition("\n")
    if field is None and not (start and end.strip() in NO_VALUE):
        return
    word = field[1] if field else end.strip()
    before = text[: field.start()] if field else text.rstrip().removesuffix(end)
    if not _ABOUT_VALUES.search(before):
        yield "missing_value", repr(word)
    elif word in EMPTY_CELLS and not _NAMES_VALUES.search(before):
        yield EMPTY_CELL, repr(word)


def is_refusal(answer: str) -> bool:
    """Return whether an answer refuses, which many different questions may have in common."""
    text = answer.lower()
    for stem in _REFUSING_STEMS_IN_ASCII if text.isascii() else _REFUSING_STEMS:
        if stem in text:
            return _REFUSAL.search(text) is not None and not _is_of_a_program(text)
    return False


def _is_of_a_program(text: str) -> bool:
    return _OF_A_PROGRAM.search(text) is not None


def _is_long(answer: str) -> bool:
    return len(answer) >= _LONG_ANSWER or len(answer.split()) >= _LONG_ANSWER_WORDS


def _checksum(answer: str, *, is_label: bool = False) -> int:
    """Return 32 bits for an answer, never 0; the last of them says whether it is long.

    Args:
        answer: The answer.
        is_label: Whether many rows may have it in common although it is long: a refusal, or a text that is asked for.
    """
    is_long = not is_label and _is_long(answer)
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


def _words_of(row: Row, answer: str) -> set[int]:
    """Return numbers for the first words of an answer, for its length, and for the tools of its row."""
    words = answer[:_BEGINNING].casefold().split()
    traits = [f"{len(words) <= _FEW_WORDS} short", f"{bool(row.tools)} tools"]
    return {EACH_ANSWER, *(zlib.crc32(_octets(word)) % _WORDS for word in (*words[:_FIRST_WORDS], *traits))}


def _end_words(answer: str) -> Iterator[int]:
    """Yield a number for the last word of a text, and another for the one before it."""
    for at, word in enumerate(answer[-_LONGEST_END * 2 :].split()[-2:]):
        # as many values as bound the memory of a file whose texts all end in another way
        yield 2 * (zlib.crc32(_octets(word)) % _END_WORDS) + at


def _is_open(answer: str) -> bool:
    """Return whether a text has sentences and ends within one; a heading or a tag is no sentence."""
    last = answer[-1]
    if answer[answer.rfind("\n") + 1 :].lstrip().startswith(("#", "<", "|")):
        return False
    return (last.isalnum() or last in _OPEN_ENDS) and _SENTENCES.search(answer) is not None
