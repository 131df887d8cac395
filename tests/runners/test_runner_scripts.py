"""The files that the scripts of runners read and write, without the programs that they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from sampling import sampled

from pytest_mistral_lora.runners import HARNESS, TRAINERS
from pytest_mistral_lora.runners.prompts import read_prompt

NAMES = ("trl_rows", "axolotl_rows", "llamafactory_rows", "ms_swift_rows", "lm_eval_rows")
PROGRAMS = dict(zip(NAMES, ("trl", "axolotl", "llamafactory", "swift", "lm_eval"), strict=True))
ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\u2028there"}
ROW = {"messages": [ASKED, SAID]}
PAIR = {"prompt": [ASKED], "chosen": [SAID], "rejected": [{"role": "assistant", "content": "No"}]}


@pytest.fixture
def script(scripts: None) -> Callable[[str], ModuleType]:
    """Import a script of the package, as its own process does."""
    return import_module


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The files of a call, by the options that name them; the rows are a chat row and nothing."""
    given = {name: tmp_path / f"{name}.txt" for name in ("rows", "config", "output")}
    given["rows"].write_text(json.dumps(ROW, ensure_ascii=False) + "\n\n", encoding="utf-8")
    given["config"].write_text("tasks: [colours]\n")
    (tmp_path / "checkpoint").mkdir()
    return {**given, "checkpoint": tmp_path / "checkpoint"}


