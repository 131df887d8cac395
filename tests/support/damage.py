"""Seeded damage to healthy files, as a broken download, an editor or a forger makes it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = 20_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf")),
    *("", " ", "x" * 5000, "\u0000", "\ud800", "é\u202e", "../../x", "/dev/zero", "__class__", "=", "v99", "9" * 5000),
    *([], {}, [[]], [{}], {"": None}, [0] * 300, [None], ["a", 1, None], {"a": {"b": []}}),
)


def damaged_values(healthy: Any, seed: int) -> Any:
    """Return a copy of a JSON value with one to three places changed, removed, doubled, renamed or swapped."""
    rng = random.Random(seed)
    value = copy.deepcopy(healthy)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        # the places near the root are few, and decide the most
        holder, key = rng.choice(places if rng.random() < 0.5 else places[:40])
        deed = rng.randrange(6)
        if deed <= 2:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif deed == 3:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        else:
            other = rng.choice([*holder, "x", key.upper(), key + " ", ""])
            holder[other], holder[key] = holder[key], holder.get(other)
    return rng.choice(VALUES) if rng.random() < 0.03 else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the holder and key of each value within a JSON value, those nearest to the root first."""
    level = [value]
    while level:
        holders = [one for one in level if isinstance(one, dict | list)]
        keys = [(one, list(one) if isinstance(one, dict) else range(min(len(one), 60))) for one in holders]
        places = [(one, key) for one, all_keys in keys for key in all_keys]
        yield from places
        level = [one[key] for one, key in places]


def damaged_bytes(healthy: bytes, seed: int) -> bytes:
    """Return bytes of which some are cut off, changed, doubled or put in."""
    rng = random.Random(seed)
    data = bytearray(healthy)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 200)))
        deed = rng.randrange(6)
        if deed == 0:
            del data[at:]
        elif deed == 1:
            del data[at:end]
        elif deed == 2:
            data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
        elif deed == 3:
            data[at:at] = data[at:end] * rng.choice((1, 3))
        elif deed == 4:
            data[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5000, b"}", b'"', b"\\")
            )
        else:
            data[at:end] = data[at:end].swapcase()
    return bytes(data)


def damaged_json(healthy: Any, seed: int) -> bytes:
    """Return a JSON file with damage to its values, or to its bytes."""
    if seed % 4 == 0:
        return damaged_bytes(json.dumps(healthy).encode(), seed)
    # NaN, infinity and lone surrogates are what Python's own writer lets through
    return json.dumps(damaged_values(healthy, seed)).encode()
