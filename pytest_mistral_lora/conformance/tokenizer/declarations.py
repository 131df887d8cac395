"""What the files of a folder declare of single tokens, and where two of them say different things."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizer_files import (
    ADDED_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TokenizerFiles,
)

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

Disagreement = tuple[str, str, str]
"""File name, found, expected."""


def disagreements(files: TokenizerFiles) -> Iterator[Disagreement]:
    """Yield what a file declares otherwise than `tokenizer.json` or `tokenizer_config.json`."""
    yield from _within_tokenizer_json(files)
    yield from _named_tokens(files)
    yield from _added_tokens(files)


def _within_tokenizer_json(files: TokenizerFiles) -> Iterator[Disagreement]:
    vocabulary = _vocabulary(files)
    seen: dict[int, str] = {}
    for token in _added(files):
        literal, number = token["content"], token["id"]
        if vocabulary.get(literal, number) != number:
            found = f"added_tokens has {literal!r} as {number}, model.vocab as {vocabulary[literal]}"
            yield TOKENIZER_JSON, found, "one id for a token"
        if seen.setdefault(number, literal) != literal:
            yield TOKENIZER_JSON, f"id {number} is {seen[number]!r} and {literal!r}", "one token for an id"
    if len(set(vocabulary.values())) != len(vocabulary):
        yield TOKENIZER_JSON, "model.vocab gives one id to two tokens", "one token for an id"


def _named_tokens(files: TokenizerFiles) -> Iterator[Disagreement]:
    config, special = files.json(TOKENIZER_CONFIG), files.json(SPECIAL_TOKENS)
    known = _known_literals(files)
    for name in _NAMES:
        main, other = _content(config.get(name)), _content(special.get(name))
        if main is not None and other is not None and main != other:
            yield SPECIAL_TOKENS, f"{name} is {other!r}", f"{main!r}, as in {TOKENIZER_CONFIG}"
        elif main is None and other is not None and name in config:
            yield SPECIAL_TOKENS, f"{name} is {other!r}", f"none, as in {TOKENIZER_CONFIG}"
        for file, literal in ((TOKENIZER_CONFIG, main), (SPECIAL_TOKENS, other)):
            if literal is not None and known and literal not in known:
                yield file, f"{name} {literal!r} is not a token of {TOKENIZER_JSON}", "a token that it has"


def _added_tokens(files: TokenizerFiles) -> Iterator[Disagreement]:
    """Compare the tables of added tokens with `tokenizer.json`, which is the one that loads."""
    if TOKENIZER_JSON not in files.names or not files.json(TOKENIZER_JSON):
        return
    added = {token["content"]: token for token in _added(files)}
    vocabulary = _vocabulary(files)
    for file, literal, number, flags in _tables(files):
        have = added.get(literal, {"id": vocabulary.get(literal)})
        if have["id"] != number:
            yield file, f"{literal!r} has the id {number}", f"{have['id']}, as in {TOKENIZER_JSON}"
        for flag in _FLAGS:
            if flag in flags and flag in have and flags[flag] != have[flag]:
                yield file, f"{literal!r} has {flag} {flags[flag]}", f"{have[flag]}, as in {TOKENIZER_JSON}"


def _tables(files: TokenizerFiles) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    decoder = files.json(TOKENIZER_CONFIG).get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and str(number).isdigit():
            yield TOKENIZER_CONFIG, str(token.get("content")), int(number), token
    for literal, number in files.json(ADDED_TOKENS).items():
        yield ADDED_TOKENS, literal, number, {}


def _vocabulary(files: TokenizerFiles) -> dict[str, int]:
    model = files.json(TOKENIZER_JSON).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        return {}  # transformers does not load it either
    return vocabulary


def _added(files: TokenizerFiles) -> list[dict[str, Any]]:
    tokens = files.json(TOKENIZER_JSON).get("added_tokens")
    return [token for token in tokens if _is_added(token)] if isinstance(tokens, list) else []


def _is_added(token: Any) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)


def _known_literals(files: TokenizerFiles) -> set[str]:
    return {*_vocabulary(files), *(token["content"] for token in _added(files))}


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
