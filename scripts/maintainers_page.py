"""The parts of docs/maintainers.md that are made: the files of examples/maintainers, to be copied, and a red test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pytest_mistral_lora.assertions import assert_labels_exact
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "maintainers.md"
FILES = ROOT / "examples" / "maintainers"
_PLACE = re.compile(r"(<!-- ([\w.]+): start -->\n).*?(<!-- \2: end -->\n)", flags=re.DOTALL)
_ROW: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}],
}


def maintainers_page() -> str:
    """Return the page with its parts."""

    def filled(place: re.Match[str]) -> str:
        made = f"```text\n{_red()}\n```" if place[2] == "red" else f"```py\n{(FILES / place[2]).read_text('utf-8')}```"
        return f"{place[1]}{made}\n{place[3]}"

    return _PLACE.sub(filled, PAGE.read_text(encoding="utf-8"))


def masked_eos() -> tuple[dict[str, Any], list[int], list[int]]:
    """Return a row, and its ids and labels with a masked EOS."""
    encoded = Oracle.load("spm-v3").encode(_ROW)
    return _ROW, list(encoded.input_ids), [*(encoded.labels or ())[:-1], IGNORE_INDEX]


def _red() -> str:
    """Return the message of a test of such a row."""
    try:
        assert_labels_exact(*masked_eos(), "spm-v3")
    except AssertionError as error:
        return f"AssertionError: {error}"
    raise ValueError("a masked EOS is not found")
