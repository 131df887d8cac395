"""A disk that is full: the checkpoint before stays, the error says what to do, and with room the run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusing_disks import largest_file
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.errors import DiskError, StoppedError
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import checkpoints, fault_of, step_of, work_folder

TRAINING: dict[str, Any] = {"steps": 3, "batch_size": 2, "checkpoint_steps": 1, "logging_steps": 1}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """The run that no disk refused."""
    folder = tmp_path_factory.mktemp("whole")
    write_rows(folder / "rows.jsonl")
    return train(parse_recipe(recipe_data(base, training=TRAINING), folder=folder))


def stopped(recipe: Recipe) -> Path:
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(StoppedError):
        train(recipe, stop=stop)
    (checkpoint,) = checkpoints(work_folder(recipe))
    return checkpoint


@pytest.mark.parametrize(
    "refused",
    [
        pytest.param("adapter_model.safetensors", marks=pytest.mark.slow),
        "optimizer.pt",
        pytest.param("rng_state.pth", marks=pytest.mark.slow),
    ],
)
def test_the_checkpoint_before_stays_and_the_run_goes_on(
    make_recipe: MakeRecipe, whole_run: RunResult, refused: str
) -> None:
    recipe = make_recipe(training=TRAINING)
    first = stopped(recipe)
    sizes = {file.name: file.stat().st_size for file in first.iterdir()}
    smaller = [size for size in sizes.values() if size < sizes[refused]]
    with largest_file(max(smaller)), pytest.raises(DiskError) as caught:
        train(recipe, resume=True)
    assert Path(str(caught.value.place)).parent == first.with_name("checkpoint-2")
    assert "MB are free there. " in str(caught.value)
    assert "--resume" in caught.value.next_step
    assert [(step_of(one), fault_of(one)) for one in checkpoints(work_folder(recipe))] == [(1, "")]
    assert json.loads((work_folder(recipe) / "failure.json").read_text())["exit_code"] == 1
    assert train(recipe, resume=True).manifest["lora"] == whole_run.manifest["lora"]


ON_A_SMALL_DISK = """
import shutil
import sys
from pathlib import Path
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.training.run_folder import fault_of

disk, recipe = Path(sys.argv[1]), sys.argv[2]
for room in map(int, sys.argv[3:]):
    with (disk / "filler").open("wb", buffering=0) as filler:
        filler.truncate(0)
        while True:
            try:
                filler.write(bytes(1024))
            except OSError as error:
                assert error.errno == 28
                break
        filler.truncate(filler.tell() - room)
    codes = [main(["train", recipe])]
    broken = [str(path) for path in disk.glob("out*/*") if fault_of(path) and path.is_dir()]
    (disk / "filler").unlink()
    codes.append(main(["train", recipe, "--resume"]))
    print("room", room, codes, broken, (disk / "out" / "manifest.json").is_file())
    shutil.rmtree(disk / "out")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare: no small disk to fill")
def test_a_disk_that_is_really_full(base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"', str(disk)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a small disk")
    write_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**recipe_data(base, training=TRAINING), "output": str(disk / "out")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    refused = {120_000: "checkpoint-1", 400_000: "checkpoint-2", 850_000: "/out"}
    run = [sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(recipe), *map(str, refused)]
    done = subprocess.run([*mount, *run], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failures = re.findall(r"error: (.*): cannot be written: .* MB are free there. Make room", done.stderr)
    assert len(failures) == len(refused), done.stderr
    for place, expected in zip(failures, refused.values(), strict=True):
        assert re.search(rf"{expected}(/[^/]*)?$", place)
    rooms = [line for line in done.stdout.splitlines() if line.startswith("room ")]
    assert rooms == [f"room {room} [1, 0] [] True" for room in refused], done.stderr
