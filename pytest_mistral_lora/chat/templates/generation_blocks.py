"""Put `{% generation %}` blocks into a chat template, and make spans of the tokens that they mark.

The official templates have no blocks, and transformers then returns a mask of zeros with one line in the log
(huggingface/transformers#34172). They are put around the branch that renders an assistant message. The result need not
be trusted: its callers compare its rendering with the original's, byte by byte, row by row.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.encoded import Span, SpanKind

# what has no end reaches to the end of the template, so that no part is searched twice for its end
_TAG = re.compile(
    r"""\{%[-+]?\s*(?P<word>\w+)(?P<rest>(?:'(?:\\.|[^'\\])*(?:'|\Z)|"(?:\\.|[^"\\])*(?:"|\Z)|[^%'"]|%(?!\}))*)"""
    r"""(?:%\}|\Z)|\{\#.*?(?:\#\}|\Z)|\{\{.*?(?:\}\}|\Z)""",
    re.DOTALL,
)
_ASSISTANT = re.compile(r"""(?:\[\s*['"]role['"]\s*\]|\.role)\s*==\s*['"](?:assistant|model)['"]""")
_OPENS = {"if", "for", "macro", "call", "filter", "block", "generation"}
_V1_SPACE = re.compile(r"""\n *\{%- if loop\.index < loop\.length %\}\n *\{\{- " " \}\}\n *\{%- endif %\}""")


def has_generation(source: str) -> bool:
    """Return whether a template marks the assistant's text itself."""
    return any(tag["word"] == "generation" for tag in _TAG.finditer(source))


def with_generation(source: str) -> str | None:
    """Return a template with each assistant branch inside a generation block, or None if it has no assistant branch."""
    # A v1 template writes the space before an answer in the user branch. SentencePiece makes that space a part of the
    # answer's first token, or a token of its own before a digit: there, it would be a token without loss.
    moved = _V1_SPACE.sub("", source)
    branches = _assistant_branches(moved)
    if moved != source and len(branches) == 1:
        start = branches[0].start
        source = moved[:start] + '{{- " " }}' + moved[start:]
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


_CALLED = ("__call__", "_encode_plus", "_batch_encode_plus", "_switch_to_input_mode", "backend_tokenizer")
"""The methods between a call of the tokenizer and its backend in transformers 4 and 5."""


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the ids that the call of a tokenizer gives each text, without BOS and EOS of its own.

    If the call is transformers' own, which only asks the backend, the backend is asked for all texts at once, without
    the places of the tokens: that takes half of the time.
    """
    if _asks_backend(tokenizer):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [tuple(encoding.ids) for encoding in encoded]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def offsets_of(tokenizer: Any, texts: Sequence[str]) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Return the ids of some texts like `ids_of`, and for each id its place in the text."""
    if _asks_backend(tokenizer):
        encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(tuple(encoding.ids), encoding.offsets) for encoding in encoded]
    called = (tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts)
    return [(tuple(result["input_ids"]), result["offset_mapping"]) for result in called]


def _asks_backend(tokenizer: Any) -> bool:
    """Return whether the call of a tokenizer, with its settings, only asks its backend and changes no id."""
    from transformers import PreTrainedTokenizerFast

    kind, overridden = type(tokenizer), vars(tokenizer)
    if any(
        name in overridden or getattr(kind, name, None) is not getattr(PreTrainedTokenizerFast, name, None)
        for name in _CALLED
    ):
        return False
    backend = tokenizer.backend_tokenizer
    settings = backend.truncation, backend.padding, backend.encode_special_tokens
    return settings == (None, None, bool(tokenizer.split_special_tokens))


def block_spans(
    special: Container[int],
    eos: int | None,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    blocks: Sequence[tuple[int, int]],
    weights: Sequence[int],
) -> Iterator[Span]:
    """Yield the spans of a row: turns of the assistant where its generation blocks are, and no turn elsewhere.

    Args:
        special: The ids of the control tokens.
        eos: The id of EOS.
        ids: The row's ids.
        offsets: The place of each id in the text.
        blocks: The generation blocks, in order.
        weights: The weight of each block.
    """
    # the block that each token overlaps, if any; both lists are in order
    owners: list[int | None] = []
    block = 0
    for start, end in offsets:
        while block < len(blocks) and start >= blocks[block][1]:
            block += 1
        owners.append(block if block < len(blocks) and end > blocks[block][0] else None)

    def kind_of_token(token: int, owner: int | None) -> SpanKind:
        if owner is not None and token == eos:
            return "eos"
        return "control" if token in special else "text"

    kinds = map(kind_of_token, ids, owners)
    start = 0
    for (owner, kind), run in itertools.groupby(zip(owners, kinds, strict=True)):
        end = start + len(list(run))
        role = None if owner is None else "assistant"
        yield Span(owner, role, kind, start, end, owner is not None and bool(weights[owner]))
        start = end
