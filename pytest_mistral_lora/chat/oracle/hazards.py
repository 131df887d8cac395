"""Refuse a damaged `tekken.json` or `tokenizer.json` before the libraries open it.

They take a file of unknown origin at its word: a number of special tokens with nine digits becomes as many objects, a
pattern of nested repetitions fills the memory, a normalizer doubles a text 28 times, and a vocabulary without single
bytes is a panic on the first text. Code in Rust ends the whole process if the memory is not enough.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.errors import TokenizerError, shortened
from pytest_mistral_lora.places import Place

_MIB = 1 << 20
MAX_BYTES = 64 * _MIB
"""Released files have at most 20 MiB."""
MAX_CONTAINERS = 1_500_000
"""Lists and objects in a JSON file: a vocabulary of 262,144 tokens with its merges has a third of that."""
_MAX_SPECIAL = 65_536
_MAX_SETTING = 100_000
_MAX_SETTINGS = {"num_mel_bins": 1024, "window_size": 65_536}
_MAX_GROWTH = 100
_MAX_PADDING = 1_000_000
_MAX_PATTERN = 4_000
_MAX_REPETITIONS = 10_000
_BYTES = 256
_ENTRY = frozenset(("rank", "token_bytes", "token_str"))
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: a JSON file can hold it, a text cannot."""
_COUNTED = re.compile(r"\{(\d+)(?:,(\d*))?\}")

PROBE = "".join(f"{run * 400}\n" for run in ("a", "A", "1", " ", "-", "é", "aA", "a ", "\r\n", "☃"))
"""Long runs of each kind of character that patterns tell apart."""


def refuse_damaged(path: Path, read: Callable[[], bytes] | None = None) -> None:
    """Refuse a Tekken file that cannot be a tokenizer's.

    Args:
        path: The file.
        read: Returns its bytes; None to read it.

    Raises:
        TokenizerError: With the key of the first fault.
    """
    data = _read_tekken(path) if read is None else read()
    if len(data) > MAX_BYTES:
        raise TokenizerError(f"more than {MAX_BYTES // _MIB} MiB", place=str(path), expected="a tekken.json")
    # empty lists and objects take twenty times the memory that they take on disk
    if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
        found = f"more than {MAX_CONTAINERS:,} lists and objects"
        raise TokenizerError(found, place=str(path), expected="a tekken.json")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"not valid JSON: {error}", place=str(path), expected="a tekken.json") from error
    for place, found, expected in _faults(value):
        next_step = "Download the file again, and compare its SHA-256 with that of the release."
        raise TokenizerError(found, place=Place.of(path) / place, expected=expected, next_step=next_step)


def _read_tekken(path: Path) -> bytes:
    with opened(path) as file:
        return file.read(MAX_BYTES + 1)


