from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.formats.sources import row_files

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROW = {"messages": TURNS}
LINE = json.dumps(ROW) + "\n"
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
RECIPE = "base: {path: b}\ndata: {train: [rows.jsonl]}\ntraining: {steps: 1}\noutput: out\n"


def parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.Table.from_pylist([ROW]), path)


def saved_to_disk(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([ROW]).save_to_disk(path)


def in_folder(**files: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            file = path / name.replace("__", ".")
            file.write_bytes(content) if isinstance(content, bytes) else content(file)

    return write


def checkpoints(path: Path) -> None:
    """Write two checkpoints of a trainer, of which the newer one comes first by name."""
    for number, step in enumerate((20, 100)):
        (folder := path / f"checkpoint-{step}").mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "trainer_state.json").write_text("{}")
        os.utime(folder / "adapter_config.json", (number, number))


def tokenizer(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.copy(shipped_tokenizer(name), path)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


MESSAGES = "`messages` with role/content"
CHAT = f"chat messages ({MESSAGES})"
JUDGED: list[tuple[str, Any, str, str]] = [
    ("recipe.yaml", RECIPE, "recipe", "a recipe (base, data, training, output)"),
    ("misspelt.yml", "bse: 1\ndata: {}\ntraining: {}\n", "recipe", "a recipe (data, training)"),
    ("rows.jsonl", LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("rows.txt", LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("one.json", LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("two.json", 2 * LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("bom.jsonl", "\ufeff" + LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("bad-first.jsonl", "{\n" + LINE, "rows", f"rows (JSON Lines, {MESSAGES})"),
    ("list.json", json.dumps([ROW]), "rows", f"rows (a JSON array, {CHAT}), converted"),
    ("pretty.json", json.dumps(ROW, indent=2), "rows", f"rows (JSON objects over several lines, {CHAT}), converted"),
    ("rows.parquet", parquet, "rows", f"rows (Parquet, {CHAT}), converted"),
    ("rows.jsonl.gz", gzip.compress(LINE.encode()), "rows", f"rows (gzip of JSON Lines, {CHAT}), converted"),
    ("wide.jsonl", LINE.encode("utf-16"), "rows", f"rows (UTF-16 of JSON Lines, {CHAT}), converted"),
    (
        "share.jsonl",
        json.dumps(SHAREGPT),
        "rows",
        "rows (JSON Lines, ShareGPT (`conversations` with from/value)), converted",
    ),
    ("alpaca.csv", "instruction,output\na,b\n", "rows", "rows (CSV, Alpaca (`instruction/output`)), converted"),
    ("saved", saved_to_disk, "rows", "rows (data-00000-of-00001.arrow), converted"),
    ("shards", in_folder(rows__parquet=parquet), "rows", "rows (rows.parquet), converted"),
    ("encoded.jsonl", json.dumps({**ROW, "input_ids": [1]}), "encoded", "encoded rows (JSON Lines with input_ids)"),
    ("bare.jsonl", '{"input_ids": [1], "labels": [1]}', "encoded", "encoded rows (JSON Lines with input_ids)"),
    ("lora", in_folder(adapter_config__json=b"{}"), "adapter", "an adapter (adapter_config.json)"),
    ("dangling", in_folder(adapter_config__json=dangling), "adapter", "an adapter (adapter_config.json)"),
    (
        "merged",
        in_folder(manifest__json=b"{}", model__safetensors=b""),
        "adapter",
        "a merged model (manifest.json)",
    ),
    (
        "of another tool",
        in_folder(manifest__json=b'{"schemaVersion": 2, "layers": [], "config": {}}', model__safetensors=b""),
        "tokenizer",
        "a checkpoint folder (model.safetensors)",
    ),
    (
        "merged and broken",
        in_folder(manifest__json=b'{"kind": "merged"', model__safetensors=b""),
        "adapter",
        "a merged model (manifest.json)",
    ),
    (
        "merged and no more",
        in_folder(manifest__json=b'{"kind": "merged"}', model__safetensors=b""),
        "adapter",
        "a merged model (manifest.json)",
    ),
    ("base", in_folder(model__safetensors=b""), "tokenizer", "a checkpoint folder (model.safetensors)"),
    ("bare", in_folder(tekken__json=b"{}"), "tokenizer", "a tokenizer folder (tekken.json)"),
    ("v3", in_folder(tokenizer__model__v3=b""), "tokenizer", "a tokenizer folder (tokenizer.model.v3)"),
    *(
        (file, tokenizer(name), "tokenizer", f"a tokenizer file ({'Tekken' if 'tekken' in name else 'SentencePiece'})")
        for name, file in SHIPPED.items()
    ),
    ("model.gguf", b"GGUF\x03", "gguf", "a GGUF file"),
    ("tokenizer.model", tokenizer("spm-v1"), "tokenizer", "a tokenizer file (SentencePiece)"),
]


def write(path: Path, content: Any) -> Path:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("name", "content", "kind", "title"), JUDGED, ids=[one[0] for one in JUDGED])
def test_a_path_is_recognised_by_its_content(name: str, content: Any, kind: str, title: str, tmp_path: Path) -> None:
    found = recognised(write(tmp_path / name, content))
    assert (found.kind, found.title) == (kind, title)
    if kind == "rows":
        # the target reads what was recognised
        assert bool(row_files(found.path)[0].source) == title.endswith("converted") or found.path.is_dir()


def test_with_a_base_full_weights_are_a_merged_model(tmp_path: Path) -> None:
    merged, base = (write(tmp_path / name, in_folder(model__safetensors=b"")) for name in ("merged", "base"))
    assert recognised(merged, base).title.startswith("a merged model (model.safetensors, and --base ")
    assert recognised(base, base).title == "a checkpoint folder (model.safetensors)"
    assert recognised(Path("spm-v3")).title.startswith("a tokenizer ")


ANSWERED: list[tuple[str, Any, str]] = [
    ("rows.zip", b"PK\x03\x04", "a zip archive"),
    ("text.jsonl", '{"text": "a"}', "plain text (text)"),
    ("segments.jsonl", '{"segments": []}', "a text in segments that are trained on or not (segments)"),
    ("pointer.jsonl", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ("axolotl.yaml", "base_model: mistralai/M\ndatasets: []\nadapter: lora\n", "a configuration of Axolotl"),
    ("lf.json", '{"model_name_or_path": "m", "stage": "sft"}', "a configuration of LLaMA-Factory"),
]


@pytest.mark.parametrize(("name", "content", "title"), ANSWERED, ids=[one[0] for one in ANSWERED])
def test_data_that_is_no_rows_is_named(name: str, content: Any, title: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["check", str(write(tmp_path / name, content)), "--tokenizer", "spm-v3"]) == 2
    assert f": this is {title}" in capsys.readouterr().err


MEANT: list[tuple[str, Any, str]] = [
    ("encode.py", "print(1)\n", "mistral-lora check --runner {path} --tokenizer PATH"),
    ("quantized", in_folder(model__gguf=b"GGUF"), "mistral-lora check {path}/model.gguf"),
    ("many", in_folder(a__jsonl=LINE.encode(), b__jsonl=LINE.encode()), "mistral-lora check {path}/a.jsonl"),
    (
        "project",
        in_folder(recipe__yaml=RECIPE.encode(), a__jsonl=LINE.encode(), b__jsonl=LINE.encode()),
        "mistral-lora check {path}/recipe.yaml",
    ),
    ("trained", checkpoints, "mistral-lora check {path}/checkpoint-100"),
]


@pytest.mark.parametrize(("name", "content", "step"), MEANT, ids=[one[0] for one in MEANT])
def test_a_script_and_a_folder_above_name_the_command(
    name: str, content: Any, step: str, tmp_path: Path, capsys: Any
) -> None:
    path = write(tmp_path / name, content)
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 2
    assert step.format(path=path) in capsys.readouterr().err


UNKNOWN: list[tuple[str, Any, str]] = [
    ("compose.yaml", "data: 1\nother: 2\nversion: 3\n", "it has the keys data, other, version"),
    ("numbers.json", "[1, 2]", ""),
    ("list.yaml", "- a\n", ""),
    ("object.json", '{"a": 1, "b": 2}', "it has the keys a, b"),
    ("bytes", b"\x00\x01\x02", ""),
    ("words.txt", "some words\n", ""),
    ("nothing", in_folder(), ""),
    ("accelerate.yaml", "compute_environment: LOCAL\n", "it has the keys compute_environment"),
    ("adapter_config.json", '{"peft_type": "LORA"}', "it has the keys peft_type"),
    ("README.md", "# Hello\n", ""),
    ("model.safetensors", b"\x02" + bytes(7) + b"{}", ""),
]


@pytest.mark.parametrize(("name", "content", "keys"), UNKNOWN, ids=[one[0] for one in UNKNOWN])
def test_anything_else_is_an_error_that_lists_the_kinds(
    name: str, content: Any, keys: str, tmp_path: Path, capsys: Any
) -> None:
    path = write(tmp_path / name, content)
    assert main(["check", str(path)]) == 2
    err = capsys.readouterr().err
    assert keys in err
    if name != "numbers.json":
        assert re.search(r"expected .*a recipe \(.*; rows \(", err)
        assert "--as recipe|rows|encoded|adapter|gguf|tokenizer" in err


@pytest.mark.parametrize("name", ["rows.jsonl", "recipe.yaml", "rows.parquet", "tekken.json", "a"])
def test_an_empty_file_is_an_error_whatever_its_name(name: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).touch()
    assert main(["check", str(tmp_path / name), "--tokenizer", "spm-v3"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name}: the file is empty\n"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        recognised(tmp_path / "rows.jsonl")


NAMES = ("rows.jsonl", "rows.txt", "rows.json", "rows.ndjson", "recipe.yaml", "rows", "rows.csv", "rows.gguf")
BROKEN = {
    "no JSON": ("hello\nworld\n", None),
    "cut": (LINE[:-9] + "\n", None),
    "a tab in YAML": ("base:\n\tpath: x\n", None),
    "blank": ("\n\n", None),
    "other keys": ('{"a": 1}\n', None),
    "no objects": ("5\n6\n", None),
    "bytes": (b"\x00\x01\x02" * 9, None),
    "not UTF-8": (LINE.encode().replace(b"content", b"\xff"), None),
    "one bad line": (LINE + "{\n", "rows"),
    "a bad first line": ("{\n" + LINE, "rows"),
    "a bad role": (LINE.replace("user", "usr"), "rows"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_judged_or_refused_whatever_its_name(fault: str, tmp_path: Path) -> None:
    content, expected = BROKEN[fault]
    for name in NAMES:
        path = write(tmp_path / name, content)
        if expected:
            assert recognised(path).kind == expected, name
            continue
        with pytest.raises(InputError) as refused:
            recognised(path)
        assert str(refused.value.place).startswith(str(path)), name


def test_a_fault_of_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not valid YAML") as refused:
        recognised(write(tmp_path / "recipe.yaml", "base:\n\tpath: x\n"))
    assert str(refused.value.place).endswith("recipe.yaml:2")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["rnus/lora-out"], "(did you mean 'runs/lora-out'?)"),
        (["rowz.jsonl"], "(did you mean 'rows.jsonl'?)"),
        (["rows.jsonl", "--tokenizer", "bases/my-bsae"], "(did you mean 'bases/my-base'?)"),
        (["rows.jsonl", "--tokenizer", "basse/my-base"], "(did you mean 'bases/my-base'?)"),
        (["rows.jsonl", "--tokenizer", "./bases/mybase"], "(did you mean 'bases/my-base'?)"),
        (["rows.jsonl", "--tokenizer", "spm-v33"], "(did you mean 'spm-v3'?)"),
        (["runs"], "Name what is in it: mistral-lora check runs/lora-out"),
        (["bases"], "Name what is in it: mistral-lora check bases/my-base"),
    ],
)
def test_a_parent_and_a_misspelt_path_name_the_neighbour(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (("runs/lora-out", "adapter_config.json"), ("bases/my-base", "config.json")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "rows.jsonl").write_text(LINE)
    assert main(["check", *words]) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_is_named_as_a_data_file_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes" / "old.jsonl").mkdir(parents=True)
    (tmp_path / "notes" / "notes.txt").write_text("a")
    assert main(["check", str(tmp_path / "notes")]) == 2
    assert "Name what is in it" not in capsys.readouterr().err
    (tmp_path / "notes" / "old.jsonl" / "rows.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "notes" / "old.jsonl" / "rows.csv").write_text("a\n1\n")
    assert main(["check", str(tmp_path / "notes")]) == 2
    assert "notes/old.jsonl/rows." in capsys.readouterr().err
