"""The cache of encoded rows and several processes: of those that are killed, that come at once, and that encode."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked
from many_rows import ROWS, encoder_of, kept, load, numbered, recipe_of, said, write_lines

from pytest_mistral_lora.errors import RowsError
from pytest_mistral_lora.training.rows.loading import load_data

CHILD = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {tests!r}

def main():
    from many_rows import encoder_of, recipe_of
    from pytest_mistral_lora.chat.reading import chunks
    from pytest_mistral_lora.training.rows import loading
    from pytest_mistral_lora.training.rows.loading import load_data

    chunks.MANY_BYTES, second = 1, 0
    {prepare}
    data = load_data(recipe_of(Path({folder!r})), encoder_of(), processes={processes})
    print(data.train.figures.sha256["ids"], flush=True)
    if second:
        os.wait()

if __name__ == "__main__":
    main()
"""


def child(folder: Path, prepare: str, processes: int | None = 1) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    tests = [str(here), str(here.parent / "support")]
    script = folder / "child.py"
    script.write_text(CHILD.format(tests=tests, prepare=prepare, folder=str(folder), processes=processes))
    return run_forked([sys.executable, script])


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


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_half_way_leaves_nothing_that_counts(processes: int, rows_folder: Path) -> None:
    assert child(rows_folder, DIE, processes).returncode == -signal.SIGKILL
    [left] = kept(rows_folder)
    assert left.startswith(".")
    data = load(rows_folder)
    assert len(data.train.rows) == ROWS
    [name] = kept(rows_folder)
    assert left.startswith(f".{name}.")


TWO_AT_ONCE = """
    own = loading.encode_files
    def encode(*given, **named):
        print("encodes", flush=True)
        time.sleep(0.2)  # the other one comes meanwhile
        return own(*given, **named)
    loading.encode_files = encode
    encoder_of()
    second = os.fork()
"""


def test_of_two_processes_at_once_one_encodes_and_both_read(rows_folder: Path) -> None:
    done = child(rows_folder, TWO_AT_ONCE)
    assert done.returncode == 0, done.stderr
    digest = load(rows_folder).train.figures.sha256["ids"]
    assert sorted(done.stdout.split()) == sorted(["encodes", digest, digest])


JUDGED_AT_ONCE = """
    from pytest_mistral_lora.conformance.dataset.training_pass import TrainingPass

    own = TrainingPass.results
    def results(self):
        print("judges", flush=True)
        time.sleep(0.2)  # the other one comes meanwhile
        return own(self)
    TrainingPass.results = results
    load_data = lambda recipe, encoder, processes: loading.load_rows(recipe, encoder).data
    encoder_of()
    second = os.fork()
"""


def test_of_two_processes_at_once_one_judges_and_both_take_the_verdict(rows_folder: Path) -> None:
    done = child(rows_folder, JUDGED_AT_ONCE)
    assert done.returncode == 0, done.stderr
    digest = load(rows_folder).train.figures.sha256["ids"]
    assert sorted(done.stdout.split()) == sorted(["judges", digest, digest])


def test_several_processes_make_the_same_files_as_one(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(rows_folder, data={"held_out": 0.3}, max_length=25, truncation="right", unsupervised="drop")
    files = []
    for processes in (1, 2):
        monkeypatch.setenv("MISTRAL_LORA_CACHE", str(rows_folder / str(processes)))
        load_data(recipe, encoder_of(), processes=processes)
        found = (rows_folder / str(processes)).glob("*/*")
        files.append({path.name: path.read_bytes() for path in found})
    assert files[0] == files[1]
    assert set(files[0]) == {"train.arrow", "held_out.arrow", "figures.json"}


def test_several_processes_name_the_same_bad_rows_as_one(rows_folder: Path) -> None:
    rows: list[Any] = numbered(ROWS)
    rows[500:500] = ["{", said("a", "b", weight=0)]
    rows[3:3] = ["[]"]
    write_lines(rows_folder / "rows.jsonl", rows)
    (rows_folder / "empty.jsonl").write_text("\n")
    recipe = recipe_of(rows_folder, data={"train": ["empty.jsonl", "rows.jsonl"]})
    said_of = []
    for processes in (1, 2):
        with pytest.raises(RowsError) as caught:
            load_data(recipe, encoder_of(), processes=processes)
        said_of.append(str(caught.value))
        assert [Path(str(error.place)).name for error in caught.value.errors] == [
            "rows.jsonl:4",
            "rows.jsonl:502",
            "rows.jsonl:503",
            "empty.jsonl",
        ]
    assert said_of[0] == said_of[1]
    assert kept(rows_folder) == {}


def test_few_rows_are_not_kept_and_start_no_process(rows_folder: Path) -> None:
    code = "import multiprocessing.process as p; p.BaseProcess.start = None; chunks.MANY_BYTES = 10**9"
    done = child(rows_folder, code, processes=None)
    assert done.returncode == 0, done.stderr
    assert not (rows_folder / "cache").exists()
