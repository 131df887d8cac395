"""Fill-in-the-middle rows of a dataset: signs that a text was cut or marked up wrongly."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_mistral_lora.chat.kinds.fim import FIM_ROLES, FimRow
from pytest_mistral_lora.conformance.dataset.file_faults import Bound, FileFault

_SUFFIX_REPEATED = FileFault("suffix_repeated", "ML671", "the beginning of the suffix in the completion", Bound(1, 0))
_PROMPT_REPEATED = FileFault("prompt_repeated", "ML672", "the prompt in the completion", Bound(1, 0))
_FIM_MARKERS = FileFault("fim_markers", "ML673", "a fill-in-the-middle marker of another family", Bound(1, 0))
# a file may have gaps at the end of its texts, but not all of them
_NO_SUFFIX = FileFault("no_suffix", "ML674", "an empty suffix", Bound(20, 0.95))

FIM_FAULTS = (_SUFFIX_REPEATED, _PROMPT_REPEATED, _FIM_MARKERS, _NO_SUFFIX)
"""Faults of files with such rows."""

_LEAST_OVERLAP, _LEAST_WORDS = 40, 4
"""Characters, and different words among them, that two neighbouring texts do not share by chance."""

_LONGEST_OVERLAP = 20_000
_WORD = re.compile(r"\w+")
_MARKER = re.compile(
    r"<\|?fim[-_](?:prefix|suffix|middle|pad)\|?>"
    r"|<\uff5cfim\u2581(?:begin|hole|end)\uff5c>|(?:\A| )<(?:PRE|SUF|MID)> |<(?:EOT|FILL_ME)>"
)
"""The markers of StarCoder, Qwen and CodeGemma, of DeepSeek-Coder, and of Code Llama."""


def fim_signs(row: FimRow) -> Iterator[tuple[str, str]]:
    """Yield the name of each sign of a row, and the letters that show it."""
    if shared := _overlap(row.completion, row.suffix):
        yield _SUFFIX_REPEATED.name, f"completion: ends with {shared[:60]!r}"
    if shared := _whole_prompt(row):
        yield _PROMPT_REPEATED.name, f"completion: begins with {shared[:60]!r}"
    for role in FIM_ROLES:
        if "<" in getattr(row, role) and (found := _MARKER.search(getattr(row, role))):
            yield _FIM_MARKERS.name, f"{role}: {found[0].strip()!r}"
            break
    if not row.suffix:
        yield _NO_SUFFIX.name, ""


def _whole_prompt(row: FimRow) -> str:
    """Return the prompt if the completion begins with it; empty if it does not, or if the prompt is short."""
    prompt = row.prompt.strip()
    return prompt if _is_long(prompt) and row.completion.lstrip().startswith(prompt) else ""


def _overlap(before: str, after: str) -> str:
    """Return the longest end of a text with which the next text begins; empty if they may share it by chance."""
    before, after = before.rstrip()[-_LONGEST_OVERLAP:], after.lstrip()[:_LONGEST_OVERLAP]
    first = after[:_LEAST_OVERLAP]
    if len(first) < _LEAST_OVERLAP:
        return ""
    start = before.find(first)
    while start >= 0:
        shared = before[start:]
        if after.startswith(shared) and _is_long(shared):
            return shared
        start = before.find(first, start + 1)
    return ""


def _is_long(text: str) -> bool:
    return len(text) >= _LEAST_OVERLAP and len({*_WORD.findall(text)}) >= _LEAST_WORDS
