"""The page of Mistral's recordings, made from the recorded results when the site is built."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from mistral_recordings import REQUESTS, RESULTS, ROOT, TOKENIZERS

_PARSER_CASES = ROOT / "tests" / "chat" / "parser_cases.toml"

_CLASSES = {
    "same": "same ids",
    "refused by both": "refused by both",
    "refused here": "refused here alone",
    "media, refused here": "images or audio: refused here",
}
"""The classes of the results, with their titles."""
_READ = {"same": "the same", "refused": "refused", "differs": "another message", "read here": "read, refused there"}
"""The results of parsers' cases, with their titles."""


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
        *_parsers(),
        "",
        "This page is made by `scripts/write_docs.py` from `tests/chat/recordings.toml`, which",
        "`scripts/mistral_recordings.py` writes, and from `tests/chat/parser_cases.toml`.",
    ]
    return "\n".join(lines) + "\n"


def _parsers() -> Iterator[str]:
    data = tomllib.loads(_PARSER_CASES.read_text(encoding="utf-8"))
    yield from ("## What vLLM and llama.cpp read of an answer", "")
    for name, source in data["sources"].items():
        link = f"[{source['repository']}](https://github.com/{source['repository']})"
        read = f"the commit {source['commit'][:7]}" if "commit" in source else f"{source['read']}"
        yield f"- {name}: `{source['file']}` of {link}, at {read}"
    yield from (
        "",
        "Their own tests have answers of Mistral's models, and say which message their parsers make of each. Here the",
        "answer is read back from its ids, whose markers are control tokens. The texts of vLLM for v11 leave out",
        "`[CALL_ID]` and `[ARGS]`, which the ids have. mistral-common's own decoder reads the same calls, or refuses.",
    )
    yield from ("", "| parser | answer | tokenizer | read here | difference |", "|---|---|---|---|---|")
    for case in data["case"]:
        refuses = "; mistral-common refuses it" if "mistral_common" in case else ""
        run = f"{case['source']} | {case['name']} | {case['tokenizer']}"
        yield f"| {run} | {_READ[case['result']]}{refuses} | {case.get('why', '')} |"
