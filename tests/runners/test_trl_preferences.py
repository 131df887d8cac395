"""What TRL's DPO and KTO make of pairs, judged. Left out, with the reason, where TRL is not installed."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from jinja2 import TemplateError
from preference_records import Data
from preference_rows import EMPTY, ROWS, SIDES, rated

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.targets import RunnerChoice, RunnerTarget
from pytest_mistral_lora.runners import TRAINERS

trl = pytest.importorskip("trl", reason="TRL is not installed here; tox run -e runner-trl")

pytestmark = pytest.mark.filterwarnings("ignore")

FAULTS = {
    ("hostile-prompt", "chosen"): {"ML523"},
    ("hostile-prompt", "rejected"): {"ML523"},
    # two EOS are left of it, and no text
    ("hostile-answer", "chosen"): {"ML523", "ML534", "ML567"},
    ("trailing-spaces", "chosen"): {"ML529"},
    ("tool-result-in-answer", "chosen"): {"ML547"},
}


@pytest.fixture(scope="module", params=["spm-v3", "tekken-240911"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name: str = request.param
    return name, write_tiny_base(tmp_path_factory.mktemp("trl") / "base", shipped_tokenizer(name))


def prepared(kind: str, base: Path, rows: list[Data], folder: Path) -> Any:
    """Return the dataset that a trainer makes of rows."""
    from peft import LoraConfig
    from transformers import MistralForCausalLM

    tokenizer = BaseFolder(base).tokenizer().fast
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<unk>"
    config = {"max_length": None, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=MistralForCausalLM.from_pretrained(base),
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **config),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    return trainer.train_dataset


PLACES = {
    "DPO": [(f"rows[{number}], {side}", title, side) for number, title in enumerate(ROWS) for side in SIDES],
    # a row a side: all chosen answers come first
    "KTO": [
        (f"rows[{number}]", title, side)
        for number, (side, title) in enumerate((side, title) for side in SIDES for title in ROWS)
    ],
}


@pytest.mark.parametrize("kind", PLACES)
def test_the_faults_of_trl_are_found_and_its_sound_rows_are_sound(
    kind: str, base: tuple[str, Path], tmp_path: Path
) -> None:
    name, folder = base
    verdict = audit(prepared(kind, folder, list(ROWS.values()), tmp_path), tokenizer=name)
    places = {place: (title, side) for place, title, side in PLACES[kind]}
    # what the texts of a row show, such as a call of a tool that it does not offer, is a note
    of_rows = [one for one in verdict.findings if one.severity == "error" and one.rule != "ML506"]
    assert {str(finding.place) for finding in of_rows} <= places.keys()
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for finding in of_rows:
        found[places[str(finding.place)]].add(finding.rule)
    assert found == FAULTS
    assert verdict.facts["rows::encoded::labels"]["judged"] == 2 * len(ROWS)


@pytest.mark.parametrize("kind", PLACES)
def test_an_empty_answer_ends_trl(kind: str, base: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TemplateError):
        prepared(kind, base[1], [EMPTY], tmp_path)


@pytest.mark.parametrize("task", ["dpo", "reward", "kto"])
def test_the_runner_shows_the_same_faults_by_the_rows_of_the_user(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = ["single", "hostile-prompt", "trailing-spaces", "tool-result-in-answer"]
    rows = [ROWS[title] for title in titles] + [EMPTY]
    if task == "kto":
        rows = [rated(row)[0] for row in rows[:-1]] + [rated(EMPTY)[1]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--runner",
        "trl",
        "--task",
        task,
        "--tokenizer",
        "spm-v3",
        "--dataset",
        str(file),
        "--output-format=jsonl",
    ]
    assert main(["check", *words]) == 1
    *findings, last = map(json.loads, capsys.readouterr().out.splitlines())
    found = {(finding["place"].removeprefix(f"{file}:"), finding["rule"]) for finding in findings}
    side = "" if task == "kto" else ", chosen"
    expected = {(f"2{side}", "ML523"), (f"3{side}", "ML529"), ("5", "ML502"), ("4" + side, "ML547")}
    if task != "kto":
        expected |= {("2, rejected", "ML523"), (str(file), "ML506")}
    if task == "reward":
        # the conversation is scored as a whole
        expected -= {("4, chosen", "ML547")}
    assert found == expected
    assert last["summary"]["pairs"] == (0 if task == "kto" else 4)


def test_kto_takes_pairs_which_it_unpairs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    titles = ["single", "tool-result-in-answer", "hostile-prompt", "trailing-spaces"]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*(ROWS[title] for title in titles), EMPTY]))
    words = ["--task", "kto", "--tokenizer", "spm-v3", "--dataset", str(file), "--output-format=jsonl"]
    assert main(["check", "--runner", "trl", *words]) == 1
    *findings, last = map(json.loads, capsys.readouterr().out.splitlines())
    found = {(finding["place"].removeprefix(f"{file}:"), finding["rule"]) for finding in findings}
    assert found == {
        ("2, chosen", "ML547"),
        ("3, chosen", "ML523"),
        ("3, rejected", "ML523"),
        ("4, chosen", "ML529"),
        ("5", "ML502"),
        (str(file), "ML506"),
    }
    assert last["summary"]["pairs"] == 4


def test_without_a_dataset_a_task_is_given_the_packaged_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--runner", "trl", "--task", "reward", "--tokenizer", "spm-v1", "--output-format=jsonl"]) == 1
    *findings, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["summary"]["pairs"] == len([name for name in ROWS if not name.startswith("tool-")])
    assert {finding["rule"] for finding in findings if "empty-answer" in finding["place"]} == {"ML502"}


def test_the_runner_of_pytest_is_given_the_pairs_of_a_dataset(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(ROWS[title]) + "\n" for title in ("single", "trailing-spaces")))
    paths = NamedPaths(judges=[Path("spm-v3")], datasets=[file], runners=[RunnerChoice("trl")])
    [target] = [target for target in paths.targets() if isinstance(target, RunnerTarget)]
    results = {
        check.case: check.judge() for check in collect([target], Settings(1, None, "cpu", False, (), False, tmp_path))
    }
    [finding] = [finding for result in results.values() for finding in result.findings]
    assert (finding.rule, str(finding.place)) == ("ML529", f"{file}:2, chosen")
    assert finding.fix == TRAINERS["trl"].fixes("preferences")["ML529"]
    facts = dict(results["extraction"].facts)
    assert facts["rows"] == 2
    assert "; task dpo; " in facts["ran under"]
    assert not results[RULES["ML565"].case].not_checked


def test_a_cut_of_the_configuration_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["equal-beginnings"]) + "\n")
    (tmp_path / "dpo.yaml").write_text("max_length: 10\n")
    words = ["--config", str(tmp_path / "dpo.yaml"), "--tokenizer", "spm-v3", "--dataset", str(tmp_path / "rows.jsonl")]
    assert main(["check", "--runner", "trl", *words]) == 1
    out = capsys.readouterr().out
    assert "ML568" in out
    assert "Set `max_length: null`, or leave out pairs" in out
