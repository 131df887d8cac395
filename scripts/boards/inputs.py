"""What programs are given for the scoreboards: tokenizers, checkpoints, packaged rows and pairs, and real dialogues."""

from __future__ import annotations

import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.records.goldens import Case, PairCase, packaged_cases, packaged_pairs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HUB = "-hub"
"""Ends the names of checkpoints that also hold Mistral's own tokenizer file, as its repositories on the Hub do."""
DERIVED = ("derived-v11", "derived-v13", "derived-v15")
"""Tekken files of the versions that mistral-common knows and does not ship, derived from a shipped vocabulary."""
TOKENIZERS = (
    *("spm-v1", "spm-v3", "spm-v7", "tekken-240911", "spm-v3-hub", "tekken-240911-hub"),
    *(*DERIVED, f"derived-v13{HUB}"),
)
REAL_TOKENIZERS = ("spm-v3", "tekken-240911")
PAIR_TOKENIZERS = ("spm-v3", "tekken-240911", "derived-v15")


@cache
def tokenizer_file(name: str, words: int = 0) -> Path:
    """Return Mistral's tokenizer file of a checkpoint of the scoreboard; a derived one is written once.

    Args:
        name: Its name.
        words: Ids of text of a derived one, if it is to have only the first of them: it then loads at once.
    """
    bare = name.removesuffix(HUB)
    file: Path = derived_tekken().derived_tokenizer(bare, words=words) if bare in DERIVED else shipped_tokenizer(bare)
    return file


def derived_tekken() -> Any:
    """Return the module of the tests that derives a tokenizer file of each version."""
    sys.path.append(str(ROOT / "tests" / "support"))
    import derived_tekken

    return derived_tekken


@cache
def loaded(file: Path) -> CheckpointTokenizer:
    """Return the tokenizer of a file, whose oracle is loaded once for all names and rows."""
    return CheckpointTokenizer(file)


def oracle(tokenizer: str) -> Oracle:
    """Return Mistral's own tokenization."""
    return loaded(tokenizer_file(tokenizer)).oracle


@cache
def cases(tokenizer: str) -> list[Case]:
    """Return the packaged rows that a tokenizer's version encodes."""
    return [case for case in packaged_cases() if case.fits(oracle(tokenizer))]


@cache
def pair_cases(tokenizer: str) -> list[PairCase]:
    """Return the packaged pairs that a tokenizer's version encodes."""
    return [case for case in packaged_pairs() if case.fits(oracle(tokenizer))]


def checkpoint(name: str, folder: Path) -> Path:
    """Return the tokenizer file of a name; for a name that ends in `-hub`, a folder that is made here.

    A derived file is written into the folder.
    """
    bare = name.removesuffix(HUB)
    if bare in DERIVED:
        folder.mkdir()
        file: Path = derived_tekken().write_derived(bare, folder)
    else:
        file = shipped_tokenizer(bare)
    if name == bare:
        return file
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    if bare not in DERIVED:
        shutil.copy(file, folder / (TEKKEN if file.suffix == ".json" else f"tokenizer.model{file.suffix}"))
    return folder


def real_rows() -> list[Row]:
    """Return the English dialogues of the package chatterbot-corpus, with two turns or more."""
    from importlib.resources import files

    import yaml

    rows = []
    for file in sorted((files("chatterbot_corpus") / "data" / "english").iterdir(), key=lambda file: file.name):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn) for turn in talk[: len(talk) // 2 * 2]]
            if turns:
                roles = ("user", "assistant") * (len(turns) // 2)
                messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
                rows.append(parse_row({"messages": messages}))
    return rows
