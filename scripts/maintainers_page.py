"""The parts of docs/maintainers.md that are made: the files of examples/maintainers, to be copied, and a red test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page_blocks import with_block

from pytest_mistral_lora.assertions import assert_labels_exact
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "maintainers.md"
FILES = ROOT / "examples" / "maintainers"
_ROW: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Capital of France?"}, {"role": "assistant", "content": "Paris."}],
}


def maintainers_page() -> str:
    """Return the page with its parts."""
    page = with_block(PAGE.read_text(encoding="utf-8"), "red", f"```text\n{_red()}\n```")
    for file in sorted(FILES.glob("test_*.py")):
        page = with_block(page, file.name, f"```py\n{file.read_text(encoding='utf-8')}```")
    return page


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
