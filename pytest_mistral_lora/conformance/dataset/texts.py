"""The texts of a row: its script, and signs of another pipeline, such as escapes or the markers of other models.

Also the text without its form, which shows that two rows are the same.

A row may talk about such signs, or ask for them. So only a text that is built of them counts, outside of code and
quotations. A sign is a note, however many rows have it; it is an error only if many rows have what proves it: letters
beyond ASCII as escapes, thoughts beside the tokens for them, or a complete turn of another family.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from string import ascii_letters

from pytest_mistral_lora.chat.likeness import beyond_ascii
from pytest_mistral_lora.chat.rows import Row, beyond_text, text_of
from pytest_mistral_lora.conformance.bounded_findings import BoundedFindings
from pytest_mistral_lora.conformance.dataset.row_texts import (
    ESCAPES,
    FORMATS,
    HTML,
    LINES,
    MARKUP,
    STRUCK,
    RowText,
    is_log_or_source,
    texts_of,
    tool_texts,
    without_code,
    without_quotations,
)
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord, JudgedRow


@dataclass(frozen=True, slots=True)
class TextSign:
    """A sign that a converter went wrong.

    Attributes:
        rule: The rule if many rows of a file have it.
        note: The rule if few have it.
        share: The least share of a file's eligible rows that counts as many.
        of: Name of the eligible rows without the sign, in the counts of a file; empty if all rows are eligible.
    """

    rule: str
    note: str
    share: float
    of: str = ""

    def is_systematic(self, counts: Counter[tuple[int, str]], judged: Sequence[int]) -> bool:
        """Return whether many rows of one of the files have the sign; a single row is never many.

        Args:
            counts: Number of rows by file and by what they have.
            judged: The number of judged records of each file.
        """
        for file, records in enumerate(judged):
            with_sign = counts[file, self.rule]
            rows = counts[file, self.of] + with_sign if self.of else records
            if with_sign > 1 and with_sign >= self.share * rows:
                return True
        return False


SIGNS = (
    TextSign("ML624", "ML625", 0.5, "rows_with_letters_beyond_ascii"),
    TextSign("ML626", "ML627", 0.5, "rows_with_newlines"),
    TextSign("ML628", "ML629", 0.05),
    TextSign("ML630", "ML631", 0.05),
)

COMPLETE_TURNS = TextSign("complete_turns", "", 0.05)
"""Rows of ML628 with a complete turn of another family, which is an error."""
_IN_EVERY_ROW = replace(COMPLETE_TURNS, share=1.0)
"""The same in a sample: a template of another family writes it into every row."""

_DECIDED_BY_FILE = frozenset(sign.rule for sign in SIGNS)

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
MARKER = (
    r"<\|/?[^\W\d]\w*(?: \w+)*\|>|\[\|[^\W\d]\w*\|\]|<\uff5c[^\uff5c\n]{1,30}\uff5c>"
    r"|<(?:start|end)_of_turn>|<</?SYS>>|<(?:bos|eos|sop|eop|eoh|eoa|eom|AI|用户)>|<(?:reserved_|extra_id_|unused)\d+>"
    r"|\[gMASK\]|</?(?:tool_calls?|tool_response|function_calls|function_results)>|<function=[\w.-]+>"
    r"|<fim[-_](?:prefix|suffix|middle|pad)>|### (?:Instruction|Response|Human|Assistant|User):"
)
"""A marker of a turn, a call or a text by which another family's models are trained, as a regular expression."""

_GAP = ("<SUF>", "<MID>")
"""Code Llama's markers of a gap, in their order in each text with one; `<PRE>` is a tag of HTML, too."""

