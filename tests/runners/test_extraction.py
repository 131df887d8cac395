from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_runners as hostile
import pytest
from sampling import sampled

from pytest_mistral_lora.chat.kinds.fim import FimRow
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners import TRAINERS, find_runner
from pytest_mistral_lora.runners.extract import Extraction, extract

Extract = Callable[..., Extraction]


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path, rows: list[Row]) -> Extract:
    (tmp_path / "config.yaml").touch()

    def run(body: str, **options: Any) -> Extraction:
        runner = find_runner(str(hostile.script(tmp_path, body)))
        return extract(runner, rows, checkpoint, tmp_path / "out.jsonl", config=tmp_path / "config.yaml", **options)

    return run


def _lines(extraction: Extraction) -> list[dict[str, Any]]:
    return [json.loads(line) for line in extraction.file.read_text().splitlines()]


def _is_alive(process: int) -> bool:
    """Return whether a process is still there after a second: the kernel ends one that is killed when it can."""
    for _ in range(20):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_each_row_has_a_line_with_its_messages_ids_and_labels(run: Extract, rows: list[Row], tmp_path: Path) -> None:
    made = run(hostile.SOUND)
    assert _lines(made) == [
        {"row": n, **row.to_json(), "input_ids": [1, n], "labels": [-100, n]} for n, row in enumerate(rows)
    ]
    assert made.environment == {"mine": "1.0"}
    assert made.refused == 0
    assert made.ran_under == f"mine 1.0; configuration {tmp_path / 'config.yaml'}"


def test_a_gap_is_given_to_a_script_and_to_no_other_trainer(checkpoint: Path, tmp_path: Path) -> None:
    gaps = [FimRow.of("a", "b", "c", place=Place.of("rows.jsonl", 1))]
    script = find_runner(str(hostile.script(tmp_path, hostile.SOUND)))
    made = extract(script, gaps, checkpoint, tmp_path / "out.jsonl")
    assert _lines(made) == [{"row": 0, **gaps[0].to_json(), "input_ids": [1, 0], "labels": [-100, 0]}]
    with pytest.raises(RunnerError, match="this row is fill-in-the-middle") as caught:
        extract(find_runner("trl"), gaps, checkpoint, tmp_path / "out.jsonl")
    assert str(caught.value.place) == "rows.jsonl:1"


def test_what_a_script_notes_is_said_with_the_versions(run: Extract, tmp_path: Path) -> None:
    made = run(hostile.TELLS)
    assert made.ran_under == f"mine 1.0; configuration {tmp_path / 'config.yaml'}; two files were read"


def test_the_notes_of_a_script_are_bounded(run: Extract) -> None:
    made = run("write([*[{'note': 'x' * 9000}] * 1500, {'environment': {str(n): n for n in range(1500)}}, *lines])")
    assert (len(made.notes), {*map(len, made.notes)}, len(made.environment)) == (1000, {4000}, 1000)


def test_rows_in_another_order_are_put_back(run: Extract) -> None:
    assert [(line["row"], line["input_ids"]) for line in _lines(run(hostile.REORDERS))] == [
        (n, [1, n]) for n in range(4)
    ]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (hostile.DROPS, "the runner made nothing of it"),
        (hostile.REFUSES, "too long"),
        (hostile.DOUBLES, "the runner wrote it twice"),
    ],
)
def test_a_row_that_does_not_come_once_is_an_error_for_that_row(
    body: str, reason: str, run: Extract, rows: list[Row]
) -> None:
    made = run(body)
    lines = _lines(made)
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert lines[1] == {"row": 1, **rows[1].to_json(), "error": reason}
    assert all("input_ids" in line for line in (lines[0], *lines[2:]))
    assert made.refused == 1


@pytest.mark.parametrize("name", sampled(hostile.GARBAGE, ("no file", "no JSON", "binary")))
def test_what_is_not_the_contract_is_refused_and_nothing_is_written(name: str, run: Extract, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"expected (encoded rows|an object|a list of integers)"):
        run(hostile.GARBAGE[name])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_runner_that_hangs_is_ended_with_its_children(run: Extract, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="not done after 2 seconds") as caught:
        run(hostile.HANGS, time_limit=2)
    assert "waiting for a lock" in str(caught.value)
    assert not _is_alive(int((tmp_path / "config.yaml.child").read_text()))


def test_a_child_that_a_runner_leaves_behind_is_ended(run: Extract, tmp_path: Path) -> None:
    assert run(hostile.LEAVES_A_CHILD).refused == 0
    assert not _is_alive(int((tmp_path / "config.yaml.child").read_text()))


