"""The page of the site on the command line, made from the help of each verb; `write_docs.py` writes it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from unittest.mock import patch

from pytest_mistral_lora.cli import EXIT_CODES, VERBS, main

_COLUMNS = "100"
_ACTIONS = {"runner": ("setup", "list")}
"""The words after a verb that have a help of their own."""


def command_line_page() -> str:
    """Return the page: each verb's help in the groups of `mistral-lora --help`."""
    lines = [
        "# Command line",
        "",
        "To see the verbs and their options in your terminal, add `--help`:",
        "",
        *("```console", "$ mistral-lora --help", "$ mistral-lora check --help", "```"),
        "",
        "Every verb ends with one of these exit codes:",
        "",
        *("| code | meaning |", "|---|---|"),
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
        "This page is made by `scripts/write_docs.py` from the help of the program.",
    ]
    for group, verbs in VERBS.items():
        lines += ["", f"## {group[0].upper()}{group[1:]}"]
        for verb in verbs:
            lines += ["", f"### {verb}", "", *_help([verb])]
            lines += (line for action in _ACTIONS.get(verb, ()) for line in ("", *_help([verb, action])))
    return "\n".join(lines) + "\n"


def _help(words: list[str]) -> Iterator[str]:
    text = io.StringIO()
    # argparse takes the width and the colours from the environment
    with patch.dict(os.environ, COLUMNS=_COLUMNS, NO_COLOR="1"), redirect_stdout(text), suppress(SystemExit):
        main([*words, "--help"])
    yield from ("```text", text.getvalue().replace("\nFor all exit codes: mistral-lora --help", "").rstrip(), "```")
