"""The reasons why texts and control tokens of a row differ.

Some reasons look alike: escapes, another key order, lost characters, a turn that was cut in two.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

from pytest_mistral_lora.chat.diff import MarkedText
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault


def without_spaces(text: str) -> str:
    """Return a text without its whitespace, and without the sign that SentencePiece decodes to a space."""
    return "".join(text.replace("▁", " ").split())


_ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
MOST_WORDS = 2000
"""Most words of a text to compare, which tells a changed conversation from another conversation."""


def text_reason(want: str, have: str, after: str) -> EncodingFault | None:
    """Return the fault of the same text in another spelling, if it is one.

    Args:
        want: mistral-common's text.
        have: The trainer's.
        after: The place of both, for reports.
    """
    # more than spaces differ: the row's text may have such escapes itself
    if "\\u" in have:
        tight = ["".join(text.split()) for text in (have, want, _letters_of(have), _letters_of(want))]
        if tight[0] != tight[1] and tight[2] == tight[3]:
            first = _ESCAPES.search(have)
            return EncodingFault("ML556", f"{after}: {first[0] if first else ''} is there for a letter", "UTF-8")
    wanted_json, found_json = _json_of(want), _json_of(have)
    if wanted_json is not None and wanted_json == found_json:
        if json.dumps(wanted_json) != json.dumps(found_json):
            key = next((a for a, b in zip(_keys(wanted_json), _keys(found_json), strict=False) if a != b), "")
            found = f"{after}: the key {key!r} stands elsewhere"
            return EncodingFault("ML557", found, "the keys in the order of the row")
        return None
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if have == unicodedata.normalize(form, want):
            return EncodingFault("ML554", f"{after}: the text was brought into the form {form}", "as in the row")
    lost = Counter(want)
    lost.subtract(Counter(have))
    changed = {character for character, count in lost.items() if count}
    # the separators U+001C to U+001F are control characters, and spaces that a template trims
    unseen = {
        character for character in changed if unicodedata.category(character)[0] == "C" and not character.isspace()
    }
    dropped = str.maketrans("", "", "".join(unseen))
    if changed and changed == unseen and want.translate(dropped) == have.translate(dropped):
        names = ", ".join(f"U+{ord(character):04X}" for character in sorted(changed))
        return EncodingFault("ML554", f"{after}: {names} is there in another number than in the row", "as in the row")
    return None


def _letters(found: re.Match[str]) -> str:
    try:
        letters: str = json.loads(f'"{found[0]}"')
        letters.encode()
    except (ValueError, UnicodeEncodeError):
        return found[0]
    return letters


def _letters_of(text: str) -> str:
    return _ESCAPES.sub(_letters, text)


def _json_of(text: str) -> Any:
    """Return the JSON object or list of a text; None if the text is neither."""
    if text.strip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _keys(value: Any) -> list[str]:
    """Return the keys of all objects within a JSON value, in their order."""
    if isinstance(value, dict):
        return [key for name, item in value.items() for key in (name, *_keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []


def is_same_conversation(texts: Sequence[str], spelled: str) -> bool:
    """Return whether a text contains one of a row's texts, or is similar to them.

    Args:
        texts: The texts of the row.
        spelled: The whole text of the trainer's ids.
    """

    def plain(text: str) -> str:
        # not in lower case: "Hi" would be found in "Which"
        form = unicodedata.normalize("NFKC", without_spaces(text))
        return "".join(character for character in form if unicodedata.category(character)[0] not in "CZ")

    whole = plain(_letters_of(spelled))
    if any(text in whole for text in map(plain, texts) if text):
        return True
    words, others = (re.findall(r"\w+", text)[:MOST_WORDS] for text in (" ".join(texts), spelled))
    return SequenceMatcher(None, words, others, autojunk=False).ratio() >= 0.5


def spells_row(row: Row, parts: Sequence[MarkedText]) -> bool:
    """Return whether the parts of a row's ids spell texts of the row, or the row has no texts."""
    texts = [text_of(message.get("content")) for message in row.messages if message["role"] != "tool"]
    names = [call["function"]["name"] for message in row.messages for call in message.get("tool_calls") or ()]
    row_texts = [text for text in (*texts, *names) if text]
    return not row_texts or is_same_conversation(row_texts, "".join(part.spelled for part in parts))


def surplus_eos(expected: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> str:
    """Return the place of a misplaced EOS.

    Args:
        expected: Control token and text of each of mistral-common's parts.
        found: Those of the trainer's.
    """

    def before_eos(parts: Sequence[tuple[str, str]]) -> Counter[tuple[str, bool]]:
        pairs = pairwise(parts)
        return Counter((part[0], not part[1].strip()) for part, following in pairs if following[0] == "</s>")

    surplus = before_eos(found)
    surplus.subtract(before_eos(expected))
    # an EOS after nothing is an empty answer or a repeated EOS; else it closes a text that should go on
    for (marker, is_empty), count in sorted(surplus.items(), key=lambda item: (not item[0][1], item[0][0])):
        if count > 0 and is_empty and marker == "</s>":
            return "a second </s> stands behind an answer's own"
        if count > 0:
            what = "an empty answer, nothing but </s>," if is_empty else "a </s> behind a text"
            return f"{what} stands after {marker or 'the start'} that does not belong there"
    return "a </s> is there that does not belong there"


CALL_MARKERS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
"""The control tokens within a turn of calls."""


def split_calls(expected: Sequence[str], found: Sequence[str]) -> tuple[int, int] | None:
    """Return the expected and found numbers of turns of calls, if calls of one turn became several turns; else None.

    Args:
        expected: The control tokens of mistral-common's ids.
        found: Those of the trainer's.
    """

    def turns(markers: Sequence[str]) -> int:
        pairs = zip(("", *markers), (*markers, ""), strict=True)
        # up to v7 a marker opens all calls of a turn; after that each call has one, and EOS closes them
        return sum(marker in CALL_MARKERS and following not in CALL_MARKERS for marker, following in pairs)

    wanted, made = turns(expected), turns(found)
    return (wanted, made) if 0 < wanted < made else None
