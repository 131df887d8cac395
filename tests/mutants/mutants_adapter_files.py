"""Adapter folders whose files are missing, damaged, or of another kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from bench_adapter import _BROKEN, COMMIT, CONFIG, LAYER, TENSORS
from gallery import Artifact, mutant
from trained import WEIGHTS, copied


@mutant("ML405", says="no such file")
def no_configuration(artifact: Artifact) -> None:
    """There is no adapter_config.json."""
    (artifact["folder"] / CONFIG).unlink()


@mutant("ML405", "I16", says="cut off")
def tensors_cut_off(artifact: Artifact) -> None:
    """The copy of the tensors ended early."""
    file = artifact["folder"] / TENSORS
    file.write_bytes(file.read_bytes()[:-1000])


@mutant("ML405", "I16", says="0 bytes")
def tensors_of_no_bytes(artifact: Artifact) -> None:
    """adapter_model.safetensors is an empty file."""
    (artifact["folder"] / TENSORS).write_bytes(b"")


@mutant("ML405", says="is a directory")
def tensors_are_a_folder(artifact: Artifact) -> None:
    """adapter_model.safetensors is a folder."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / TENSORS).mkdir()


@mutant("ML405", says="header")
def header_without_end(artifact: Artifact) -> None:
    """The file says that its header has 2 ** 62 bytes."""
    (artifact["folder"] / TENSORS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}" + bytes(100))


def _safetensors(file: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@mutant("ML405", says="16 bytes for F32 [1000000, 1000000]")
def header_that_lies_about_a_size(artifact: Artifact) -> None:
    """The header says a tensor of terabytes, with sixteen bytes of data."""
    entry = {"dtype": "F32", "shape": [1_000_000, 1_000_000], "data_offsets": [0, 16]}
    _safetensors(artifact["folder"] / TENSORS, {LAYER: entry}, bytes(16))


@mutant("ML405", says="overlap")
def tensors_that_overlap(artifact: Artifact) -> None:
    """Two tensors are the same bytes of the file."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    _safetensors(artifact["folder"] / TENSORS, {LAYER: entry, f"{LAYER}2": entry}, bytes(16))


@mutant("ML405", says="nested too deeply")
def header_nested_without_end(artifact: Artifact) -> None:
    """The header is a million opening brackets."""
    text = b"[" * 1_000_000
    (artifact["folder"] / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)


@mutant("ML405", says="leads out of the folder")
def tensors_linked_from_elsewhere(artifact: Artifact) -> None:
    """adapter_model.safetensors is a link to another folder."""
    file = artifact["folder"] / TENSORS
    outside = Path(file.rename(artifact["folder"].parent / "elsewhere.safetensors"))
    file.symlink_to(outside)


@mutant("ML405", says="leads nowhere")
def tensors_linked_to_nothing(artifact: Artifact) -> None:
    """adapter_model.safetensors is a link to itself."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / TENSORS).symlink_to(TENSORS)


@mutant("ML405", says="not valid JSON")
def configuration_not_in_utf_8(artifact: Artifact) -> None:
    """adapter_config.json has a byte that is no UTF-8."""
    (artifact["folder"] / CONFIG).write_bytes(b'{"r": "\xff"}')


@mutant("ML405", says="a JSON list")
def configuration_is_a_list(artifact: Artifact) -> None:
    """adapter_config.json is a list."""
    file = artifact["folder"] / CONFIG
    file.write_text(json.dumps([_BROKEN]))


@mutant("ML405", says="name that folder")
def adapter_of_another_name(artifact: Artifact) -> None:
    """PEFT saved an adapter that is not called `default` one folder below."""
    folder = artifact["folder"]
    (folder / "mine").mkdir()
    for name in (CONFIG, TENSORS):
        (folder / name).rename(folder / "mine" / name)


@mutant("ML405", says="sharded")
def adapter_in_shards(artifact: Artifact) -> None:
    """The adapter was split into shards, which PEFT does not load."""
    folder = artifact["folder"]
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00001.safetensors")


@mutant("ML405 ML406", says="pickle")
def weights_in_a_pickle_alone(artifact: Artifact) -> None:
    """The adapter is a pickle, and there are no safetensors."""
    (artifact["folder"] / TENSORS).unlink()
    (artifact["folder"] / "adapter_model.bin").write_bytes(pickle.dumps({}))


@mutant("ML406", says="adapter.pt")
def weights_in_a_pickle_too(artifact: Artifact) -> None:
    """There is a pickle beside the safetensors."""
    (artifact["folder"] / "adapter.pt").write_bytes(pickle.dumps({}))


@mutant("ML406", says="under the name of safetensors")
def pickle_named_safetensors(artifact: Artifact) -> None:
    """adapter_model.safetensors is a pickle."""
    (artifact["folder"] / TENSORS).write_bytes(pickle.dumps({"a": [1]}))


@mutant("ML405", says="nested too deeply")
def configuration_nested_too_deeply(artifact: Artifact) -> None:
    """A value is a list in a list, a hundred times."""
    (artifact["folder"] / CONFIG).write_text(f'{{"{_BROKEN}": {"[" * 100}{"]" * 100}}}')


@mutant("ML405 ML418", says="full model weights")
def full_weights_and_half_an_adapter(artifact: Artifact) -> None:
    """The folder holds a full model, and the configuration of an adapter without its tensors."""
    folder = artifact["folder"]
    artifact["config"]["revision"] = COMMIT  # which the manifest records
    for name in (TENSORS, "manifest.json"):
        (folder / name).unlink()
    copied(artifact["base"], folder / "base")
    (folder / "base" / WEIGHTS).rename(folder / WEIGHTS)