# at an end of a text, or twice at an end of a line
_MARKERS = re.compile(
    rf"\A\s*({MARKER})|({MARKER})\s*\Z|(?:^({MARKER})|({MARKER})$)(?=[\s\S]*(?:^(?:{MARKER})|(?:{MARKER})$))",
    re.MULTILINE,
)
_SPEAKER = r"(?:system|user|human|assistant|model|bot|chatbot|gpt|tool|ipython|developer)"
# the role header and the end marker of a turn, by family; a header alone, or an end marker alone, may be anything
_TURNS_OF_FAMILIES = tuple(
    (re.compile(header.replace("ROLE", _SPEAKER), re.IGNORECASE), re.compile(end, re.IGNORECASE))
    for header, end in (
        (r"<\|im_(?:start|ROLE)\|>", r"<\|im_end\|>"),
        (r"<\|start_header_id\|>\s*ROLE\s*<\|end_header_id\|>", r"<\|(?:eot_id|eom_id|end_of_text)\|>"),
        (r"<\|header_start\|>\s*ROLE\s*<\|header_end\|>", r"<\|eo[tm]\|>"),
        (r"<\|start\|>\s*ROLE|<\|(?:start|channel)\|>[^<\n]{1,60}<\|message\|>", r"<\|(?:end|return|call)\|>"),
        (r"<\|start_of_role\|>\s*ROLE", r"<\|end_of_text\|>"),
        (r"<start_of_turn>\s*ROLE", r"<end_of_turn>"),
        (r"<\|turn>\s*ROLE", r"<turn\|>"),
        (r"<\|START_OF_TURN_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>"),
        (r"<\|ROLE\|>", r"</s>|<\|(?:end|end_of_turn|end_of_text|endoftext|eot_id|im_end)\|>|<eo[ham]>"),
        (r"\[\|ROLE\|\]", r"\[\|endofturn\|\]"),
        (r"<\uff5cROLE\uff5c>", r"<\uff5c(?:User|Assistant|end\u2581of\u2581sentence)\uff5c>"),
        # a turn of the user has no end marker
        (r"\A\s*(?:<\uff5cbegin\u2581of\u2581sentence\uff5c>)?\s*<\uff5cUser\uff5c>", r"\S\s*\Z"),
        (r"<<SYS>>", r"<</SYS>>"),
        # of a gap: its markers are no turn's, but they are complete in the same way
        (r"<\|?fim[-_]prefix\|?>|<\uff5cfim\u2581begin\uff5c>", r"<\|?fim[-_]middle\|?>|<\uff5cfim\u2581end\uff5c>"),
        _GAP,
        (r"GPT4(?: Correct)? ROLE:", r"<\|end_of_turn\|>"),
        (r"### (?:Instruction|Input|Response|Human|Assistant|User):", r"</s>|<\|endoftext\|>"),
    )
)
# "Answer in JSON" asks for no turn
_TURNS = re.compile(
    r"alpaca|vicuna|chatml|llama|gemma|zephyr|qwen|deepseek|mistral|\bphi\b|(?:prompt|chat|conversation|message)\W*"
    r"(?:format|template|markup)|template|render|special token|\bmarkers?\b|<\||start_of_turn|<<SYS>>|###",
    re.IGNORECASE,
)
_ASKING = r"(?:### )?(?:(?i:user|human)|GPT4(?: Correct)? User|用户|问)\s*[:\uff1a]"
_ANSWERING = r"(?:### )?(?:(?i:assistant|bot|ai)|GPT4(?: Correct)? Assistant|助手|答)\s*[:\uff1a]"
_ASKS = re.compile(rf"\A\s*(?:\[Round \d+\]\s*)?{_ASKING}")
_ASKED = re.compile(rf"(?:^|\s){_ASKING}")
_ANSWERS = re.compile(rf"\A\s*{_ANSWERING}")
_ANSWER_NEXT = re.compile(rf"\s{_ANSWERING}\s*\Z")
_THOUGHT = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|scratchpad|reflection|inner_monologue|chain_of_thought|cot)"
_THOUGHT_OPENS = re.compile(
    rf"<{_THOUGHT}(?:\s[^<>\n]*)?>|\u25c1think\u25b7|<\|begin_of_thought\|>|\[THINK\]", re.IGNORECASE
)
_THOUGHT_CLOSES = re.compile(rf"</{_THOUGHT}>|\u25c1/think\u25b7|<\|end_of_thought\|>|\[/THINK\]", re.IGNORECASE)


_TAGS = re.compile(r"\btags\b", re.IGNORECASE)


