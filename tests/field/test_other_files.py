"""A file of a trainer, a server or another program is named, with the command that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.other_files import configuration_answer, file_answer
from pytest_mistral_lora.formats.importers import importers
from pytest_mistral_lora.programs import other_files, registry

AXOLOTL = "base_model: mistralai/M\ndatasets: [{path: d.jsonl, type: chat_template}]\nadapter: lora\n"
LLAMAFACTORY = "model_name_or_path: m\nstage: sft\ndataset: identity\nfinetuning_type: lora\n"
TRL = "model_name_or_path: mistralai/M\ndataset_name: d.jsonl\nuse_peft: true\n"
JUDGE = "mistral-lora audit --runner {} --config {{path}} --tokenizer PATH"
IMPORT = "mistral-lora import {path} --to rows.jsonl"
ANSWERED: list[tuple[str, str, str, list[str]]] = [
    ("axolotl.yaml", AXOLOTL, "a configuration of Axolotl", [JUDGE.format("axolotl"), IMPORT, "--as rows"]),
    ("lf.yaml", LLAMAFACTORY, "a configuration of LLaMA-Factory", [JUDGE.format("llamafactory"), IMPORT]),
    ("lf.json", json.dumps({"model_name_or_path": "m", "stage": "sft"}), "a configuration of LLaMA-Factory", [IMPORT]),
    ("trl.yaml", TRL, "a configuration of TRL", [JUDGE.format("trl"), IMPORT]),
    (
        "tune.yaml",
        "model: {_component_: torchtune.m}\n",
        "a configuration of torchtune",
        ["mistral-lora audit encoded"],
    ),
    (
        "nemo.yaml",
        "recipe: R\nstep_scheduler: {num_epochs: 1}\nmodel: {_target_: m}\n",
        "a configuration of NeMo AutoModel",
        ["mistral-lora audit encoded"],
    ),
    ("lit.yaml", "checkpoint_dir: m\nlora_r: 8\ndata: {}\n", "a configuration of LitGPT", ["audit encoded"]),
    (
        "7B.yaml",
        "data: {instruct_data: d.jsonl}\nmodel_id_or_path: m\nlora: {rank: 64}\nrun_dir: r\n",
        "a configuration of mistral-finetune",
        ["mistral-lora check ROWS.jsonl"],
    ),
    (
        "studio.yaml",
        "training: {max_steps: 30}\nlora: {lora_r: 16}\nlogging: {}\ninference: {top_p: 1.0}\n",
        "the defaults of Unsloth Studio for a model",
        ["name those"],
    ),
    (
        "dataset_info.json",
        json.dumps({"hub": {"hf_hub_url": "x"}, "own": {"file_name": "own.json"}}),
        "a dataset_info.json of LLaMA-Factory",
        ["mistral-lora import {path} --dataset own --to rows.jsonl"],
    ),
    ("train.py", "from trl import SFTTrainer\n", "a script that uses TRL", ["audit --runner trl --config trl.yaml"]),
    ("tune.py", "import axolotl.cli\n", "a script that uses Axolotl", ["audit --runner axolotl --config axolotl.yaml"]),
    ("merge.yaml", "merge_method: ties\n", "a configuration of mergekit", ["name those"]),
]


@pytest.mark.parametrize(("name", "content", "title", "steps"), ANSWERED, ids=[one[0] for one in ANSWERED])
def test_a_file_of_a_program_is_named_with_the_command_that_reads_it(
    name: str, content: str, title: str, steps: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content.replace("{folder}", str(tmp_path)), "utf-8")
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 2
    err = capsys.readouterr().err
    assert f": this is {title}" in err
    for step in steps:
        assert step.format(path=path, folder=tmp_path) in err, err


def test_the_table_of_files_is_sound() -> None:
    files = other_files.other_files()
    assert files
    for file in files:
        assert bool(file.keys or file.entry_key) != bool(file.lines), file.title
        assert file.makes_a_model == (not file.step), file.title
        assert not file.folder or file.makes_a_model or "FOLDER" in file.step, file.title


def test_a_line_or_a_name_alone_is_not_enough() -> None:
    assert file_answer(Path("notes.txt"), b"FROM here\n") is None
    assert other_files.model_file("notes.txt", "FROM here\n") == ""
    assert other_files.model_file("Modelfile", "no line of it\n") == ""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Modelfile", "FROM ./model.gguf\nTEMPLATE x\n"),
        ("Modelfile.q4", "# ours\n  from mistral\n"),
        ("my.modelfile", "FROM x\n"),
        ("model.txt", "FROM ./a.gguf\nparameter stop x\n"),
        ("Modelfile", "FROM " + "x" * 5000 + "\0\n"),
    ],
)
def test_a_file_that_makes_a_model_is_known_by_its_lines(name: str, text: str) -> None:
    assert other_files.model_file(name, text) == "a Modelfile of Ollama"
    assert file_answer(Path(name), text.encode()) is None


@pytest.fixture
def no_field(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this package have no programs, and nothing that was read of them before."""
    caches = (other_files.other_files, importers)
    monkeypatch.setattr(registry, "_FIELD", "pytest_mistral_lora.no_field")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_field")
def test_without_the_table_files_of_programs_are_not_known() -> None:
    assert configuration_answer(Path("merge.yaml"), {"merge_method": "ties"}) is None
    assert configuration_answer(Path("a.yaml"), {"base_model": "x", "datasets": []}) is None
    assert other_files.model_file("Modelfile", "FROM x\n") == ""
    assert configuration_answer(Path("a.yaml"), {"compute_environment": "x"}) is not None
    assert file_answer(Path("a.py"), b"import trl\n") == file_answer(Path("a.py"), b"import json\n")
