from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.checkpoint.weights import read_header
from pytest_mistral_lora.errors import InputError

BOUNDED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=40)
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def written(file: Path, header: bytes, data: bytes = bytes(4)) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def padded(length: int, **metadata: str) -> bytes:
    """A sound header of this many bytes."""
    return json.dumps({"__metadata__": metadata, "a": ENTRY}).encode().ljust(length)


# the first two bytes of these lengths are those of a pickle or of a zip file
LOOKALIKES = [low + high * 65536 for low in (640, 896, 1152, 1408, 19280) for high in (0, 1, 3)]


@pytest.mark.parametrize("length", LOOKALIKES)
def test_a_header_whose_length_begins_as_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", padded(length))
    with safe_open(file, framework="pt") as content:
        assert list(content.keys()) == list(read_header(file))


@pytest.mark.parametrize("length", LOOKALIKES)
def test_such_a_file_that_is_cut_off_is_no_pickle(length: int, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", padded(length)[:-40], b"")
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(InputError, match="cut off"):
        read_header(file)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_named(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(pickle.dumps({"a": [1, 2, 3]}, protocol))
    with pytest.raises(InputError, match="a pickle under the name"):
        read_header(file)
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(InputError, match="a pickle under the name"):
        read_header(file)


def test_every_length_of_a_header_is_read(tmp_path: Path) -> None:
    for length in (*range(120, 2000), *range(19270, 19290), *range(66170, 66180)):
        assert list(read_header(written(tmp_path / "a.safetensors", padded(length)))) == ["a"]


@settings(BOUNDED, max_examples=150)
@given(
    tensors=st.dictionaries(
        NAMES, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), min_size=1, max_size=12
    ),
    metadata=st.dictionaries(NAMES, st.text(st.characters(codec="utf-8"), max_size=3000), max_size=3),
)
def test_whatever_safetensors_writes_is_read(
    tensors: dict[str, Any], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    tensors.pop("__metadata__", None)
    save_file({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}, file, metadata)
    assert {name: list(info.shape) for name, info in read_header(file).items()} == {
        name: shape for name, (_, shape) in tensors.items()
    }


@settings(BOUNDED, max_examples=300)
@given(
    at=st.integers(0, 200),
    cut=st.integers(0, 12),
    put=st.one_of(st.binary(max_size=12), st.sampled_from([b"[" * 5000, b"9" * 4000, b"1e999", b"NaN", b"{", b"}"])),
)
def test_a_damaged_header_is_refused_or_read_but_never_an_error_of_its_own(
    at: int, cut: int, put: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    sound = len(padded(200)).to_bytes(8, "little") + padded(200, format="pt") + bytes(4)
    file.write_bytes(sound[:at] + put + sound[at + cut :])
    try:
        found = list(read_header(file))
    except InputError as error:
        found = [str(error)]
    assert len("".join(found)) < 5000


HOSTILE: dict[str, Callable[[], bytes]] = {  # made when they are used: some have megabytes
    "a shape whose product takes hours": lambda: (
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"9," * 4_000_000 + b"1]}}"
    ),
    "sizes of thousands of digits": lambda: (
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + b"9" * 4000 + b"]}}"
    ),
    "an offset beyond 64 bits": lambda: b'{"a":{"dtype":"F32","data_offsets":[0,73786976294838206464],"shape":[1]}}',
    "a shape that overflows": lambda: b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[9223372036854775807,4,4]}}',
    "one name twice": lambda: b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2),
    "a name of a megabyte": lambda: json.dumps({"a" * (1 << 20): {**ENTRY, "shape": [2]}}).encode(),
    "nested without end": lambda: b'{"a":' * 100_000,
    "lists in place of sizes": lambda: (
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":' + b"[" * 900 + b"]" * 900 + b"}}"
    ),
    "no object": lambda: b"[]" + b" " * 16_000_000,
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_soon_and_in_few_words(header: Callable[[], bytes], tmp_path: Path) -> None:
    file, start = written(tmp_path / "a.safetensors", header()), time.process_time()
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 5000


def test_a_header_longer_than_the_file_allocates_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((99_000_000).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="cut off: 10 bytes, with a header of 99000000"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"null",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"\\u001b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_that_is_not_one_is_refused_with_the_files_name(header: bytes, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", header)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        read_header(file)


def test_a_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(0, 4).bfloat16(), "c": torch.tensor(1).char()}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(file)
    assert {name: info.shape for name, info in header.items()} == {"a": (2, 3), "b": (0, 4), "c": ()}
    assert {name: info.dtype for name, info in header.items()} == {"a": "F32", "b": "BF16", "c": "I8"}
    assert header.keys() == load_file(file).keys()


def test_every_cut_of_a_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({f"layers.{n}.lora_{side}.weight": torch.ones(8, 32) for n in range(2) for side in "AB"}, file)
    data = file.read_bytes()
    for length in (*range(64), len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match="safetensors"):
            read_header(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="bytes too many"):
        read_header(file)