def _faults(value: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the value found and the value expected of each fault, the cheap ones first."""
    config = value.get("config") if isinstance(value, dict) else None
    vocab = value.get("vocab") if isinstance(value, dict) else None
    if not isinstance(config, dict) or not isinstance(vocab, list):
        yield "config and vocab", shortened(value), "an object and a list"
        return
    specials = config.get("default_num_special_tokens")
    size = config.get("default_vocab_size")
    if type(specials) is not int or not 1 <= specials <= _MAX_SPECIAL:
        yield "config.default_num_special_tokens", shortened(specials), f"a number from 1 to {_MAX_SPECIAL:,}"
        return
    most = len(vocab) + specials
    if type(size) is not int or not specials + _BYTES <= size <= most:
        yield "config.default_vocab_size", shortened(size), f"a number from {specials + _BYTES:,} to {most:,}"
        return
    if not isinstance(config.get("version"), str):
        yield "config.version", shortened(config.get("version")), "a version such as v3"
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        yield "config.pattern", shortened(pattern), "a regular expression"
    elif hazard := pattern_hazard(pattern):
        yield "config.pattern", hazard, f"at most {_MAX_PATTERN:,} characters and {_MAX_REPETITIONS:,} repetitions"
    yield from _special_faults(value.get("special_tokens"), specials)
    for section in ("image", "multimodal", "audio"):
        for key, number in _numbers(value.get(section), section):
            highest = _MAX_SETTINGS.get(key.rpartition(".")[2], _MAX_SETTING)
            if not 0 <= number <= highest:
                yield key, shortened(number), f"a number from 0 to {highest:,}"
    yield from _vocab_faults(vocab[: size - specials])


def pattern_hazard(pattern: str) -> str:
    """Return why a regular expression must not be compiled; empty if it may be."""
    if len(pattern) > _MAX_PATTERN:
        return shortened(pattern)
    repetitions = 1
    # nested or not, each {n} copies the part before it: their product bounds the size of the compiled expression
    for least, most in _COUNTED.findall(pattern):
        repetitions *= max(1, int(least[:9]), int(most[:9] or 0))
    return f"{shortened(pattern)}, which repeats parts {repetitions:,} times" if repetitions > _MAX_REPETITIONS else ""


def _special_faults(specials: Any, number: int) -> Iterator[tuple[str, str, str]]:
    if specials is None:
        return
    if not isinstance(specials, list) or len(specials) > number:
        yield "special_tokens", shortened(specials), f"a list of at most {number:,} tokens"
        return
    ranks, literals = set[int](), set[str]()
    for index, token in enumerate(specials):
        rank, literal = (token.get("rank"), token.get("token_str")) if isinstance(token, dict) else (None, None)
        # both a gap and a double would leave an id without a token
        if type(rank) is not int or not 0 <= rank < len(specials) or rank in ranks:
            yield f"special_tokens[{index}].rank", shortened(rank), f"each number below {len(specials):,} once"
            return
        if not isinstance(literal, str) or not literal or literal in literals or _SURROGATE.search(literal):
            yield f"special_tokens[{index}].token_str", shortened(literal), "a text that no other token has"
            return
        ranks.add(rank)
        literals.add(literal)


def _vocab_faults(vocab: list[Any]) -> Iterator[tuple[str, str, str]]:
    seen: dict[bytes, int] = {}
    for index, entry in enumerate(vocab):
        if not isinstance(entry, dict) or entry.keys() != _ENTRY:
            yield f"vocab[{index}]", shortened(entry), "an object with rank, token_bytes and token_str"
            return
        rank, encoded, text = entry["rank"], entry["token_bytes"], entry["token_str"]
        if type(rank) is not int or rank != index:
            yield f"vocab[{index}].rank", shortened(rank), str(index)
            return
        if text is not None and not isinstance(text, str):
            yield f"vocab[{index}].token_str", shortened(text), "a text or null"
            return
        try:
            decoded = base64.b64decode(encoded, validate=True)
        except (TypeError, ValueError):
            decoded = b""
        if not decoded or (index < _BYTES and decoded != bytes((index,))):
            expected = f"the base64 of byte {index}" if index < _BYTES else "base64 of one byte or more"
            yield f"vocab[{index}].token_bytes", shortened(encoded), expected
            return
        if (first := seen.setdefault(decoded, index)) != index:
            yield f"vocab[{index}].token_bytes", f"{shortened(encoded)}, as in vocab[{first}]", "bytes of its own"
            return


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}")
    elif isinstance(value, int | float):
        yield place, value


def json_hazard(value: Any) -> str:
    """Return the first dangerous setting of a parsed `tokenizer.json`; empty if it has none."""
    if not isinstance(value, dict):
        return ""
    padding = value.get("padding")
    if isinstance(padding, Mapping):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else None
        for name, number in (("strategy.Fixed", fixed), ("pad_to_multiple_of", padding.get("pad_to_multiple_of"))):
            if isinstance(number, int) and number > _MAX_PADDING:
                return f"padding.{name} is {number:,}; expected at most {_MAX_PADDING:,} tokens"
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(value.get(part)):
            pattern = step.get("pattern")
            kind, text = next(iter(pattern.items()), ("", "")) if isinstance(pattern, Mapping) else ("", "")
            if kind == "Regex" and isinstance(text, str) and (found := pattern_hazard(text)):
                return f"{part} has the pattern {found}"
            content = step.get("content")
            if part == "normalizer" and isinstance(content, str) and isinstance(text, str):
                # a regular expression, like an empty text, can match between any two characters
                growth *= max(1.0, len(content) / len(text) if kind == "String" and text else len(content) + 1)
    if growth <= _MAX_GROWTH:
        return ""
    return f"its normalizer can make a text {growth:,.0f} times as long; expected at most {_MAX_GROWTH} times"


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a component, or the components of a sequence."""
    waiting = [component]
    while waiting:
        step = waiting.pop()
        if isinstance(step, Mapping):
            yield step
            inner = [step.get(name) for name in ("normalizers", "pretokenizers", "decoders")]
            waiting += [item for items in inner if isinstance(items, list) for item in items]