def options(files: Mapping[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name}", str(path))]


@pytest.mark.parametrize("name", sampled(NAMES, ("axolotl_rows",)))
def test_a_script_without_its_program_says_so_and_has_written_the_environment(
    name: str, files: dict[str, Path]
) -> None:
    program = PROGRAMS[name]
    if find_spec(program) is not None:
        pytest.skip(f"{program} is installed here")
    runner = next(runner for runner in TRAINERS.values() if runner.script.stem == name)
    files["config"] = runner.config
    # not forked: a fork does not read PYTHONPATH
    environment = {**os.environ, "PYTHONPATH": str(HARNESS)}
    command = [sys.executable, str(runner.script), *options(files)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"No module named '{program}" in ended.stderr.splitlines()[-1]
    [environment] = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert environment["environment"]["python"] == sys.version.split()[0]
    assert "not installed" in environment["environment"].values()


def task(script: ModuleType, folder: Path, config: Mapping[str, Any], row: Mapping[str, Any], **more: Any) -> Any:
    """Return a call of a runner."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(dict(config)))
    (folder / "work").mkdir()
    return script.Task([{**row, script.MARK: 3}], folder / "base", file, folder / "work", **more)


def test_trl_gets_our_rows_and_model_and_keeps_what_decides_ids(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    trl = script("trl_rows")
    config = {"max_length": 9, "bf16": True, "dataset_name": "other", "model_revision": "main", "packing": True}
    made = yaml.safe_load(trl.configuration(task(trl, tmp_path, config, ROW)).read_text())
    assert {name: made.get(name) for name in config} == {
        "max_length": 9,
        "bf16": False,
        "dataset_name": str(tmp_path / "work" / "data"),
        "model_revision": None,
        "packing": True,
    }
    assert made["model_name_or_path"] == str(tmp_path / "base")
    [line] = (tmp_path / "work" / "data" / "train.jsonl").read_text().splitlines()
    assert json.loads(line) == {**ROW, trl.MARK: 3}


def test_trl_keeps_the_data_of_its_configuration(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    trl = script("trl_rows")
    made = trl.configuration(task(trl, tmp_path, {"dataset_name": "own"}, ROW, own_data=True))
    assert yaml.safe_load(made.read_text())["dataset_name"] == "own"
    assert not (tmp_path / "work" / "data").exists()
    # an empty file is a configuration without keys
    (tmp_path / "config.yaml").write_text("")
    empty = trl.Task([], tmp_path, tmp_path / "config.yaml", tmp_path / "work", own_data=True)
    assert yaml.safe_load(trl.configuration(empty).read_text())["use_cpu"] is True


def batch(**columns: list[list[int]]) -> dict[str, Any]:
    return {name: torch.tensor(values) for name, values in columns.items()}


def test_the_columns_of_trl_s_batches_are_without_padding(script: Callable[[str], ModuleType]) -> None:
    trl = script("trl_rows")
    chat = batch(input_ids=[[1, 5, 2]], labels=[[-100, 5, 2]], attention_mask=[[1, 1, 1]])
    assert trl._columns(chat, "") == {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}
    sides = batch(
        input_ids=[[1, 5, 2], [1, 2, 0]], attention_mask=[[1, 1, 1], [1, 1, 0]], completion_mask=[[0, 1, 1], [0, 1, 0]]
    )
    chosen = {"chosen_input_ids": [1, 5, 2], "chosen_labels": [-100, 5, 2]}
    rejected = {"rejected_input_ids": [1, 2], "rejected_labels": [-100, 2]}
    assert trl._columns(sides, "dpo") == chosen | rejected
    rated = {name: values[:1] for name, values in sides.items()} | {"label": [True]}
    of_answer = {name.replace("chosen", "completion"): ids for name, ids in chosen.items()}
    assert trl._columns(rated, "kto") == {"label": True, **of_answer}
    # KTO makes two rated answers of a pair, in any order, and leaves a rated one alone
    bad = {name.replace("rejected", "completion"): ids for name, ids in rejected.items()}
    made = [(0, {"label": False, **bad}), (1, {"label": True, **of_answer}), (0, {"label": True, **of_answer})]
    assert trl._paired(made) == [(0, chosen | rejected), (1, {"label": True, **of_answer})]


def test_axolotl_keeps_its_data_or_gets_ours_in_the_form_of_its_one_dataset(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    axolotl = script("axolotl_rows")
    entry = {"path": "own.jsonl", "type": "chat_template", "split": "test", "field_messages": "messages"}
    config = {"datasets": [entry], "sequence_len": 9, "plugins": ["axolotl.integrations.liger.LigerPlugin"]}
    own = task(axolotl, tmp_path, config, ROW, own_data=True)
    made = yaml.safe_load(Path(axolotl.configuration(own)).read_text())
    assert (made["datasets"], made["sequence_len"], "plugins" in made) == ([entry], 9, False)
    ours = axolotl.Task(own.rows, own.checkpoint, own.config, own.folder)
    [dataset] = yaml.safe_load(Path(axolotl.configuration(ours)).read_text())["datasets"]
    assert (dataset["ds_type"], dataset["type"], "split" in dataset) == ("json", "chat_template", False)
    assert json.loads(Path(dataset["path"]).read_text()) == {**ROW, axolotl.MARK: 3}
    own.config.write_text(yaml.safe_dump({"datasets": [entry, entry]}))
    with pytest.raises(ValueError, match="2 datasets; one alone can be given other rows"):
        axolotl.configuration(ours)


def test_llamafactory_keeps_the_data_of_its_configuration(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    llamafactory = script("llamafactory_rows")
    config = {"dataset": "mine", "dataset_dir": "data", "tokenized_path": "prepared", "val_size": 0.1}
    made = llamafactory.configuration(task(llamafactory, tmp_path, config, PAIR, own_data=True, name="dpo"))
    assert (made["dataset_dir"], made["tokenized_path"], made["stage"]) == ("data", "prepared", "dpo")
    assert "val_size" not in made
    assert not (tmp_path / "work" / "data").exists()


KNOWN = ("pretrained", "add_bos_token", "max_length", "dtype", "peft")
"""Arguments of lm-eval's model class, with those that name another model."""


def configured(
    script: ModuleType, folder: Path, config: Any, parsed: Callable[[str], dict[str, Any]] = dict
) -> tuple[dict[str, Any], list[str]]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    made: tuple[dict[str, Any], list[str]] = script.configuration(file, folder / "base", folder / "out", KNOWN, parsed)
    return made


def test_lm_eval_gets_the_tiny_model_and_keeps_what_decides_prompts(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    lm_eval = script("lm_eval_rows")
    arguments = {"add_bos_token": True, "peft": "lora-out", "unknown": 1, "pretrained": "mistralai/Other"}
    config = {"model": "vllm", "model_args": arguments, "tasks": ["a"], "num_fewshot": 2, "use_cache": "kept.db"}
    made, notes = configured(lm_eval, tmp_path, {**config, "wandb_args": "x"})
    base = {"pretrained": str(tmp_path / "base"), "dtype": "float32"}
    assert made["model_args"] == {"add_bos_token": True, **base}
    assert (made["tasks"], made["num_fewshot"], made["model"], made["use_cache"]) == (["a"], 2, "hf", None)
    assert (made["limit"], made["output_path"], "wandb_args" in made) == (lm_eval.LIMIT, str(tmp_path / "out"), False)
    assert [note.partition(":")[0] for note in notes] == [
        "model vllm is replaced by hf",
        f"the first {lm_eval.LIMIT} documents of each task",
    ]


def test_lm_eval_s_arguments_may_be_one_text_and_a_limit_of_one_s_own_is_kept(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    lm_eval = script("lm_eval_rows")

    def parsed(text: str) -> dict[str, Any]:
        return dict(part.split("=") for part in text.split(","))

    given = {"model_args": "max_length=8,dtype=bfloat16", "limit": 3}
    made, notes = configured(lm_eval, tmp_path, given, parsed)
    assert made["model_args"] == {"max_length": "8", "pretrained": str(tmp_path / "base"), "dtype": "float32"}
    assert (made["limit"], notes) == (3, [])
    assert "limit" not in configured(lm_eval, tmp_path, {"samples": {"a": [1]}})[0]
    with pytest.raises(TypeError, match="has no keys at its top"):
        configured(lm_eval, tmp_path, ["a"])


def test_lm_eval_s_prompts_are_written_with_their_chats_and_scored_answers(
    script: Callable[[str], ModuleType], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = script("lm_eval_rows")

    def evaluated(given: Path, checkpoint: Path, folder: Path) -> tuple[Any, list[str]]:
        assert (given, checkpoint) == (files["config"], files["checkpoint"])
        assert [*folder.iterdir()] == []
        prompts = lm_eval.Prompts()
        # as the harness calls what the script puts in place of its own functions
        render = prompts._rendering(lambda model, chat: f"<{chat[-1]['content']}>")
        count = prompts._counting(lambda task, document, number: f"<{document}>")
        chat = [{"role": "user", "content": "Hi"}]
        text = render(None, chat)
        chat[0]["content"] = "a task may use its messages again"
        count(None, "Hi", 2)
        request = SimpleNamespace(task_name="colours", doc_id=7, args=(text,))

        def scored(model: Any, requests: Any) -> list[Any]:
            return [prompts._scored((text, " Blue"), [1, 5], [9]), prompts._scored(("", " Blue"), [], [9])]

        prompts._naming(scored)(None, [request, request])

        def generated(model: Any, requests: Any, disable_tqdm: bool) -> list[str]:
            return [str(prompts._fed_alone(context=torch.tensor([[1, 6]]))[0].tolist()) for _ in requests]

        plain = SimpleNamespace(task_name="written", doc_id=8, args=("no chat",))
        assert prompts._one_by_one(generated)(None, [plain]) == ["[1, 6]"]
        return prompts, ["a note"]

    monkeypatch.setattr("sys.argv", ["script", *options(files)])
    lm_eval.main(evaluated)
    first, *notes, scored, written = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert first["environment"]["lm-eval"] == "not installed" or find_spec("lm_eval")
    first, second = (line["note"] for line in notes)
    assert first == "a note"
    assert second.startswith("1 texts ")
    # the package reads the records as it does those of a real run
    number, record = read_prompt(scored, "here")
    assert (number, record["place"], record["few_shot"]) == (0, "colours, document 7", 2)
    assert (record["prompt_ids"], record["answer"], record["answer_ids"]) == ([1, 5], " Blue", [9])
    assert record["messages"] == [{"role": "user", "content": "Hi"}]
    number, record = read_prompt(written, "here")
    assert (number, record["prompt_ids"], "messages" in record, "answer" in record) == (1, [1, 6], False, False)


def test_an_evaluation_that_fails_ends_with_its_reason(
    script: Callable[[str], ModuleType], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*_: Path) -> Any:
        raise KeyError("no such task: colours")

    monkeypatch.setattr("sys.argv", ["script", *options(files)])
    with pytest.raises(SystemExit, match="KeyError: 'no such task: colours'"):
        script("lm_eval_rows").main(evaluated)
    # the environment is the first line, and the only one
    assert [*json.loads(files["output"].read_text())] == ["environment"]
