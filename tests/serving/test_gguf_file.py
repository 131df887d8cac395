"""The reader of GGUF files: the same as the package `gguf` reads, and an error of our own for every damaged file."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.gguf_file import GgufFile

FIELDS = {
    "a.text": "é\n",
    "a.number": 7,
    "a.real": 1.5,
    "a.flag": True,
    "a.words": ["x", "", "東京"],
    "a.list": [1, -2],
}
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {"blk.0.attn_q.weight": RANDOM.normal(size=(4, 64)), "output_norm.weight": RANDOM.normal(size=64)}
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(file, FIELDS, {name: one.astype(np.float32) for name, one in tensors.items()})


def test_fields_and_tensors_are_those_that_the_package_reads(small: Path) -> None:
    own, other = GgufFile(small), gguf.GGUFReader(small)
    names = [name for name in other.fields if not name.startswith("GGUF.")]
    assert own.fields == {name: other.fields[name].contents() for name in names}
    assert own.fields.items() >= FIELDS.items()
    for tensor in other.tensors:
        assert own.tensors[tensor.name].start == tensor.data_offset
        np.testing.assert_array_equal(own.values(tensor.name), tensor.data.reshape(own.tensors[tensor.name].shape))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_quantised_numbers_are_those_that_the_package_dequantises(kind: str, tmp_path: Path) -> None:
    values, type_ = RANDOM.normal(size=(6, 96)).astype(np.float32), gguf.GGMLQuantizationType[kind]
    file = GgufFile(write_gguf(tmp_path / "one.gguf", {}, {"blk.0.ffn_up.weight": values}, kind=type_))
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)
    np.testing.assert_array_equal(file.values("blk.0.ffn_up.weight"), expected)
    assert file.kind_of("blk.0.ffn_up.weight") == kind


@given(data=st.data())
def test_a_damaged_file_is_an_error_of_our_own(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(small.read_bytes())
    header = content.index(b"output_norm.weight") + 40
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, header))
        if data.draw(st.booleans()):
            content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        else:
            content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, header]))]
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(content)
    with suppress(InputError):
        found = GgufFile(file)
        _ = found.vocabulary, found.template, found.architecture
        for name in found.tensors:
            found.values(name)
