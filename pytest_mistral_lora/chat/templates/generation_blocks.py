"""Put `{% generation %}` blocks into a chat template, so that transformers can mark the assistant's characters.

The official templates have none, and transformers then returns a mask of zeros with one line in the log
(huggingface/transformers#34172). The blocks are put around the branch that renders an assistant message. The result
need not be trusted: its callers compare its rendering with the original's, byte by byte, row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(
    r"""\{%[-+]?\s*(?P<word>\w+)(?P<rest>(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^%'"]|%(?!\}))*)%\}"""
    r"""|\{\#.*?\#\}|\{\{.*?\}\}""",
    re.DOTALL,
)
_ASSISTANT = re.compile(r"""(?:\[\s*['"]role['"]\s*\]|\.role)\s*==\s*['"](?:assistant|model)['"]""")
_OPENS = {"if", "for", "macro", "call", "filter", "block", "generation"}
_V1_SPACE = re.compile(r"""\n *\{%- if loop\.index < loop\.length %\}\n *\{\{- " " \}\}\n *\{%- endif %\}""")


def has_generation(source: str) -> bool:
    """Return whether a template marks the assistant's text itself."""
    return any(tag["word"] == "generation" for tag in _TAG.finditer(source))


def with_generation(source: str) -> str | None:
    """Return a template with each assistant branch inside a generation block, or None if it has no such branch."""
    source = _space_into_assistant_branch(source)
    edits: list[tuple[int, str]] = []
    for branch in _assistant_branches(source):
        edits.append((branch.start, f"{{% generation {branch.trims_after}%}}"))
        edits.append((branch.end, f"{{%{branch.trims_before} endgeneration %}}"))
    for position, text in reversed(edits):
        source = source[:position] + text + source[position:]
    return source if edits else None


@dataclass(frozen=True, slots=True)
class _Branch:
    """The body of an `if` or `elif` branch: from the end of its tag to the start of the next tag of that `if`.

    The whitespace control of both tags (`-` or nothing) is kept by the blocks that go between them.
    """

    start: int
    end: int
    trims_after: str
    trims_before: str


def _assistant_branches(source: str) -> list[_Branch]:
    branches: list[_Branch] = []
    open_tags: list[re.Match[str] | None] = []
    for tag in _TAG.finditer(source):
        word, rest = tag["word"], tag["rest"]
        if word is None:
            continue
        if word in ("elif", "else") or word.startswith("end"):
            start = open_tags.pop() if open_tags else None
            # A branch without content only checks the order of roles.
            if start is not None and "content" in source[start.end() : tag.start()]:
                trims_after = "-" if source[: start.end()].endswith("-%}") else ""
                trims_before = "-" if source.startswith("{%-", tag.start()) else ""
                branches.append(_Branch(start.end(), tag.start(), trims_after, trims_before))
        if word in _OPENS or word in ("elif", "else") or (word == "set" and "=" not in rest):
            is_branch = word in ("if", "elif") and _ASSISTANT.search(rest)
            open_tags.append(tag if is_branch else None)
    return branches


def _space_into_assistant_branch(source: str) -> str:
    """Move the space before an answer of a v1 template from the user branch into the assistant branch."""
    # SentencePiece makes that space a part of the answer's first token, or a token of its own before a digit: in the
    # user branch, it would be a token without loss.
    moved = _V1_SPACE.sub("", source)
    branches = _assistant_branches(moved)
    if moved == source or len(branches) != 1:
        return source
    start = branches[0].start
    return moved[:start] + '{{- " " }}' + moved[start:]
