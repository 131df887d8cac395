"""GGUF files that are mutated part by part: each is read, or is an input error; its checks end in findings alone.

Seeded, and bounded by `fuzzing.SECONDS`. A failure names its seed.
"""

from __future__ import annotations

import random
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS
from gguf_files import tokenizer_fields
from raw_gguf import ARRAY, CODES, STRING, RawGguf, RawTensor, array, plain, scalar, text
from sampling import sampled

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.model_targets import GgufTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.gguf_file import GgufFile

LONGEST_S, MOST_BYTES = 20.0, 1 << 30
NUMBERS = (0, 1, 2, 3, 7, 8, 24, 31, 32, 33, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
NAMES: tuple[str | bytes, ...] = (
    *("", "a", "a\0b", "a\nb", "\x1b[2J", "\u202e", "é", "x" * 1001, b"\xff\xfe", b"\xed\xa0\x80"),
    *("general.alignment", "general.type", "split.count", "tokenizer.ggml.tokens", "tokenizer.chat_template"),
)
Mutation = Callable[[random.Random, RawGguf], RawGguf]


def value(chance: random.Random) -> bytes:
    """Return a value of any type, often of a wrong one, or of a length that it does not have."""
    kind = chance.randrange(14)
    if kind == STRING:
        return struct.pack("<I", STRING) + text(chance.choice(NAMES), chance.choice((None, None, *NUMBERS)))
    if kind == ARRAY:
        inner = chance.choice((*CODES, STRING, STRING, ARRAY, 13))
        if inner not in CODES and inner != STRING:
            return struct.pack("<IIQ", ARRAY, inner, chance.choice(NUMBERS)) + plain(1)
        one: Any = chance.choice(NAMES) if inner == STRING else chance.choice((0, 1))
        return array(inner, [one] * chance.randrange(4), chance.choice((None, None, *NUMBERS)))
    if kind in CODES:
        return scalar(kind, chance.choice((0, 1)))
    return struct.pack("<I", kind) + bytes(8)


def other_key(chance: random.Random, made: RawGguf) -> RawGguf:
    keys = list(made.keys)
    name = chance.choice((*NAMES, *(name for name, _ in keys)))
    keys.insert(chance.randrange(len(keys) + 1), (name, value(chance)))
    return replace(made, keys=keys)


def other_value(chance: random.Random, made: RawGguf) -> RawGguf:
    keys = list(made.keys)
    place = chance.randrange(len(keys))
    keys[place] = (keys[place][0], value(chance))
    return replace(made, keys=keys)


def without_a_key(chance: random.Random, made: RawGguf) -> RawGguf:
    keys = list(made.keys)
    del keys[chance.randrange(len(keys))]
    return replace(made, keys=keys or made.keys)


def other_tensor(chance: random.Random, made: RawGguf) -> RawGguf:
    tensors = list(made.tensors)
    place = chance.randrange(len(tensors))
    parts: dict[str, Any] = {
        "name": chance.choice((*NAMES, tensors[0].name)),
        "dimensions": tuple(chance.choice((0, 1, 8, 32, *NUMBERS)) for _ in range(chance.randrange(6))),
        "kind": chance.choice((*range(45), 99, 2**32 - 1)),
        "offset": chance.choice(NUMBERS),
        "count": chance.choice((0, 1, 4, 5, 2**32 - 1)),
    }
    part = chance.choice([*parts])
    tensors[place] = replace(tensors[place], **{part: parts[part]})
    return replace(made, tensors=tensors)


def other_counts(chance: random.Random, made: RawGguf) -> RawGguf:
    part = chance.choice(("key_count", "tensor_count", "version"))
    number = chance.choice(NUMBERS)
    return replace(made, **{part: number % 2**32 if part == "version" else number})


def other_alignment(chance: random.Random, made: RawGguf) -> RawGguf:
    return replace(made, keys=[*made.keys, ("general.alignment", plain(chance.choice(NUMBERS) % 2**32))])


MUTATIONS: tuple[Mutation, ...] = (
    *(other_key, other_value, other_tensor, without_a_key),
    *(other_counts, other_alignment),
)


def other_bytes(chance: random.Random, content: bytes) -> bytes:
    """Return bytes that are cut off, or of which a few are others."""
    changed = bytearray(content)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(changed))
        changed[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))[: chance.choice((1, 4, 8))]
    return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.1 else changed)


def mutated(seed: int, made: RawGguf, mutations: Sequence[Mutation] = MUTATIONS) -> bytes:
    chance = random.Random(seed)
    for _ in range(chance.randrange(1, 4)):
        made = chance.choice(mutations)(chance, made)
    return other_bytes(chance, made.encoded()) if chance.random() < 0.3 else made.encoded()


@cache
def small() -> RawGguf:
    keys: dict[str | bytes, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "東"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.5, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    tensors = [RawTensor("a.weight"), RawTensor("b.weight", (8, 4), 0, 128), RawTensor("c.weight", (32, 2), 8, 256)]
    return RawGguf([(name, plain(one)) for name, one in keys.items()], tensors, bytes(256 + 96))


@cache
def real(name: str) -> RawGguf:
    """A file with the tokenizer of a real one."""
    oracle = Oracle(shipped_tokenizer(name))
    fields = {"general.architecture": "llama", **tokenizer_fields(oracle)}
    fields["tokenizer.chat_template"] = oracle.chat_template()
    return RawGguf([(key, plain(one)) for key, one in fields.items()], [RawTensor("a.weight")], bytes(128))


def seeds() -> Iterator[int]:
    """Yield seeds until the time is over, and compare time and memory of each with the bounds."""
    end, seed = time.monotonic() + SECONDS, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    while time.monotonic() < end:
        start = time.process_time()
        yield seed
        assert time.process_time() - start < LONGEST_S, f"seed {seed} takes {time.process_time() - start:.0f} s"
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        assert used < MOST_BYTES, f"up to seed {seed}, {used >> 20} MiB more"
        seed += 1


def test_a_mutated_file_is_read_or_is_an_input_error(tmp_path: Path) -> None:
    file, ends = tmp_path / "x.gguf", Counter[str]()
    for seed in seeds():
        file.write_bytes(mutated(seed, small()))
        try:
            read = GgufFile(file)
            _ = read.vocabulary, read.template
            for name in read.tensors:
                read.kind_of(name)
                read.values(name)
            ends["read"] += 1
        except InputError:
            ends["refused"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
    assert min(ends["read"], ends["refused"]) > 10
    print(f"\nGGUF headers: {dict(ends)}")  # noqa: T201, the counts of a longer run


@pytest.mark.parametrize("name", sampled(["spm-v3", "tekken-240911"], ("spm-v3",)))
def test_the_checks_of_a_mutated_file_end_in_findings(name: str, tmp_path: Path) -> None:
    file, ends = tmp_path / "x.gguf", Counter[str]()
    target, settings = Target(name, shipped_tokenizer(name)), Settings(1, None, "cpu", True, (), False, tmp_path)
    made = real(name)
    for seed in seeds():
        # a header that can be read comes to the checks
        file.write_bytes(mutated(seed, made, (*MUTATIONS, *[other_value, without_a_key] * 6)))
        try:
            checks = collect([GgufTarget("x", file, judge=target)], settings)
            found = [finding for check in checks for finding in check.run().findings]
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        ends.update({finding.rule for finding in found} or {"none"})
    assert ends
    print(f"\nGGUF checks, {name}: {dict(ends)}")  # noqa: T201, the counts of a longer run