def test_a_runner_is_ended_by_ctrl_c(tmp_path: Path) -> None:
    started = tmp_path / "started"
    body = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep(600)"
    program = f"""
import sys
from pathlib import Path
from pytest_mistral_lora.runners.process import run_limited
run_limited([sys.executable, "-c", {body!r}], seconds=600, folder=Path.cwd(), environment={{}})
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not (started.is_file() and started.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert not _is_alive(int(started.read_text()))


def test_what_a_runner_that_fails_said_last_is_shown(run: Extract) -> None:
    with pytest.raises(RunnerError, match=r"ends with exit code 7: .*ValueError: no such template") as caught:
        run(hostile.CRASHES)
    assert "  | first" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_runner_that_is_killed_is_an_error(run: Extract) -> None:
    with pytest.raises(RunnerError, match=r"is killed \(SIGKILL\)"):
        run(hostile.IS_KILLED)


def test_a_python_that_is_not_there_is_named(run: Extract, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="nope/python: cannot be started: No such file or directory"):
        run(hostile.SOUND, python=tmp_path / "nope" / "python")


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path, checkpoint: Path, rows: list[Row]) -> None:
    runner = find_runner(str(hostile.script(tmp_path, hostile.SOUND)))
    with pytest.raises(RunnerError, match=r"nope\.yaml: no such file; .*mine\.py"):
        extract(runner, rows, checkpoint, tmp_path / "out.jsonl", config=tmp_path / "nope.yaml")


@pytest.mark.parametrize("name", ["nope", "nope.py", "TRL"])
def test_a_runner_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(RunnerError, match=rf"'{name}' is not a runner.*; expected .*trl, axolotl"):
        find_runner(name)


SHOWS_THE_CHECKPOINT = """\
files = sorted(os.listdir(given.checkpoint))
write([{'environment': {'files': ' '.join(files)}}, *lines])
"""


def test_a_runner_gets_the_folder_s_own_files_and_a_model(run: Extract, checkpoint: Path) -> None:
    files = run(SHOWS_THE_CHECKPOINT).environment["files"].split()
    assert {path.name for path in checkpoint.iterdir()} <= set(files)
    assert {"config.json", "model.safetensors"} <= set(files)


def test_a_bare_tokenizer_file_is_converted_for_a_runner(tmp_path: Path, rows: list[Row]) -> None:
    runner = find_runner(str(hostile.script(tmp_path, SHOWS_THE_CHECKPOINT)))
    made = extract(runner, rows, shipped_tokenizer("spm-v3"), tmp_path / "out.jsonl")
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= set(made.environment["files"].split())


def test_nothing_is_left_in_the_folder_for_temporary_files(
    run: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    run(hostile.SOUND)
    with pytest.raises(RunnerError):
        run(hostile.CRASHES)
    assert [*(tmp_path / "temporary").iterdir()] == []


SHOWS_ITS_CONFIGURATION = """\
write([{'environment': {'config': open(given.config).read(), 'place': given.config}}, *lines])
"""


def test_a_packaged_runner_gets_no_key_that_names_code_unless_it_is_allowed(
    tmp_path: Path, checkpoint: Path, rows: list[Row]
) -> None:
    script = hostile.script(tmp_path, SHOWS_ITS_CONFIGURATION)
    packaged = replace(TRAINERS["trl"], script=script, distribution="")
    config = tmp_path / "trl.yaml"
    config.write_text("max_length: null\nlearning_rate: 1\npush_to_hub: true\nmine: 1\n")
    made = extract(packaged, rows, checkpoint, tmp_path / "out.jsonl", config=config)
    assert made.environment["config"] == "max_length: null\n"
    assert f"configuration {config}; left out" in made.ran_under
    assert ": push_to_hub, mine (" in made.ran_under
    made = extract(packaged, rows, checkpoint, tmp_path / "out.jsonl", config=config, allow_code=True)
    assert made.environment == {"config": config.read_text(), "place": str(config)}
    assert "left out" not in made.ran_under
    config.write_text("dataset_kwargs: !!python/name:os.system\n")
    with pytest.raises(RunnerError, match="not plain YAML"):
        extract(packaged, rows, checkpoint, tmp_path / "out.jsonl", config=config)


def test_a_script_of_the_user_gets_the_configuration_itself(run: Extract, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("push_to_hub: true\n")
    assert run(SHOWS_ITS_CONFIGURATION).environment["place"] == str(tmp_path / "config.yaml")


SHOWS_ITS_ENVIRONMENT = """\
from huggingface_hub import get_token, try_to_load_from_cache
found = {name: value for name, value in os.environ.items()}
found['the token'] = str(get_token())
found['the cached file'] = str(try_to_load_from_cache('mine/model', 'config.json'))
found['the netrc'] = open(os.environ['NETRC']).read()
write([{'environment': found}, *lines])
"""
SECRETS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"),
    *(
        "GITHUB_TOKEN",
        "MISTRAL_SERVER_KEY",
        "MY_PASSWORD",
        "DATABASE_URL",
        "SSH_AUTH_SOCK",
        "HTTPS_PROXY",
        "PGPASSFILE",
    ),
    *("ACTIONS_ID_TOKEN_REQUEST_URL", "COMET_CONFIG", "MLFLOW_TRACKING_URI", "HF_ENDPOINT", "PYTHON_KEYRING_TOKEN"),
)


def test_a_runner_gets_no_token_or_key_and_local_folders_and_caches_work(
    run: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_secret")
    home = tmp_path / "hub"
    snapshot = home / "hub" / "models--mine--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (home / "hub" / "models--mine--model" / "refs").mkdir()
    (home / "hub" / "models--mine--model" / "refs" / "main").write_text("a" * 40)
    (home / "token").write_text("hf_secret")
    (tmp_path / ".netrc").write_text("machine x login y password hf_secret")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    found = dict(run(SHOWS_ITS_ENVIRONMENT).environment)
    assert "hf_secret" not in str(found)
    assert not set(SECRETS) & set(found)
    assert found["the token"] == "None"
    assert found["the cached file"] == str(snapshot / "config.json")
    assert (found["HOME"], found["LC_ALL"], found["PATH"]) == (str(tmp_path), "C.UTF-8", os.environ["PATH"])
    # a token beside the cache is not beside the folder that it gets
    assert found["HF_HOME"] != str(home)
    assert not Path(found["HF_TOKEN_PATH"]).exists()
