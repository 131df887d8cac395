"""The page of sound rows, made from the files that the tests have `check` judge."""

from __future__ import annotations

import json

from sound_rows import SOUND_ROWS


def sound_rows_page() -> str:
    """Return the page of sound rows that look like faults."""
    lines = [
        "# Sound rows",
        "",
        "If `mistral-lora check` lists your rows under *look at these*, compare them with this page. It has files that",
        "look like faults and are sound, with one row each. `check` finds nothing in any of them:",
        "",
        "```console",
        "$ mistral-lora check rows.jsonl --tokenizer spm-v3",
        "```",
        "",
        "A sign in your texts is a note, which fails no check by itself. It does not count if the prompt asks for it",
        "or has it itself, and not in code and quotations. An error needs a proof ([rules](rules.md)). If a sound file",
        "of yours is accused, report a wrong verdict with the form of this repository.",
        "",
        "This page is made by `scripts/write_docs.py` from `tests/support/sound_rows.py`; the tests check each file.",
    ]
    for rows in SOUND_ROWS:
        lines += ["", f"## {rows.title}", "", rows.why, "", "```json"]
        lines += [json.dumps(file[0], ensure_ascii=False) for file in rows.files]
        lines += ["```"]
    return "\n".join(lines) + "\n"