def sign_findings(row: Row, *, thinks: bool) -> Iterator[tuple[str, Finding | None]]:
    """Yield the signs of a row: the name of a count of rows, and its finding, if any.

    Args:
        row: The row.
        thinks: Whether the tokenizer has control tokens for thinking.
    """
    seen: dict[str, Finding | None] = {}
    if not row.kind.is_prose:
        # escapes, markers and tags are at home in code
        return
    texts = list(texts_of(row))
    for said in _prose(texts):
        text = said.text
        if not text.isascii():
            seen.setdefault("rows_with_letters_beyond_ascii", None)
        if "\n" in text:
            seen.setdefault("rows_with_newlines", None)
        if "ML624" not in seen and (found := _escaped_letter(said)):
            seen["ML624"] = Finding("ML624", f"the text has {found!r} as letters", row.content_place(said.index))
        if "ML626" not in seen and "\\n" in text and (found := _escaped_break(said)):
            beside = "beside a line break" if "\n" in text else "and no line break"
            seen["ML626"] = Finding("ML626", f"the text has {found!r} {beside}", row.content_place(said.index))
        if COMPLETE_TURNS.rule not in seen and (marker := _marker(said)):
            is_complete = _has_turn(said)
            marked = Finding("ML628", f"the text is marked up with {marker}", row.content_place(said.index))
            marked = replace(marked, severity="error") if is_complete else marked
            if "ML628" not in seen or (is_complete and COMPLETE_TURNS.rule not in seen):
                seen["ML628"] = marked
            if is_complete:
                seen[COMPLETE_TURNS.rule] = None
        # without control tokens, letters are the only way to write a thought
        thought, is_whole = _thought(said, thinks=thinks)
        rule = "ML630" if thinks and is_whole else "ML631"
        if thought and rule not in seen:
            expected = 'a chunk {"type": "thinking", "thinking": "..."}' if thinks else ""
            place = row.content_place(said.index)
            seen[rule] = Finding(rule, f"a thought is written as {thought}", place, expected)
    for index, role in _roles_in_letters(row, texts):
        marked = Finding("ML628", f"the text is marked up with {role}", row.content_place(index))
        seen.setdefault("ML628", marked)
    # those of tools come from other programs: they are no evidence of how the file was written
    for part, said in tool_texts(row) if not {"ML624", "ML625"} & seen.keys() else ():
        text = said.text
        if "\\" in text and not (_is_json(text) or is_log_or_source(text)) and (found := _escaped_letter(said)):
            seen["ML625"] = Finding("ML625", f"{part} has {found!r} as letters", row.place)
            break
    # a row with both is no evidence for the other side
    for rule, plain in (("ML624", "rows_with_letters_beyond_ascii"), ("ML626", "rows_with_newlines")):
        if rule in seen:
            seen.pop(plain, None)
    yield from seen.items()


@dataclass
class ConvertedTexts:
    """Rows with the signs of a converter that went wrong: only their share of a file tells what they are.

    Attributes:
        counts: Number of rows by file and by what they have.
        found: The findings of `SIGNS`, under the rules of many rows.
    """

    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    found: BoundedFindings = field(default_factory=BoundedFindings)

    def extend(self, other: ConvertedTexts) -> None:
        """Add other rows."""
        self.counts.update(other.counts)
        self.found.extend(other.found)


class SignsOfConversions:
    """The signs of texts whose rule, or severity, the number of rows with them decides."""

    case = "texts-are-whole"
    fires_on_sample = True

    def start(self) -> ConvertedTexts:
        """Return the state of no row."""
        return ConvertedTexts()

    def observe_row(self, row: JudgedRow, state: ConvertedTexts) -> Iterator[Finding]:
        """Yield the signs of a row that are findings by themselves, and note the others."""
        kind = row.row.kind
        if not kind.starts_record(row.row):
            return  # the prompt is judged with the chosen answer
        # an answer that is not wanted may show any of them
        for name, sign in sign_findings(kind.wanted_part(row.row), thinks=row.thinks):
            state.counts[row.file, name] += 1
            if sign is not None and sign.rule in _DECIDED_BY_FILE:
                state.found.at = row.at
                state.found.add(sign)
            elif sign is not None:
                yield sign

    def observe(self, record: JudgedRecord, state: ConvertedTexts) -> Iterator[Finding]:
        """Yield nothing: each row was seen by itself."""
        return iter(())

    def report(self, state: ConvertedTexts, files: JudgedFiles) -> Iterator[Finding]:
        """Yield the findings of rows under the rules of many, or of few, of them; a sample shows too few.

        A sample of which each row has a complete turn of another family shows enough.
        """
        judged = () if files.is_sample else files.judged
        turns = _IN_EVERY_ROW if files.is_sample else COMPLETE_TURNS
        has_turns = turns.is_systematic(state.counts, files.judged)
        if not has_turns:
            state.found.weaken("ML628")
        for sign in SIGNS:
            is_systematic = sign.is_systematic(state.counts, judged) or (has_turns and sign.rule == "ML628")
            if sign.rule in state.found and not is_systematic:
                state.found.rename(sign.rule, sign.note)
        yield from state.found.of(*state.found.rules)


