from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from many_rows import encoder_of, numbered, recipe_of, said, write_lines

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.chat.reading.chunks import CHUNK_LINES, DataFile
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError, RowsError
from pytest_mistral_lora.training.rows import loading
from pytest_mistral_lora.training.rows.encoding import EncodingPlan, Sinks, encode_files
from pytest_mistral_lora.training.rows.loading import RunData, load_data

ROWS = 600


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with rows that are so many that they are kept."""
    monkeypatch.setattr(chunks, "MANY_BYTES", 1)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "rows.jsonl", numbered(ROWS))
    return tmp_path


def kept(folder: Path) -> dict[str, int]:
    """Return the folders of the cache, and what changes when one is made anew."""
    return {one.name: one.stat().st_mtime_ns for one in (folder / "cache").iterdir() if one.is_dir()}


def load(folder: Path, encoder: Encoder | None = None, **keys: Any) -> RunData:
    return load_data(recipe_of(folder, **keys), encoder or encoder_of(), processes=1)


def contents(data: RunData) -> list[Any]:
    return [[list(split.rows), list(split.encoded), split.figures] for split in (data.train, data.held_out)]


def test_what_comes_from_the_cache_is_what_was_encoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = load(folder, data={"held_out": 0.3}), load(folder, data={"held_out": 0.3})
    assert contents(first) == contents(again)
    assert [one.place for one in again.train.rows] == [one.place for one in first.train.rows]
    monkeypatch.setattr(chunks, "MANY_BYTES", 10**9)
    assert contents(load(folder, data={"held_out": 0.3})) == contents(first)
    oracle = encoder_of().tokenizer.oracle
    assert list(first.train.encoded) == [oracle.encode(row) for row in first.train.rows]
    assert len(first.train.rows) + len(first.held_out.rows) == ROWS


def test_the_same_rows_are_encoded_once_wherever_they_are(folder: Path) -> None:
    load(folder)
    before = kept(folder)
    assert len(before) == 1
    load(folder, learning_rate=0.5)
    (folder / "rows.jsonl").rename(folder / "moved.jsonl")
    moved = load(folder, data={"train": ["moved.jsonl"]})
    assert kept(folder) == before
    assert moved.train.rows[7].place == f"{folder / 'moved.jsonl'}:8"


def change_a_letter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows.replace("Answer 599.", "Answer 59x."))


def change_the_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "__version__", "999")


def change_the_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FORMAT", 999)


def change_a_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "version", lambda name: "999")


@pytest.mark.parametrize("change", [change_a_letter, change_the_version, change_the_format, change_a_library])
def test_what_is_outside_the_recipe_is_part_of_the_key(
    change: Callable[[Path, pytest.MonkeyPatch], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    change(folder, monkeypatch)
    load(folder)
    assert len(kept(folder)) == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"max_length": 4095},
        {"truncation": "drop"},
        {"truncation": "right"},
        {"unsupervised": "warn"},
        {"unsupervised": "drop"},
        {"data": {"held_out": 0.5}},
        {"data": {"eval": ["more.jsonl"]}},
        {"data": {"train": ["rows.jsonl", "more.jsonl"]}},
        {"data": {"train": ["more.jsonl"], "eval": ["rows.jsonl"]}},
    ],
    ids=str,
)
def test_each_choice_of_the_recipe_is_part_of_the_key(keys: dict[str, Any], folder: Path) -> None:
    write_lines(folder / "more.jsonl", [said("More?", "More.")])
    for one in ({}, keys):
        load(folder, **one)
    assert len(kept(folder)) == 2


def test_the_tokenizer_is_part_of_the_key(folder: Path) -> None:
    loaded = [load(folder, encoder_of(tokenizer=name)) for name in ("spm-v3", "spm-v1")]
    assert len(kept(folder)) == 2
    assert loaded[0].train.figures.sha256["ids"] != loaded[1].train.figures.sha256["ids"]


def test_the_template_is_part_of_the_key_where_it_encodes(folder: Path) -> None:
    write_lines(folder / "rows.jsonl", numbered(5))
    base = folder / "base"
    encoder_of().tokenizer.fast.save_pretrained(base)
    load(folder, make_encoder("chat-template", CheckpointTokenizer(base)), backend="chat-template")
    template = base / "chat_template.jinja"
    template.write_text("{# ours #}" + template.read_text())
    load(folder, make_encoder("chat-template", CheckpointTokenizer(base)), backend="chat-template")
    assert len(kept(folder)) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": lambda one: flip(one / "train.arrow"),
    "short": lambda one: os.truncate(one / "train.arrow", 100),
    "missing": lambda one: (one / "held_out.arrow").unlink(),
    "no figures": lambda one: (one / "figures.json").unlink(),
    "half of the figures": lambda one: os.truncate(one / "figures.json", 100),
    "other figures": lambda one: (one / "figures.json").write_text("[]"),
    "wrong figure": lambda one: (
        (one / "figures.json").write_text(
            (one / "figures.json").read_text().replace(f'"used": {ROWS}', f'"used": {ROWS - 1}')
        )
        and None
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_made_anew(
    damage: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = contents(load(folder))
    [name] = kept(folder)
    before = (folder / "cache" / name / "figures.json").read_text()
    damage(folder / "cache" / name)
    assert contents(load(folder)) == sound
    assert "damaged" in caplog.text
    assert (folder / "cache" / name / "figures.json").read_text() == before
    caplog.clear()
    load(folder)
    assert caplog.text == ""


def test_other_processes_of_a_run_look_at_sizes_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    before = kept(folder)
    [name] = before
    flip(folder / "cache" / name / "train.arrow")
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(folder)
    assert kept(folder) == before
    os.truncate(folder / "cache" / name / "train.arrow", 100)
    load(folder)
    assert kept(folder) != before


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {tests!r}

def main():
    from many_rows import encoder_of, recipe_of
    from pytest_mistral_lora.chat.reading import chunks
    from pytest_mistral_lora.training.rows import loading
    from pytest_mistral_lora.training.rows.loading import load_data

    chunks.MANY_BYTES = 1
    {prepare}
    data = load_data(recipe_of(Path({folder!r})), encoder_of(), processes={processes})
    print(data.train.figures.sha256["ids"])

if __name__ == "__main__":
    main()
"""


