"""The page of Mistral's recordings, made from the recorded results when the site is built."""

from __future__ import annotations

import tomllib

from mistral_recordings import REQUESTS, RESULTS, TOKENIZERS

_CLASSES = {
    "same": "same ids",
    "refused by both": "refused by both",
    "refused here": "refused here alone",
    "media, refused here": "images or audio: refused here",
}
"""The classes of the results, with their titles."""


def recordings_page() -> str:
    """Return the page, as Markdown."""
    results = tomllib.loads(RESULTS.read_text(encoding="utf-8"))
    samples, requests = results["samples"], results["requests"]
    commit = f"[{results['repository']}](https://github.com/{results['repository']}/tree/{results['commit']})"
    lines = [
        "# Mistral's recordings",
        "",
        "To compare this package with what Mistral recorded, run:",
        "",
        "```console",
        "$ tox run -e recordings",
        "```",
        "",
        f"It fetches files of {commit} at the commit {results['commit'][:7]}, each with its SHA-256, and compares the",
        f"ids under mistral-common {results['mistral_common']}. Their texts are not stored here.",
        "",
        "## Recorded prompts",
        "",
        "The repository has conversations with the ids of their prompts, which Mistral recorded for v1, v2 and v3. The",
        "ids of this package are the recorded ones, or the installed mistral-common refuses the conversation, too.",
        "",
        "| conversation and version | result |",
        "|---|---|",
        *(f"| {name} | {_CLASSES[found]} |" for name, found in samples.items()),
        "",
        "## Requests",
        "",
        f"mistral-common's own tests encode the {sum(next(iter(requests.values())).values())} requests of",
        f"`{REQUESTS}`: prompts, and whole conversations for training. Each is converted by its own `to_openai`, read",
        "as a row, and encoded; mistral-common encodes the request itself.",
        "",
        f"| tokenizer | {' | '.join(_CLASSES.values())} |",
        f"|---|{'---:|' * len(_CLASSES)}",
    ]
    for tokenizer, counts in requests.items():
        numbers = " | ".join(str(counts.get(found, 0)) for found in _CLASSES)
        lines.append(f"| {tokenizer} ({TOKENIZERS[tokenizer]}) | {numbers} |")
    totals = (sum(counts.get(found, 0) for counts in requests.values()) for found in _CLASSES)
    lines += [
        f"| all | {' | '.join(map(str, totals))} |",
        "",
        "Refused here alone: tools on v1, which mistral-common leaves out without a word. A row cannot have images or",
        "audio, and mistral-common is not asked for them.",
        "",
        "A `derived-…` tokenizer is a file that the tests derive from a shipped vocabulary, with the special tokens of",
        "that version: mistral-common ships none of it.",
        "",
        "This page is made by `scripts/write_docs.py` from `tests/chat/recordings.toml`, which",
        "`scripts/mistral_recordings.py` writes.",
    ]
    return "\n".join(lines) + "\n"
