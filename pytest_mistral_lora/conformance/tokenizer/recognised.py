"""The oracle of a folder without a Mistral tokenizer file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_mistral_lora.checkpoint.recognition import Recognition, spm_pieces
from pytest_mistral_lora.checkpoint.tokenizer_folder import NO_ORACLE, oracle_file
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import TokenizerError


def oracle(target: Target) -> Result:
    """Judge by which Mistral tokenizer a target can be judged: its own file, or one that is recognised or declared."""
    tokenizer = target.tokenizer
    tokenizer.files.refuse_hazards()
    own = oracle_file(tokenizer.path)
    if own is not None or not tokenizer.is_there:
        return Result()
    found = tokenizer.recognition
    if found.oracle is not None:
        return Result(facts=(("judged by", found.text),))
    if found.name == NO_ORACLE:
        return Result(not_checked=found.reason)
    rule, expected = ("ML230", "its own ids") if found.declared else ("ML229", "the vocabulary of a known tokenizer")
    return Result((Finding(rule, found.reason, str(tokenizer.path), expected),))


def other_pieces(file: Path, known: Recognition) -> Iterator[Finding]:
    """Yield ML211 if `tokenizer.model`, which llama.cpp and others load, is not the recognised tokenizer."""
    expected, oracle = f"{known.name}, by which the folder is recognised", known.oracle
    if oracle is None or oracle.kind != "spm":
        yield Finding("ML211", f"{file.name} stands beside a byte-level tokenizer", str(file), expected)
        return
    try:
        have, want = spm_pieces(file), spm_pieces(oracle.path)
    except TokenizerError as error:
        yield Finding("ML209", error.found, error.place, "a SentencePiece model")
        return
    differ = [number for number, (one, other) in enumerate(zip(have, want, strict=False)) if one != other]
    if differ or len(have) < len(want):
        first = differ[0] if differ else len(have)
        shown = have[first] if first < len(have) else "missing"
        found = f"{file.name} has other pieces or scores in {len(differ):,} places, the first is {first}: {shown}"
        yield Finding("ML211", found, str(file), f"{want[first]}, as {expected}")