def child(folder: Path, prepare: str, processes: int = 1) -> subprocess.Popen[str]:
    tests = [str(folder) for folder in Path(__file__).parents[:2]]
    script = folder / "child.py"
    script.write_text(CHILD.format(tests=tests, prepare=prepare, folder=str(folder), processes=processes))
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, script], text=True, **pipes)


DIE = """
    from pytest_mistral_lora.training.rows import ArrowFile
    own, seen = ArrowFile.write, []
    def write(self, batch):
        own(self, batch)
        seen.append(batch)
        if len(seen) == 3:
            self._flush()
            os.kill(os.getpid(), signal.SIGKILL)
    ArrowFile.write = write
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_is_killed_half_way_leaves_nothing_that_counts(processes: int, folder: Path) -> None:
    process = child(folder, DIE, processes)
    # it returns when every process that holds the pipe has ended: the pool, too
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    [left] = kept(folder)
    assert left.startswith(".")
    data = load(folder)
    assert len(data.train.rows) == ROWS
    [name] = kept(folder)
    assert left.startswith(f".{name}.")


COUNT = """
    own = loading.encode_files
    def encode(*given, **named):
        print("encodes")
        return own(*given, **named)
    loading.encode_files = encode
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_of_two_processes_at_once_one_encodes_and_both_read(folder: Path) -> None:
    processes = [child(folder, COUNT) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        outputs.append(output.split())
    assert sorted(map(len, outputs)) == [1, 2]
    assert outputs[0][-1] == outputs[1][-1] == load(folder).train.figures.sha256["ids"]


def test_several_processes_make_the_same_files_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(folder, data={"held_out": 0.3}, max_length=25, truncation="right", unsupervised="drop")
    files = []
    for processes in (1, 2):
        monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / str(processes)))
        load_data(recipe, encoder_of(), processes=processes)
        found = (folder / str(processes)).glob("*/*")
        files.append({path.name: path.read_bytes() for path in found})
    assert files[0] == files[1]
    assert set(files[0]) == {"train.arrow", "held_out.arrow", "figures.json"}


