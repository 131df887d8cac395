"""Files of a checkpoint folder that do not load, or do not belong together."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from bench_tokenizer import COMMIT, TOKENS, sentencepiece
from gallery import Artifact, mutant
from safetensors.torch import save_file

from pytest_mistral_lora.chat.oracle import shipped_tokenizer


@mutant("ML201 ML209", says="not valid JSON")
def truncated_tokenizer_json(artifact: Artifact) -> None:
    """`tokenizer.json` ends in its middle, as after a broken download."""
    _truncate(artifact["folder"] / "tokenizer.json")


@mutant("ML201 ML209", says="not valid JSON")
def truncated_tekken(artifact: Artifact) -> None:
    """`tekken.json` ends in its middle."""
    _truncate(artifact["folder"] / "tekken.json")


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


@mutant("ML201", says="there is no tokenizer")
def no_tokenizer_at_all(artifact: Artifact) -> None:
    """The folder has weights and configuration, and no tokenizer."""
    for name in ("tekken.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (artifact["folder"] / name).unlink()


@mutant("ML201")
def unknown_model_type(artifact: Artifact) -> None:
    """`tokenizer.json` has a model type that the library does not know."""
    artifact["tokenizer_json"]["model"]["type"] = "Unknown"


@mutant("ML201 ML209", says="is a directory")
def directory_for_a_file(artifact: Artifact) -> None:
    """`tekken.json` is a directory."""
    (artifact["folder"] / "tekken.json").unlink()
    (artifact["folder"] / "tekken.json").mkdir()


@mutant("ML201 ML209", says="more than")
def huge_file(artifact: Artifact) -> None:
    """`tokenizer_config.json` has two gigabytes."""
    os.truncate(artifact["folder"] / "tokenizer_config.json", 2 << 30)


@mutant("ML201 ML209", says="not a regular file")
def pipe_for_a_file(artifact: Artifact) -> None:
    """`chat_template.jinja` is a named pipe, which would wait for a writer for ever."""
    (artifact["folder"] / "chat_template.jinja").unlink()
    os.mkfifo(artifact["folder"] / "chat_template.jinja")


@mutant("ML201 ML210", says="links out of the folder")
def link_out_of_the_folder(artifact: Artifact) -> None:
    """`chat_template.json` is a link to a file elsewhere."""
    (artifact["folder"] / "chat_template.json").symlink_to(artifact["elsewhere"])


@mutant("ML201 ML209", says="cannot be read")
def link_to_nothing(artifact: Artifact) -> None:
    """`chat_template.json` is a link to itself."""
    (artifact["folder"] / "chat_template.json").symlink_to("chat_template.json")


@mutant("ML209", says="is not UTF-8")
def invalid_utf8(artifact: Artifact) -> None:
    """`generation_config.json` is not UTF-8."""
    (artifact["folder"] / "generation_config.json").write_bytes(b'{"eos_token_id": 2, "x": "\xff"}')


@mutant("ML209", says="pointer of Git LFS")
def lfs_pointer(artifact: Artifact) -> None:
    """A file is the pointer that Git LFS left."""
    (artifact["folder"] / "chat_template.json").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")


@mutant("ML209", says="the key 'eos_token_id' appears twice")
def key_twice(artifact: Artifact) -> None:
    """`generation_config.json` has a key twice."""
    (artifact["folder"] / "generation_config.json").write_text('{"eos_token_id": 2, "eos_token_id": 2}')


@mutant("ML209", says="nested too deeply")
def deep_nesting(artifact: Artifact) -> None:
    """A JSON file is nested a hundred thousand levels deep."""
    (artifact["folder"] / "chat_template.json").write_text("[" * 100_000 + "]" * 100_000)


@mutant("ML209", says="its header describes")
def truncated_weights(artifact: Artifact) -> None:
    """`model.safetensors` is shorter than its header says."""
    file = weights(artifact, TOKENS)
    os.truncate(file, file.stat().st_size - 1)


def weights(artifact: Artifact, rows: int) -> Path:
    file = Path(artifact["folder"]) / "model.safetensors"
    save_file({"model.embed_tokens.weight": torch.zeros(rows, 4)}, file)
    return file


@mutant("ML209", says="not a safetensors file")
def weights_with_a_huge_header(artifact: Artifact) -> None:
    """`model.safetensors` claims a header of many gigabytes."""
    (artifact["folder"] / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


@mutant("ML211", says="stands beside tekken.json")
def two_versions_side_by_side(artifact: Artifact) -> None:
    """A SentencePiece file of another version stands beside `tekken.json`."""
    shutil.copy(shipped_tokenizer("spm-v1"), artifact["folder"] / "tokenizer.model.v1")


@mutant("ML211", says="differ")
def unversioned_copy_differs(artifact: Artifact) -> None:
    """`tokenizer.model` has other bytes than `tokenizer.model.v1`."""
    sentencepiece(artifact, legacy=False)
    shutil.copy(shipped_tokenizer("spm-v2"), artifact["folder"] / "tokenizer.model")


@mutant("ML212", says="files of 2 commits")
def files_of_two_commits(artifact: Artifact) -> None:
    """`tokenizer.json` was fetched at another commit than `config.json`."""
    artifact["fetched"]["tokenizer.json"] = "b" * 40


@mutant("ML212", says="not the file of commit")
def snapshot_with_a_file_of_another_commit(artifact: Artifact) -> None:
    """A snapshot of the Hub's cache links one name to a blob that has another content than its name says."""
    repository = artifact["folder"].parent / "models--owner--name"
    folder, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(artifact["folder"], folder)
    blob = blobs / ("0" * 64)
    (folder / "tokenizer_config.json").rename(blob)
    (folder / "tokenizer_config.json").symlink_to(f"../../blobs/{blob.name}")
    artifact["folder"] = folder