CONVERSIONS = SignsOfConversions()
"""The observer of the signs of converters."""


def _prose(texts: Sequence[RowText]) -> Iterator[RowText]:
    """Yield each text that can have signs: the answers of many datasets are JSON."""
    return (said for said in texts if not _is_json(said.text))


def _escaped_letter(said: RowText) -> str:
    """Return an escape that stands for a letter beyond ASCII, in a text of prose; empty without one."""
    text = said.text
    found = _LETTERS.search(without_quotations(text)) if "\\" in text else None
    if found is not None:
        letters = found[0]
        # the row asks for an escape, repeats one, or resolves one
        escape = letters[letters.index("\\") :]
        if said.speaks_of(ESCAPES) or said.repeats(escape) or _without_escape(letters, said.answer):
            return ""
        return letters
    # in HTML, entities are in place
    entities = _ENTITIES.finditer(without_code(text)) if "&" in text and "</" not in text else ()
    letters = next((entity[1] for entity in entities if not html.unescape(entity[1]).isascii()), "")
    if not letters or said.speaks_of(MARKUP) or said.repeats(letters) or html.unescape(letters) in said.answer:
        return ""
    return f"{text[text.index(letters) - 1]}{letters}"


def _without_escape(letters: str, answer: str) -> bool:
    """Return whether an answer has the letter of an escape of four digits."""
    found = re.search(r"\\u([0-9a-fA-F]{4})", letters)
    return found is not None and chr(int(found[1], 16)) in answer


def _escaped_break(said: RowText) -> str:
    """Return the surroundings of a line break written as a backslash and an n, in a text of prose; empty without one.

    If the text also has real line breaks, only an escaped break before a real one counts.
    """
    text = said.text
    if is_log_or_source(text) or said.is_asked_for(LINES) or (not said.is_answer and _mentions_lines(said)):
        return ""
    prose = without_quotations(text)
    if "\n" in text:
        found = _BREAK_BEFORE_BREAK.search(prose)
        return prose[max(0, found.start() - 10) : found.end()] if found else ""
    words = [word for word in prose.split() if "\\n" in word and not _OTHER_ESCAPE.search(word)]
    breaks = [escape for word in words for escape in _BREAK.finditer(word) if not _FORMULA.fullmatch(escape[1])]
    # a small letter may follow in a verse or a path: a single break does not count
    found = next((escape for escape in breaks if not escape[1][:1].islower() or len(breaks) > 1), None)
    return found.string[max(0, found.start() - 10) : found.end() + 10] if found else ""


def _mentions_lines(prompt: RowText) -> bool:
    """Return whether a prompt is about line breaks or programs: its own escapes are none of the words."""
    return LINES.search(prompt.text.replace("\\n", " ")) is not None


def _marker(said: RowText) -> str:
    """Return the marker of another model family that a text is built of; empty without one, or if it is asked for."""
    text = said.text
    if not ("<" in text or "### " in text or "[|" in text or "[gMASK]" in text):
        return ""
    text = without_code(text)
    opening, closing = _GAP
    if match := _MARKERS.search(text):
        marker: str = next(filter(None, match.groups()))
    elif closing in text.partition(opening)[2]:
        marker = opening
    else:
        return ""
    return "" if _is_markup_asked_for(said, marker) else marker


def _is_markup_asked_for(said: RowText, marker: str) -> bool:
    """Return whether a row asks for the markup of one of its texts, or about it."""
    if said.is_answer:
        return said.is_asked_for(_TURNS if _has_turn(said) else FORMATS) or said.repeats(marker)
    # in front of what is marked up, or behind it, a prompt may ask about it; behind a system prompt stands a question
    marks = [*re.finditer(rf"{MARKER}|<PRE>|{'|'.join(_GAP)}", said.text)]
    before, after = said.text[: marks[0].start()], said.text[marks[-1].end() :]
    if before.rstrip().endswith(("?", ":", "\uff1f", "\uff1a")):
        return True
    return FORMATS.search(before) is not None or (after != "" and _TURNS.search(after) is not None)


_ABOUT_TOKENS = re.compile(
    r"\btokens?\b|template|\bmarkers?\b|chatml|mistral|llama|special|\bformat(?:s|ted)?\b|\bmeans?\b|\bmeaning\b|layout"
    r"|syntax|render",
    re.IGNORECASE,
)