def test_several_processes_name_the_same_bad_rows_as_one(folder: Path) -> None:
    rows: list[Any] = numbered(ROWS)
    rows[500:500] = ["{", said("a", "b", weight=0)]
    rows[3:3] = ["[]"]
    write_lines(folder / "rows.jsonl", rows)
    (folder / "empty.jsonl").write_text("\n")
    recipe = recipe_of(folder, data={"train": ["empty.jsonl", "rows.jsonl"]})
    said_of = []
    for processes in (1, 2):
        with pytest.raises(RowsError) as caught:
            load_data(recipe, encoder_of(), processes=processes)
        said_of.append(str(caught.value))
        assert [Path(error.place).name for error in caught.value.errors] == [
            "rows.jsonl:4",
            "rows.jsonl:502",
            "rows.jsonl:503",
            "empty.jsonl",
        ]
    assert said_of[0] == said_of[1]
    assert kept(folder) == {}


def alive() -> int:
    gc.collect()
    return sum(type(one) in (Row, EncodedRow) for one in gc.get_objects())


def test_neither_rows_nor_encodings_stay_in_memory(folder: Path) -> None:
    """What is held while rows are encoded does not grow with their number, and afterwards nothing is."""
    others = alive()
    seen: list[int] = []
    plan = EncodingPlan(encoder_of().tokenizer.path, "mistral-common", Policy(4096), 0.0)
    files = [DataFile(write_lines(folder / "more.jsonl", numbered(6 * CHUNK_LINES)), False)]
    encode_files(plan, files, Sinks(lambda batch: seen.append(alive()), lambda batch: None), processes=1)
    assert len(seen) == 6
    assert max(seen) - others < CHUNK_LINES
    load(folder)  # what is imported for this is no part of it
    before = pa.total_allocated_bytes()
    data = load(folder)
    assert alive() == others
    assert pa.total_allocated_bytes() - before < 1000
    for row, encoded in zip(data.train.rows[:5], data.train.encoded, strict=False):
        assert row.messages
        assert encoded.input_ids
        assert alive() - others <= 5 + 2
    held = [list(split) for split in (data.train.rows, data.train.encoded)]
    assert alive() - others >= 2 * len(held[0])


def test_a_cache_that_cannot_be_written_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(folder / "rows.jsonl" / "cache"))
    with pytest.raises(InputError, match=r"cannot be kept here: .*MISTRAL_LORA_CACHE"):
        load(folder)


def test_the_cache_is_where_the_other_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MISTRAL_LORA_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert loading.cache_folder() == tmp_path / "mistral-lora"
    monkeypatch.delenv("HF_HOME")
    assert loading.cache_folder() == Path.home() / ".cache" / "huggingface" / "mistral-lora"


def test_few_rows_are_not_kept_and_start_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MANY_BYTES", 10**9)
    code = "import multiprocessing.process as p; p.BaseProcess.start = None"
    process = child(folder, code.replace("\n", ";") + "; chunks.MANY_BYTES = 10**9", processes=None)  # type: ignore[arg-type]
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert not (folder / "cache").exists()


def test_the_datasets_library_opens_the_files(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = load(folder)
    [name] = kept(folder)
    opened = datasets.Dataset.from_file(str(folder / "cache" / name / "train.arrow"))
    assert len(opened) == ROWS
    assert opened[5]["input_ids"] == list(data.train.encoded[5].input_ids)
    assert json.loads(opened[5]["line"]) == numbered(6)[5]