@mutant("ML207")
def shipped_file_of_other_bytes(artifact: Artifact) -> None:
    """The shipped file is not the one that the goldens were recorded with."""
    artifact["recorded"] = "0" * 64


@mutant("ML208", says="is not a pin")
def branch_for_a_pin(artifact: Artifact) -> None:
    """A recipe pins a branch, which moves."""
    artifact["pinned"] = "main"


def _padding(**values: Any) -> dict[str, Any]:
    pad = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 11, "pad_type_id": 0, "pad_token": "<pad>"}
    return {"strategy": "BatchLongest", **pad, **values}


def _truncation(max_length: int) -> dict[str, Any]:
    return {"direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": 0}


@mutant("ML231", "N35", says="cut at 512 tokens")
def truncation_is_saved(artifact: Artifact) -> None:
    """The truncation of a training run is saved."""
    artifact["tokenizer_json"]["truncation"] = _truncation(512)


@mutant("ML231", "N35", says="cut at 8 tokens")
def short_truncation_is_saved(artifact: Artifact) -> None:
    """A truncation that cuts even the probes is saved, and is the only fault."""
    artifact["tokenizer_json"]["truncation"] = _truncation(8)


@mutant("ML231", "N35", says="cut at 32768 tokens")
def long_truncation_is_saved(artifact: Artifact) -> None:
    """A truncation that no test prompt reaches is saved."""
    artifact["tokenizer_json"]["truncation"] = _truncation(32768)


@mutant("ML231", "N35", says="padded to {'Fixed': 512}")
def fixed_padding_is_saved(artifact: Artifact) -> None:
    """Every text is padded to one length."""
    artifact["tokenizer_json"]["padding"] = _padding(strategy={"Fixed": 512})


@mutant("ML231", "N35", says="padded to a multiple of 8")
def padding_to_a_multiple_is_saved(artifact: Artifact) -> None:
    """Every text is padded to a multiple."""
    artifact["tokenizer_json"]["padding"] = _padding(pad_to_multiple_of=8)


@mutant("ML231 ML232", "N35")
def truncation_and_padding_are_saved(artifact: Artifact) -> None:
    """A batch of a training run left both settings in the file."""
    artifact["tokenizer_json"] |= {"truncation": _truncation(2048), "padding": _padding()}


@mutant("ML232", "N35", says="longest text of a batch")
def padding_of_batches_is_saved(artifact: Artifact) -> None:
    """The padding of batches is saved."""
    artifact["tokenizer_json"]["padding"] = _padding()


@mutant("ML233", says="there is no chat template")
def template_is_not_copied(artifact: Artifact) -> None:
    """The tokenizer is copied without its template."""
    (artifact["folder"] / "chat_template.jinja").unlink()


def _recognised_pieces(artifact: Artifact) -> None:
    """Leave a folder as most trainers do: SentencePiece's tokenizer.model, and no file with Mistral's name."""
    sentencepiece(artifact, legacy=False)
    folder = artifact["folder"]
    (folder / "tokenizer.model.v1").rename(folder / "tokenizer.model")


@mutant("ML211", says="has other pieces or scores in")
def pieces_of_another_version(artifact: Artifact) -> None:
    """The folder's tokenizer.model, which llama.cpp reads, is that of another version."""
    _recognised_pieces(artifact)
    (artifact["folder"] / "tokenizer.model").write_bytes(artifact["shipped"]("spm-v3"))


@mutant("ML209", says="tokenizer.model")
def pieces_cut_off(artifact: Artifact) -> None:
    """The folder's tokenizer.model ends early."""
    _recognised_pieces(artifact)
    (artifact["folder"] / "tokenizer.model").write_bytes(artifact["shipped"]("spm-v1")[:5000])


@mutant("ML211", says="stands beside a byte-level tokenizer")
def pieces_beside_a_byte_level_tokenizer(artifact: Artifact) -> None:
    """A SentencePiece file of an older base was left beside a Tekken tokenizer."""
    artifact["oracle"] = str(artifact["own_tekken"])
    (artifact["folder"] / "tekken.json").unlink()
    (artifact["folder"] / "tokenizer.model").write_bytes(artifact["shipped"]("spm-v1"))
