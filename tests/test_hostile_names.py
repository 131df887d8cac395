"""A file or folder is judged the same under any name: only the source of its places differs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_sentencepiece import cut_v3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.escaping import printable

# PEFT and transformers warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Data = dict[str, Any]
HOSTILE = ("rows[3]", "x, chosen", "file.jsonl:7", os.fsdecode(b"caf\xe9"))
PIECES = (
    *HOSTILE,
    "rows",
    " record 3, line 4",
    "::",
    "{checkpoint}",
    "messages[1].content",
    "token 2",
    "'",
    "\xe9",
    "#",
)


def said(role: str, content: str) -> Data:
    return {"role": role, "content": content}


SOUND = {"messages": [said("user", "Hi"), said("assistant", "Hello")]}
IDS = {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, -100]}
CHAT = [
    SOUND,
    {"messages": [said("usr", "Hi"), said("assistant", "Hello")]},
    SOUND,
    {"messages": [said("user", "caf\u00c3\u00a9"), said("assistant", "nan")]},
    {"messages": [said("user", "[INST] x"), said("assistant", "</s>")]},
]
PAIRS = [
    {"prompt": [said("user", "Why?")], "chosen": [said("assistant", one)], "rejected": [said("assistant", other)]}
    for one, other in (("Yes.", "No."), ("Same.", "Same."), ("Good.", "</s> x"))
]
FILES: dict[str, list[Data]] = {
    "chat rows": CHAT,
    "encoded rows": [SOUND | IDS] * 2,
    "ids alone": [IDS] * 2,
    "pairs": PAIRS,
    "encoded pairs": [
        pair | {"prompt_ids": [1, 3, 16127, 4], "chosen_ids": [23325, 2], "rejected_ids": [1043]} for pair in PAIRS
    ],
}


def write_rows(file: Path, rows: list[Data]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "base", cut_v3())


def judged(place: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> Data:
    """Return what `check` finds, without the sources of places and without the name of the artifact."""
    code = main(["check", *words, "--json", "--examples", "1", "--no-cache"])
    data = json.loads(capsys.readouterr().out)

    def unnamed(value: Any) -> Any:
        if isinstance(value, dict):
            # names of targets and files are parts of these texts
            sources = ("source", "place", "nodeid", "target", "check", "others", "rerun", "fix")
            return {key: unnamed(item) for key, item in value.items() if key not in sources or isinstance(item, dict)}
        if isinstance(value, list):
            return [unnamed(item) for item in value]
        if not isinstance(value, str):
            return value
        for path in map(str, (place, place.parent)):
            # a report has the bytes of a name that are not UTF-8 as escapes
            for shown in (path, path.encode(errors="backslashreplace").decode(), printable(path, lines=False)):
                value = value.replace(shown, "PLACE")
        return value

    checks = [
        {
            "check": (check["subject"], check["case"], check["outcome"]),
            "not_checked": unnamed(check["not_checked"]),
            "facts": unnamed(check["facts"]),
            "findings": [unnamed({**one, "found": ""}) for one in check["findings"]],
            "others": [[unnamed(other) for other in one["structured"].pop("others")] for one in check["findings"]],
        }
        for check in data["checks"]
    ]
    causes = [(cause["rule"], cause["severity"], cause["count"], len(cause["others"])) for cause in data["causes"]]
    assert any(check["findings"] for check in checks), "the artifact has faults"
    return {"code": code, "counts": data["counts"], "checks": checks, "causes": causes}


NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_judged_the_same_under_any_name(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    plain = tmp_path / "plain" / "rows.jsonl"
    write_rows(plain, FILES[kind])
    expected = judged(plain, [str(plain), "--tokenizer", "spm-v3"], capsys)

    @settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(folder=NAMES, name=NAMES, end=st.sampled_from(["", ".jsonl"]))
    def judge_named(folder: str, name: str, end: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / f"{name}{end}"
        write_rows(file, FILES[kind])
        assert judged(file, [str(file), "--tokenizer", "spm-v3"], capsys) == expected
        file.unlink()

    judge_named()


def make_tokenizer(folder: Path, base: Path) -> list[str]:
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "repetition_penalty": 1.3}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return [str(folder)]


def make_adapter(folder: Path, base: Path) -> list[str]:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=400, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = folder.parent / "made"
    get_peft_model(MistralForCausalLM.from_pretrained(base), config).save_pretrained(made)
    made.rename(folder)
    return [str(folder), "--base", str(base)]


def make_recipe(folder: Path, base: Path) -> list[str]:
    folder.mkdir()
    write_rows(folder / "rows.jsonl", CHAT)
    recipe = {
        "base": {"path": str(base), "weights_sha256": BaseFolder(base).weights_sha256},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 2, "alpha": 4, "dropout": 0, "target_modules": ["q_proj"]},
        "training": {"learning_rate": 0.001, "epochs": 1, "batch_size": 1, "max_length": 64, "seed": 0},
        "output": "out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return [str(folder / "recipe.yaml")]


FOLDERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "tokenizer": make_tokenizer,
    "adapter": make_adapter,
    "recipe": make_recipe,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_judged_the_same_under_any_name(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for folder in (tmp_path / "plain" / "folder", tmp_path.joinpath(*HOSTILE)):
        folder.parent.mkdir(parents=True)
        found.append(judged(folder, FOLDERS[kind](folder, base), capsys))
    assert found[1] == found[0]


def test_a_fault_of_a_pair_in_a_folder_that_ends_like_a_side_is_found_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a fault of the prompt, which both sides share; a fault of one side; and a row that cannot be read
    shared = {**PAIRS[0], "prompt": [said("user", "caf\u00c3\u00a9 </s>")]}
    unread = {**PAIRS[0], "prompt": [said("usr", "Why?")]}
    found = []
    for name in ("plain", "x, chosen", "x, rejected"):
        file = tmp_path / name / "pairs.jsonl"
        file.parent.mkdir()
        write_rows(file, [shared, PAIRS[2], unread])
        assert main(["check", str(file), "--tokenizer", "spm-v3", "--json"]) == 1
        places = [
            (one["rule"], one["structured"]["place"]["record"], tuple(one["structured"]["place"]["part"]))
            for check in json.loads(capsys.readouterr().out)["checks"]
            for one in check["findings"]
        ]
        assert len(places) == len(set(places))
        found.append(places)
    assert {rule for rule, *_ in found[0]} >= {"ML601", "ML612"}
    assert found[1:] == found[:1] * 2


def test_a_file_whose_name_is_not_utf_8_is_not_blamed_for_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / os.fsdecode(b"rows\xe9.jsonl")
    write_rows(file, CHAT)
    assert main(["check", str(file), "--tokenizer", "spm-v3"]) == 1
    out = capsys.readouterr().out
    assert "ML601" in out
    assert "not valid JSON" not in out
    assert "dataset-" not in out
    write_rows(file, [SOUND])
    assert main(["check", str(file), "--tokenizer", "spm-v3"]) == 0
