"""The classes and tokenizers of the bases that recipes name, as far as they are publicly known.

The classes are those of the first table in docs/checkpoints.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """What is known of a base.

    Attributes:
        label: The label of its `TinyKind`, or the name of a class that this package does not train.
        tokenizer: Our name of its tokenizer: shipped by mistral-common, or derived.
        is_instruct: Whether it was trained on conversations, so that their layout is Mistral's.
    """

    label: str
    tokenizer: str
    is_instruct: bool


_KNOWN = (
    (r"mixtral-8x", "mixtral", "spm-v1"),
    (
        r"mistral-7b(-instruct)?-v0\.3|mistral-small-instruct-2409|mistral-large-instruct-2407|codestral",
        "mistral",
        "spm-v3",
    ),
    (r"mistral-7b|open-mistral-7b|zephyr|biomistral|openhermes|wizardlm", "mistral", "spm-v1"),
    (r"mistral-nemo", "mistral", "tekken-240718"),
    (r"ministral-8b", "ministral", "tekken-240718"),
    (r"ministral-3-3b-reasoning", "wrapped-ministral3-tied", "derived-v13-thinking"),
    (r"ministral-3-3b", "wrapped-ministral3-tied", "derived-v13"),
    (r"ministral-3-\d+b-reasoning", "wrapped-ministral3", "derived-v13-thinking"),
    (r"ministral-3-|devstral-small-2-", "wrapped-ministral3", "derived-v13"),
    (r"devstral-2-123b", "ministral3", "derived-v13"),
    (r"devstral-small-2505", "mistral", "derived-v7"),
    (r"devstral-small-2507", "mistral", "derived-v13"),
    (r"magistral-small-2506", "mistral", "derived-v11"),
    (r"magistral-small-2507", "mistral", "derived-v13-thinking"),
    (r"magistral-small-2509", "wrapped-mistral", "derived-v13-thinking"),
    (r"mistral-small-24b|mistral-small-3-", "mistral", "derived-v7"),
    (r"mistral-small-3\.1", "wrapped-mistral", "derived-v7"),
    (r"mistral-small-3\.2", "wrapped-mistral", "derived-v11"),
    (r"mistral-small-4", "wrapped-mistral4", "derived-v15"),
    (r"mistral-medium-3\.5", "wrapped-ministral3", "derived-v15"),
    (r"pixtral-12b", "pixtral", "tekken-240911"),
    (r"voxtral-mini", "voxtral", "tekken-240911"),
)
_CONVERSES = re.compile(
    r"instruct|devstral|magistral|reasoning|codestral|zephyr|openhermes|small-4|medium|voxtral|pixtral"
)


def base_of(name: str) -> Base | None:
    """Return what is known of a base, by its name or path; None if nothing is."""
    bare = name.rpartition("/")[2].lower()
    for pattern, label, tokenizer in _KNOWN:
        if re.search(pattern, bare):
            return Base(label, tokenizer, _CONVERSES.search(bare) is not None)
    return None
