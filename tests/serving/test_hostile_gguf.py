"""GGUF files that no writer makes: each is an input error with its reason, or findings, never a traceback."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import tokenizer_fields
from raw_gguf import ARRAY, STRING, RawGguf, RawTensor, array, plain, text
from sampling import sampled

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.model_targets import GgufTarget
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records import gguf_file
from pytest_mistral_lora.records.gguf_file import GgufFile

KEYS: list[tuple[str | bytes, bytes]] = [("general.architecture", plain("llama"))]
SOUND = RawGguf(KEYS, [RawTensor("a.weight"), RawTensor("b.weight", (4, 8), 0, 128)], bytes(256))


def changed(**parts: Any) -> RawGguf:
    return replace(SOUND, **parts)


def with_keys(*keys: tuple[str | bytes, bytes], **parts: Any) -> RawGguf:
    return changed(keys=[*KEYS, *keys], **parts)


def with_tensor(*tensors: RawTensor, **parts: Any) -> RawGguf:
    return changed(tensors=[*tensors, RawTensor("z.weight", offset=128)], **parts)


FAULTS: dict[str, tuple[RawGguf | bytes, str]] = {
    "no dimensions": (with_tensor(RawTensor("a", ())), "the tensor 'a' of 0 dimensions"),
    "many dimensions": (with_tensor(RawTensor("a", (1, 1, 1, 1, 8))), "the tensor 'a' of 5 dimensions"),
    "2^32 dimensions": (with_tensor(RawTensor("a", (8,), count=2**32 - 1)), "of 4294967295 dimensions"),
    "an unknown type": (with_tensor(RawTensor("a", kind=99)), "the tensor 'a' of type 99"),
    "a type that was removed": (with_tensor(RawTensor("a", kind=4)), "the tensor 'a' of type 4"),
    "a dimension of 0": (with_tensor(RawTensor("a", (0, 8))), r"the tensor 'a' of shape \(8, 0\)"),
    "a row of no whole block": (with_tensor(RawTensor("a", (31,), kind=8)), r"'a' of shape \(31,\).*blocks of 32"),
    "a product of 2^256": (with_tensor(RawTensor("a", (2**64 - 1,) * 4)), "is cut off|multiple of 32"),
    "an offset behind the end": (with_tensor(RawTensor("a", offset=2**63)), "is cut off: 'a'"),
    "an offset beside the alignment": (with_tensor(RawTensor("a", offset=4)), "'a' begins at byte"),
    "overlapping tensors": (with_tensor(RawTensor("a", (64,))), "'z.weight' begins at byte"),
    "a tensor twice": (with_tensor(RawTensor("a"), RawTensor("a", offset=64)), "the tensor 'a' twice"),
    "a key twice": (with_keys(("x", plain(1)), ("x", plain(2))), "the key 'x' twice"),
    "a key with a NUL": (with_keys(("x\0y", plain(1))), r"a key 'x\\x00y'"),
    "a key with an escape": (with_keys(("x\x1b[2J", plain(1))), r"a key 'x\\x1b"),
    "a tensor with a line break": (with_tensor(RawTensor("a\nb")), r"a tensor 'a\\nb'"),
    "a long key": (with_keys(("x" * 2000, plain(1))), "a key 'xxx"),
    "a key that is no UTF-8": (with_keys((b"\xff\xfe", plain(1))), "a text in UTF-8"),
    "a text that is no UTF-8": (with_keys(("x", plain(b"\xff"))), "a text in UTF-8"),
    "an alignment of 0": (with_keys(("general.alignment", plain(0))), "general.alignment is 0"),
    "an alignment of 24": (with_keys(("general.alignment", plain(24))), "general.alignment is 24"),
    "an alignment of a text": (with_keys(("general.alignment", plain("32"))), "general.alignment is '32'"),
    "an alignment of true": (with_keys(("general.alignment", plain(True))), "general.alignment is True"),
    "an alignment of 2^31": (with_keys(("general.alignment", plain(2**31))), "is cut off"),
    "a text of 2^63 bytes": (with_keys(("x", struct.pack("<I", STRING) + text("a", 2**63))), "is cut off"),
    "a key of 2^64 - 1 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1) + bytes(99), "is cut off"),
    "an array of 2^62 numbers": (with_keys(("x", array(5, [1], 2**62))), "is cut off"),
    "an array of 2^60 texts": (with_keys(("x", array(STRING, ["a"], 2**60))), "is cut off"),
    "an array of arrays": (
        with_keys(("x", struct.pack("<IIQ", ARRAY, ARRAY, 1) + array(5, [1])[4:])),
        "an array of type 9",
    ),
    "an array of an unknown type": (with_keys(("x", struct.pack("<IIQ", ARRAY, 77, 1))), "an array of type 77"),
    "a value of an unknown type": (with_keys(("x", struct.pack("<I", 13))), "a value of type 13"),
    "10^12 keys": (changed(key_count=10**12), "is cut off, or claims 1,000,000,000,000 entries"),
    "10^12 tensors": (changed(tensor_count=10**12), "is cut off, or claims 1,000,000,000,000 entries"),
    "version 1": (changed(version=1), "has version 1"),
    "big-endian": (changed(order=">"), "has version 50331648"),
    "another magic": (b"ggjt" + bytes(100), "begins with b'ggjt'"),
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "begins with b'GGU'"),
    "an architecture of many letters": (changed(keys=[("general.architecture", plain("x" * 5000))]), "architecture is"),
    "an architecture of an escape": (changed(keys=[("general.architecture", plain("\x1b[2J"))]), "architecture is"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_input_error_with_its_reason(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, expected = FAULTS[name]
    file = tmp_path / "x.gguf"
    file.write_bytes(made if isinstance(made, bytes) else made.encoded())
    with pytest.raises(InputError, match=expected):
        GgufFile(file)
    # and in a check it is the finding of one
    [finding] = findings_of(file)
    assert finding.rule == "ML918"


def test_the_sound_twin_of_all_faults_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    for made in (SOUND, with_tensor(RawTensor("a"), RawTensor("b", offset=256), data=bytes(384))):
        file.write_bytes(made.encoded())
        read = GgufFile(file)
        assert read.architecture == "llama"
        assert [read.values(name).sum() for name in read.tensors] == [0] * len(made.tensors)


def test_a_file_that_is_cut_off_anywhere_is_an_input_error(tmp_path: Path) -> None:
    content = SOUND.encoded()
    file = tmp_path / "x.gguf"
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(InputError):
            GgufFile(file)


def test_the_types_are_those_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: gguf_file._TYPES.get(kind) for kind in sizes} == sizes


# made where they are used: a process of tests holds what is made here to its end
LARGE: dict[str, Callable[[], tuple[str | bytes, bytes]]] = {
    "numbers of a byte": lambda: ("x", array(0, [], 2**27) + bytes(2**27)),
    "numbers of two bytes": lambda: ("x", array(2, [], 2**26) + bytes(2**27)),
    "empty texts": lambda: ("x", array(STRING, [], 2**24) + bytes(2**27)),
    "a text": lambda: ("x", struct.pack("<I", STRING) + text("🙂" + "a" * 2**27)),
}


@pytest.mark.parametrize("name", sampled(LARGE, ("numbers of a byte",)))
def test_metadata_of_many_entries_is_refused_in_little_memory(name: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # a process of its own: to make the file takes more memory than to read it may take
        try:
            file = tmp_path / "x.gguf"
            file.write_bytes(with_keys(LARGE[name]()).encoded())
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
            GgufFile(file)
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"InputError"
    os.waitpid(child, 0)


def findings_of(file: Path, judge: str = "spm-v3") -> list[Finding]:
    from pytest_mistral_lora.conformance.targets import Target

    target = GgufTarget("x", file, judge=Target(judge, shipped_tokenizer(judge)))
    settings = Settings(1, None, "cpu", True, (), False, file.parent)
    return [finding for check in collect([target], settings) for finding in check.run().findings]


WRONG: dict[str, list[tuple[str, Any]]] = {
    "spm-v3": [
        *(("tokens", value) for value in ([1.5], [], 5, [b"\xff\xfe"])),
        *(("token_type", value) for value in (["x"] * 32768, 1.5, "xyz", [1])),
        *(("scores", value) for value in (["x"] * 32768, [float("nan")] * 32768, "x")),
        *(("eos_token_id", value) for value in (2**32 - 1, 1.5, "x" * 10**6, [5] * 100_000)),
        *(("model", value) for value in ([1], "x" * 10**6)),
    ],
    "tekken-240911": [
        # with numbers in place of texts, and with too few; the other types are tried on the smaller vocabulary
        *(("merges", value) for value in ([1], ["x"])),
        ("tokens", [1] * 131072),
        ("pre", "x" * 10**6),
    ],
}
"""Values of other types and lengths, by the tokenizer, and the key below `tokenizer.ggml`."""


@pytest.mark.parametrize("name", sampled(["spm-v3", "tekken-240911"], ["spm-v3"]))
def test_fields_of_other_types_are_findings_of_a_few_lines(name: str, tmp_path: Path) -> None:
    oracle = Oracle(shipped_tokenizer(name))
    fields = {"general.architecture": "llama", **tokenizer_fields(oracle)}
    encoded = {key: plain(value) for key, value in fields.items()}
    file = tmp_path / "x.gguf"
    for key, value in WRONG[name]:
        full = f"tokenizer.ggml.{key}"
        keys: list[tuple[str | bytes, bytes]] = [*{**encoded, full: plain(value)}.items()]
        file.write_bytes(changed(keys=keys).encoded())
        found = [one for one in findings_of(file, name) if one.rule == "ML912"]
        assert found, (key, str(value)[:50])
        assert all(len(one.text()) < 2500 for one in found), key


def test_an_input_error_ends_check_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(with_tensor(RawTensor("a", ())).encoded())
    assert main(["check", str(file), "--json"]) == 1
    output = capsys.readouterr()
    assert "of 0 dimensions" in output.out
    assert "Traceback" not in output.out + output.err
    assert json.loads(output.out)