def spelled_tokens(row: Row, literals: re.Pattern[str]) -> list[str]:
    """Return the control tokens that a row spells, outside of code and where the row is not about them.

    Args:
        row: The row.
        literals: Finds a control token.
    """
    found = literals.findall(row.to_jsonl())
    if not found or not row.kind.is_chat:
        return found
    rest = row.to_json()
    for message in rest["messages"]:
        if message["role"] != "tool":
            # thoughts have no request of their own
            message["content"] = beyond_text(message.get("content"))
    # a tool may return a page, or get one
    found = literals.findall(STRUCK.sub(" ", json.dumps(rest, ensure_ascii=False)))
    for said in texts_of(row):
        struck = STRUCK.sub(" ", said.text)
        # an answer may be struck through as a whole; a prompt may be a rendered text
        is_html = said.is_answer or struck.strip() or said.speaks_of(HTML)
        text = without_code(struck if is_html else said.text)
        spelled = literals.findall(text)
        if {*spelled} <= {"<s>", "</s>"} and said.speaks_of(HTML):
            continue
        if spelled and not said.speaks_of(_ABOUT_TOKENS):
            found += spelled
    return found


def _has_turn(said: RowText) -> bool:
    """Return whether a text has a complete turn of another family: role header, text, end marker."""
    text = without_code(said.text)
    # an end behind any header is one behind the first: no text is read twice
    firsts = ((header.search(text), end) for header, end in _TURNS_OF_FAMILIES)
    return any(first and end.search(text, first.end()) for first, end in firsts)


def _thought(said: RowText, *, thinks: bool) -> tuple[str, bool]:
    """Return the tag of a thought in an answer, and whether it is opened at the beginning, closed, and answered.

    The tag is empty without a thought, if the row asks for the tag, and if a sentence is about it.
    """
    if not said.is_answer or not ("<" in said.text or "[" in said.text or "\u25c1" in said.text):
        return "", False
    text = without_code(said.text).lstrip()
    opens = _THOUGHT_OPENS.match(text)
    start = opens.end() if opens else 0
    closes = _THOUGHT_CLOSES.search(text, start)
    found = opens or closes
    if found is None or (opens and not text[start : start + 1].isalpha() and _goes_on(text[start:])):
        return "", False
    if closes:
        thought, answer = text[start : closes.start()].rstrip(" "), text[closes.end() :]
        is_ended = thought[-1:] in _ENDS_OF_THOUGHTS
        # a chat template may have opened it
        if not opens and (not is_ended or _THOUGHT_OPENS.search(thought)):
            return "", False
        if _goes_on(answer) and (answer.startswith(" ") or not is_ended):
            return "", False
    tag = found[0]
    # the letters of Mistral's own token are no format that a prompt can ask for
    is_asked_for = said.repeats(tag.replace("</", "<")) or (not thinks and said.is_asked_for(_TAGS))
    return ("", False) if is_asked_for and not tag.startswith("[") else (tag, bool(opens and closes))


_ENDS_OF_THOUGHTS = ("", *"\n.!?\u2026\u3002\uff01\uff1f")


def _goes_on(text: str) -> bool:
    """Return whether a sentence goes on behind a tag in it."""
    after = text.lstrip(" ")[:1]
    return after in (*",.;:!?)\u3001\u3002\uff0c\uff1a",) or (after.isalpha() and not after.isupper())


def _roles_in_letters(row: Row, texts: Sequence[RowText]) -> Iterator[tuple[int, str]]:
    """Yield the number of a user's message, and the words by which it and its answer name their roles."""
    for said in texts:
        # most texts have no colon, and a search for it is faster
        has_colon = ":" in said.text or "\uff1a" in said.text
        if said.role != "user" or not has_colon or not (request := _ASKED.search(said.text)):
            continue
        after = row.messages[said.index + 1 : said.index + 2]
        answer = text_of(after[0].get("content")) if after and after[0]["role"] == "assistant" else ""
        found = _ANSWER_NEXT.search(said.text) or (_ASKS.match(said.text) and _ANSWERS.match(answer))
        if found and not FORMATS.search(said.text[: request.start()]) and not said.is_asked_for(FORMATS):
            yield said.index, f"{request[0].strip()} and {found[0].strip()}"


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
    text = "".join(text_of(message.get("content")) for message in row.messages)
    # most letters are ASCII: to search for the 52 of them is faster than a set of each character of the text
    letters = {letter for letter in ascii_letters if letter in text} | {*beyond_ascii(text)}
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
