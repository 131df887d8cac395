"""Texts: plain ones, and those that break careless renderers and masks."""

from __future__ import annotations

import string

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

TextStrategy = SearchStrategy[str]

CONTROL_LITERALS = (
    *("[INST]", "[/INST]", "</s>", "<s>", "<unk>", "<pad>"),
    *("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"),
    *("[STREAMING_PAD]", "[STREAMING_WORD]", "[NEXT_AUDIO_TEXT]", "[REPEAT_AUDIO_TEXT]"),
    *("[control_12]", "<SPECIAL_20>"),
)
"""How the control tokens of all versions are written: in a row's text they are text."""

_SPACES = (" ", "  ", "\n", "\t", "\r\n", "\n\n", "    ", "\u00a0", "\u2003", "\u2028", "\u3000", "\u2581", " " * 17)
_INVISIBLE = ("\x00", "\x07", "\x1b[0m", "\x7f", "\u200b", "\u200d", "\u200e", "\u202e", "\u2060", "\ufeff", "\ufffd")
_SCRIPTS = (
    "e\u0301",
    "\u1e9b\u0323",
    "Z\u0351\u036b\u0343",
    "한국어",
    "你好\uff0c世界",
    "日本語テキスト",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते",
    "👩\u200d👩\u200d👧",
    "🏳\ufe0f\u200d🌈",
    "👍🏽",
    "🇫🇷",
    "\U0001d518\U0001d52b",
    "\U0001f600",
    "\ud7ff\ue000",  # the neighbours of the surrogates
    "\U0010ffff",
)
_SNIPPETS = (
    "def f(x):\n    if x:\n        return  x\n",
    "End.  Next  sentence.",
    '{"a": [1, 2.5, null], "b": "\\u00e9"}',
    "<b>&amp;</b> {{ x }} {% if y %}",
    "C:\\new\\table",
    "'quoted' \"twice\"",
    "don't",
    "1234567890",
    "-0.5e10",
)


def plain_text() -> TextStrategy:
    """Generate text that no known renderer gets wrong: not empty, no control literal, no space at either end.

    Example:
        >>> from hypothesis import given
        >>> @given(plain_text())
        ... def law(text):
        ...     assert text and text == text.strip()
        >>> law()
    """
    words = st.text(string.ascii_letters + string.digits + ".,!?'éß你", min_size=1, max_size=8)
    return st.lists(words, min_size=1, max_size=8).map(" ".join)


def hostile_text() -> TextStrategy:
    """Generate text that breaks careless renderers and masks; it may be empty, and holds no lone surrogate.

    Control literals of every version, white space of all kinds at both ends and inside, SentencePiece's own space
    character, control and format characters, combining marks, emoji sequences, right-to-left and CJK scripts,
    astral characters, very long words, code and JSON.

    Example:
        >>> from hypothesis import given
        >>> @given(hostile_text())
        ... def law(text):
        ...     assert text.encode().decode() == text
        >>> law()
    """
    fragment = st.one_of(
        st.text(string.ascii_lowercase, max_size=4),
        st.sampled_from(CONTROL_LITERALS),
        st.sampled_from(_SPACES),
        st.sampled_from(_SNIPPETS),
        st.sampled_from(_SCRIPTS),
        st.sampled_from(_INVISIBLE),
        st.text(st.characters(codec="utf-8"), max_size=6),
        st.builds(str.__mul__, st.sampled_from("a1_é漢"), st.integers(30, 600)),
    )
    return st.lists(fragment, max_size=6).map("".join)
