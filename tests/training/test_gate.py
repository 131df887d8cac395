"""The gate: an adapter that learned its rows and kept the rest passes; one that is worse than its base fails."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cut_sentencepiece import cut_v3
from safetensors.torch import save_file
from tiny_runs import MakeRecipe, recipe_data, smoke

from pytest_mistral_lora.chat.completions import FormatCheck
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base, load_nf4
from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.checks import dataset_results
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.conformance.transcript import checks
from pytest_mistral_lora.errors import FindingsError, InputError, NonFiniteError, RecipeError
from pytest_mistral_lora.records.gate import FEWEST_CONVERSATIONS, Gate
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training import run as run_module
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.gate.folder import folder_gate
from pytest_mistral_lora.training.gate.measure import adapter_gate, row_losses
from pytest_mistral_lora.training.gate.rows import GateRows, RowsToMeasure, numbers_of
from pytest_mistral_lora.training.generate.answers import supervised_logits
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.recipe import Lora, Recipe, parse_recipe
from pytest_mistral_lora.training.rows import RowDataset
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import work_folder
from pytest_mistral_lora.training.step.forward import attend_in_segments, collate, step_rows, supervised_losses

CITIES = ["Oslo", "Bonn", "Rome", "Lyon", "Kiel", "Graz", "Bern", "Cork", "Nice", "Linz"]
LEARNING_RATE = 0.006
Answer = Callable[[int], tuple[str, str]]


def in_json(number: int) -> tuple[str, str]:
    return f"Where is number {number}?", json.dumps({"city": CITIES[number % 10]})


def in_prose(number: int) -> tuple[str, str]:
    return f"Where is number {number}?", f"It is in {CITIES[number % 10]}."


def general(number: int) -> tuple[str, str]:
    return f"Tell me of {CITIES[number % 10]} {number}.", f"blue sky over {CITIES[3 * number % 10]}"


def conversations(answer: Answer, numbers: Sequence[int]) -> list[dict[str, Any]]:
    pairs = map(answer, numbers)
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": wanted}]}
        for asked, wanted in pairs
    ]


def rows_of(answer: Answer, numbers: Sequence[int]) -> list[Row]:
    return [parse_row(data) for data in conversations(answer, numbers)]


def write(file: Path, answer: Answer, numbers: Sequence[int]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in conversations(answer, numbers)))


def write_files(folder: Path) -> None:
    write(folder / "rows.jsonl", in_json, range(20))
    write(folder / "held_out.jsonl", in_json, range(100, 100 + FEWEST_CONVERSATIONS))
    write(folder / "general.jsonl", general, range(200, 200 + FEWEST_CONVERSATIONS))
    write(folder / "four.jsonl", in_json, range(300, 304))


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return make_encoder("mistral-common", CheckpointTokenizer(base))


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    """A base that answers in prose, and that knows what `general` asks: there is something to lose."""
    folder = write_tiny_base(tmp_path_factory.mktemp("knowing") / "tiny", cut_v3())
    model = load_base(BaseFolder(folder), "fp32", "cpu")
    attend_in_segments(model)
    rows = [*rows_of(in_prose, range(40)), *rows_of(general, range(40))]
    dataset = RowDataset([encoder.encode(row) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        places = torch.randperm(len(dataset), generator=generator)[:8].tolist()
        losses, _ = supervised_losses(model, step_rows(collate([dataset[place] for place in places])))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gated(base: Path, **sections: Any) -> dict[str, Any]:
    training = {"steps": 6, "learning_rate": LEARNING_RATE, "batch_size": 8, **sections.get("training", {})}
    data = {"eval": ["held_out.jsonl"], **sections.get("data", {})}
    evaluation = {"gate": True, "retention": {"rows": ["general.jsonl"]}, **sections.get("evaluation", {})}
    return recipe_data(base, data=data, training=training, evaluation=evaluation)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, knowing: Path) -> RunResult:
    folder = tmp_path_factory.mktemp("good")
    write_files(folder)
    return train(parse_recipe(gated(knowing), folder=folder))


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory, knowing: Path) -> SimpleNamespace:
    """The command of a run with ten times the learning rate."""
    folder = tmp_path_factory.mktemp("ruined")
    write_files(folder)
    data = gated(knowing, training={"learning_rate": 10 * LEARNING_RATE})
    (folder / "recipe.yaml").write_text(json.dumps(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = main(["train", "recipe.yaml"])
    return SimpleNamespace(code=code, output=folder / "out")


def recorded(output: Path) -> Gate:
    gate = Gate.recorded_in(json.loads((output / "manifest.json").read_text()))
    assert gate is not None
    return gate


def verdicts_of(gate: Gate | None) -> dict[str, str]:
    assert gate is not None
    return {line.name: line.verdict for line in gate.lines}


def to_measure(encoder: Encoder, rows: Sequence[Row]) -> RowsToMeasure:
    return RowsToMeasure([encoder.encode(row) for row in rows], numbers_of(rows))


def measured(result: RunResult, rows: GateRows) -> Gate:
    return adapter_gate(result.model, result.encoder, rows, precision="fp32", device="cpu", display=RunDisplay())


def test_an_adapter_that_learned_its_rows_and_kept_the_rest_passes(good: RunResult) -> None:
    assert verdicts_of(good.gate) == {"held-out loss": "passed", "retention loss": "passed"}
    assert good.gate is not None
    assert recorded(good.output) == good.gate
    held_out, retention = good.gate.lines
    assert held_out.high < -2
    assert (retention.limit, retention.rows) == (0.05, FEWEST_CONVERSATIONS)
    # the run's own evaluation packs rows, and is of the same model
    logged = [line["eval_loss"] for line in good.log if "eval_loss" in line]
    assert held_out.adapter == pytest.approx(logged[-1], abs=1e-5)
    assert held_out.base == pytest.approx(logged[0], abs=1e-5)
    [*_, evaluation] = good.manifest["evaluation"]
    assert evaluation["results"] == verdicts_of(good.gate)


def test_the_note_and_the_page_show_the_gate(good: RunResult, ruined: SimpleNamespace) -> None:
    note = (good.output / "DECISION.md").read_text()
    assert "Status: trained; the gate passed\n" in note
    line = recorded(good.output).lines[0]
    cells = (line.base_text, line.adapter_text, line.difference_text, line.interval_text, "0", "40", "passed")
    assert f"| held-out loss | {' | '.join(cells)} |" in note
    failed = (ruined.output / "DECISION.md").read_text()
    assert "the gate failed" in failed
    assert re.search(r"^- retention loss: .* expected a difference of at most \+0\.0500$", failed, flags=re.MULTILINE)
    for output, classes in ((good.output, ["passed", "passed"]), (ruined.output, ["passed", "failed"])):
        page = (output / "training.html").read_text()
        ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", page))
        assert re.findall(r'<path class="(passed|failed|undecided)"', page) == classes
        assert line.name in page


def test_ten_times_the_learning_rate_fails_retention(ruined: SimpleNamespace) -> None:
    assert ruined.code == 1
    assert verdicts_of(recorded(ruined.output)) == {"held-out loss": "passed", "retention loss": "failed"}
    assert (ruined.output / "adapter_model.safetensors").is_file()
    assert not ruined.output.with_name("out.work").exists()


def test_four_held_out_rows_are_undecided(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    data = gated(base, data={"eval": ["four.jsonl"]}, training={"steps": 2})
    data["evaluation"] = {"gate": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    [line] = recorded(tmp_path / "out").lines
    assert (line.verdict, line.rows) == ("undecided", 4)
    assert f"held-out loss: not checked: 4 rows, and an interval of fewer than {FEWEST_CONVERSATIONS} " in printed.err
    assert "gate: undecided\n" in printed.err
    assert "gate: loss of 4 held-out rows, base" in printed.err
    # all lines undecided is not a failure, although nothing but the rows is checked
    assert smoke(tmp_path / "out", "--gate", "--base", base) == 0
    assert "gate: undecided" in capsys.readouterr().out


def test_held_out_rows_of_another_format_fail(good: RunResult) -> None:
    rows = rows_of(in_prose, range(100, 100 + FEWEST_CONVERSATIONS))
    [line] = measured(good, GateRows(to_measure(good.encoder, rows))).lines
    assert (line.name, line.verdict) == ("held-out loss", "failed")
    assert line.low > 0


@pytest.mark.slow
def test_answers_in_another_format_than_the_checks_ask_for_fail(
    knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base answers in prose, as the check asks; rows in JSON are trained."""
    write_files(tmp_path)
    data = gated(knowing, training={"steps": 20})
    asked = {"generations": FEWEST_CONVERSATIONS, "max_new_tokens": 12, "checks": [{"regex": "It is in .*"}]}
    data["evaluation"] = {"gate": True, **asked}
    result = train(parse_recipe(data, folder=tmp_path))
    assert verdicts_of(result.gate)["rate of regex:It is in .*"] == "failed"
    assert [field for field in verify(result.output) if field.state == "mismatch"] == []
    assert smoke(result.output, "--gate", "--base", knowing) == 1
    assert "ML807" in capsys.readouterr().out


def test_copies_are_one_conversation(good: RunResult) -> None:
    copies = rows_of(in_json, [100]) * (FEWEST_CONVERSATIONS + 4)
    question = copies[0].messages[0]
    answers = [parse_row({"messages": [question, {"role": "assistant", "content": str(n)}]}) for n in range(44)]
    for rows in (copies, answers):
        [line] = measured(good, GateRows(to_measure(good.encoder, rows))).lines
        assert (line.verdict, line.rows, line.conversations) == ("undecided", 44, 1)


def louder(text: str) -> str:
    return text.replace("Where", "WHERE")


# a file of the gate, and the rows that are written to it: which ones of another file, and in which form
SHARED = {
    "training rows under another name": ("held_out.jsonl", "a", "rows.jsonl", slice(2), str, {"ML610"}),
    "training rows in another form": ("held_out.jsonl", "a", "rows.jsonl", slice(2), louder, {"ML632"}),
    "training rows as those of other subjects": ("general.jsonl", "a", "rows.jsonl", slice(2), str, {"ML610"}),
    "the held-out rows in another order": (
        "general.jsonl",
        "a",
        "held_out.jsonl",
        slice(None, None, -1),
        str,
        {"ML615"},
    ),
    "some held-out rows alone": ("general.jsonl", "w", "held_out.jsonl", slice(2), louder, {"ML615"}),
    "one held-out row among those of other subjects": ("general.jsonl", "a", "held_out.jsonl", slice(1), str, set()),
}


@pytest.mark.parametrize(("file", "mode", "of", "which", "form", "rules"), SHARED.values(), ids=SHARED)
def test_rows_of_a_gate_that_are_others_are_refused(
    file: str, mode: str, of: str, which: slice, form: Callable[[str], str], rules: set[str], base: Path, tmp_path: Path
) -> None:
    write_files(tmp_path)
    lines = form((tmp_path / of).read_text()).splitlines(keepends=True)
    with (tmp_path / file).open(mode) as target:
        target.writelines(lines[which])
    (tmp_path / "recipe.yaml").write_text(json.dumps(gated(base)))
    results = dataset_results(RecipeTarget("recipe", tmp_path / "recipe.yaml"))
    found = {finding.rule for result in results.values() for finding in result.findings}
    assert {"ML610", "ML615", "ML632"} & found == rules
    recipe = parse_recipe(gated(base), folder=tmp_path)
    # a run refuses them of itself, too
    if not rules:
        prepare(recipe, unjudged=True)
        return
    with pytest.raises(InputError) as refused:
        prepare(recipe, unjudged=True)
    place = "evaluation.retention.rows" if rules == {"ML615"} else file
    assert place in str(refused.value.place)


def test_rates_are_judged_beside_those_of_the_base(good: RunResult) -> None:
    rows = rows_of(in_json, range(2))
    gate = measured(good, GateRows(asked=rows, checks=[FormatCheck("max_tokens", 3)], max_new_tokens=3))
    [line] = gate.lines
    assert (line.name, line.measures, line.rows, line.tokens) == ("rate of max_tokens:3", "rate", 2, 0)
    assert (line.base, line.adapter) == (1.0, 1.0)
    assert line.verdict == "undecided"


def test_the_gate_from_disk_is_that_of_the_run(good: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke(good.output, "--gate", "--base", good.base_folder, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert Gate.from_json(data) == good.gate
    assert data["rows"] == {"held-out": FEWEST_CONVERSATIONS, "retention": FEWEST_CONVERSATIONS}
    assert (data["verdict"], data["passed"], data["kind"]) == ("passed", True, "adapter")


def test_a_failed_gate_from_disk_is_a_finding(
    ruined: SimpleNamespace, knowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(ruined.output, "--gate", "--base", knowing) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^retention loss: .* expected a difference of at most \+0\.0500$", printed, flags=re.MULTILINE)
    assert "mistral-lora rules ML807" in printed


def test_another_verdict_than_that_of_the_run_is_named(
    good: RunResult, ruined: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "The run recorded another verdict: "
    assert smoke(good.output, "--gate", "--base", good.base_folder) == 0
    assert words not in capsys.readouterr().out
    folder = Path(shutil.copytree(good.output, tmp_path / "out"))
    failed = json.loads((ruined.output / "manifest.json").read_text())["evaluation"]
    (folder / "manifest.json").write_text(json.dumps({**good.manifest, "evaluation": failed}))
    assert smoke(folder, "--gate", "--base", good.base_folder, "--dataset", good.output.parent) == 0
    assert f"{words}failed." in capsys.readouterr().out


def gate_check(output: Path) -> Any:
    settings: Any = SimpleNamespace(device="cpu")
    found = {check.case: check for check in checks(AdapterTarget("out", output), settings)}
    return found["gate"].run() if "gate" in found else None


def test_the_suite_judges_the_recorded_numbers(good: RunResult, ruined: SimpleNamespace, run: RunResult) -> None:
    assert gate_check(good.output) is not None
    assert gate_check(good.output).findings == ()
    [finding] = gate_check(ruined.output).findings
    assert finding.rule == "ML807"
    assert finding.place.part == ("evaluation",)
    assert gate_check(run.output) is None  # its recipe asks for no gate


def test_a_merged_model_is_compared_with_its_base(
    good: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = merge(good.output, tmp_path / "merged", good.base_folder)
    dataset = good.output.parent
    assert smoke(merged.output, "--gate", "--base", good.base_folder, "--dataset", dataset, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "merged"
    for found, line in zip(Gate.from_json(data).lines, recorded(good.output).lines, strict=True):
        assert found.base == pytest.approx(line.base, abs=1e-5)
        assert found.adapter == pytest.approx(line.adapter, abs=1e-3)
    assert smoke(merged.output, "--gate", "--base", merged.output, "--dataset", dataset) == 2
    assert "a merged model" in capsys.readouterr().err


def test_the_rows_and_the_counts_are_verified(good: RunResult, tmp_path: Path) -> None:
    fields = {field.name: field for field in verify(good.output, base=good.base_folder, dataset=good.output.parent)}
    assert [name for name, field in fields.items() if field.state != "match"] == []
    assert fields["dataset.retention.rows_sha256"].found == good.manifest["dataset"]["retention"]["rows_sha256"]
    assert fields["evaluation.gate.held-out loss"].found["rows"] == FEWEST_CONVERSATIONS
    assert {"dataset.retention.files[0].sha256", "evaluation.gate.retention loss"} <= fields.keys()
    # other rows of the same number
    write_files(tmp_path)
    write(tmp_path / "general.jsonl", in_prose, range(200, 200 + FEWEST_CONVERSATIONS))
    moved = {field.name for field in verify(good.output, dataset=tmp_path) if field.state == "mismatch"}
    assert {"dataset.retention.files[0].sha256", "dataset.retention.rows_sha256"} <= moved
    assert "evaluation.gate.retention loss" in moved
    assert "evaluation.gate.held-out loss" not in moved


def test_other_rows_are_refused(good: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    write(tmp_path / "held_out.jsonl", in_json, range(50))
    assert smoke(good.output, "--gate", "--base", good.base_folder, "--dataset", tmp_path) == 2
    expected = good.manifest["dataset"]["held_out_rows_sha256"]
    assert re.search(rf"{tmp_path}/held_out\.jsonl: the rows have .* {expected}, as recorded", capsys.readouterr().err)
    (tmp_path / "held_out.jsonl").unlink()
    assert smoke(good.output, "--gate", "--base", good.base_folder, "--dataset", tmp_path) == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluation", "field"), [({"generations": "two"}, "evaluation.generations"), ([], "evaluation")], ids=str
)
def test_a_recorded_recipe_with_a_fault_is_named(
    evaluation: Any, field: str, good: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(good.output, tmp_path / "out"))
    data = json.loads((folder / "manifest.json").read_text())
    data["recipe"]["evaluation"] = evaluation
    (folder / "manifest.json").write_text(json.dumps(data))
    assert smoke(folder, "--gate", "--base", good.base_folder, "--dataset", good.output.parent) == 2
    assert f"manifest.json, recipe.{field}: expected" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--gate", "--rows", "rows.jsonl"), ("--dataset", ".")], ids=str)
def test_options_that_do_not_go_together(
    good: RunResult, options: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(good.output, *options) == 2
    assert "--gate" in capsys.readouterr().err


def test_a_folder_without_held_out_rows_has_no_gate(run: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke(run.output, "--gate", "--base", run.base_folder) == 2
    assert "held out no rows" in capsys.readouterr().err


def files(output: Path) -> dict[str, bytes]:
    """The files of a run, without those that record from which step it was resumed."""
    resumed = {"manifest.json", "DECISION.md"}
    found = (path for path in output.rglob("*") if path.is_file() and path.name not in resumed)
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in found}


def test_a_run_that_is_killed_in_the_gate_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name)
        # rows that are split off by their hash
        data = gated(base, data={"eval": [], "held_out": 0.3}, training={"steps": 2})
        data["evaluation"] |= {"retention": {"rows": ["four.jsonl"]}}
        recipe = parse_recipe(data, folder=tmp_path / name)
        if name == "killed":

            def kill(*given: Any, **named: Any) -> Gate:
                adapter_gate(*given, **named)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(run_module, "adapter_gate", kill)
                with pytest.raises(KeyboardInterrupt):
                    train(recipe)
            assert work_folder(recipe).is_dir()
            assert not recipe.output.exists()
        results.append(train(recipe, resume=name == "killed"))
    whole, killed = results
    assert killed.manifest["training"]["resumed_from_step"] == 2
    assert killed.gate == whole.gate
    assert killed.manifest["evaluation"] == whole.manifest["evaluation"]
    assert files(killed.output) == files(whole.output)
    assert folder_gate(killed.output, base).gate == killed.gate


WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "target_modules": ["attention+mlp"]},
    "dora": {"dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both": {"dora": True, "modules_to_save": ["lm_head"]},
}
NF4 = pytest.param(
    "nf4",
    marks=[
        pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed here"),
        pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    ],
)


@pytest.mark.parametrize("weights", ["fp32", "bf16", NF4])
@pytest.mark.parametrize("lora", WAYS.values(), ids=WAYS)
def test_the_switched_off_adapter_is_exactly_the_base(
    lora: dict[str, Any], weights: str, base: Path, encoder: Encoder
) -> None:
    def loaded() -> Any:
        if weights == "nf4":
            return load_nf4(BaseFolder(base), "bf16", "cpu")
        return load_base(BaseFolder(base), "bf16" if weights == "bf16" else "fp32", "cpu")

    settings = Lora.model_validate({"r": 4, **lora})
    layers = adapted_layers(BaseFolder(base), settings.target_modules)
    adapted = attach_adapter(loaded(), settings, layers, seed=0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    alone = loaded().requires_grad_(requires_grad=False)
    rows = [encoder.encode(row) for row in rows_of(in_json, range(2))]
    with adapted.disable_adapter():
        assert all(torch.equal(supervised_logits(adapted, row), supervised_logits(alone, row)) for row in rows)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for model in (adapted, alone):
        attend_in_segments(model)
    with adapted.disable_adapter():
        off = row_losses(adapted, rows)
    plain, on = row_losses(alone, rows), row_losses(adapted, rows)
    if "lm_head" not in settings.modules_to_save:
        assert off.sums.tolist() == plain.sums.tolist()
    # a head that is saved in full computes the same logits, and torch sums their exponentials
    assert off.sums == pytest.approx(plain.sums, rel=1e-6)
    assert not np.allclose(on.sums, plain.sums, rtol=1e-3)
    assert trainable == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def test_a_loss_that_is_not_finite_is_an_error(base: Path, encoder: Encoder) -> None:
    layers = adapted_layers(BaseFolder(base), ["attention"])
    model = attach_adapter(load_base(BaseFolder(base), "fp32", "cpu"), Lora(), layers, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(torch.nan)
    rows = GateRows(to_measure(encoder, rows_of(in_json, range(2))))
    with pytest.raises(NonFiniteError, match="held-out rows, adapter: 2 losses not finite, first nan"):
        adapter_gate(model, encoder, rows, precision="fp32", device="cpu", display=RunDisplay())


def test_a_row_counts_the_same_beside_any_other(good: RunResult) -> None:
    encoded = good.data.held_out.encoded[:6]
    whole = row_losses(good.model, encoded)
    parts = [row_losses(good.model, [row]) for row in encoded]
    assert whole.sums.tolist() == [part.sums.item() for part in parts]
    assert whole.counts.tolist() == [row.supervised_tokens for row in encoded]


# recipes


def test_rows_of_the_gate_are_encoded_as_held_out_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "sharegpt.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}])
    )
    two = [*rows_of(general, range(2))]
    joined = {"messages": [dict(message) for row in two for message in row.messages]}
    (tmp_path / "turns.jsonl").write_text(json.dumps(joined) + "\n")
    retention = {"rows": ["sharegpt.json", {"path": "turns.jsonl", "objective": "last-answer"}]}
    retention["rows"][0] = {"path": "sharegpt.json", "format": "sharegpt"}
    recipe = make_recipe(evaluation={"gate": True, "retention": retention})
    prepared = prepare(recipe)
    assert prepared.retention is not None
    [converted, turns] = prepared.gate_rows.retention.encoded
    assert prepared.encoder.decode(converted.input_ids).endswith("Yes.")
    [first, _] = [prepared.encoder.encode(row) for row in two]
    assert turns.supervised_tokens < sum(prepared.encoder.encode(row).supervised_tokens for row in two)
    assert first.supervised_tokens
    # of these rows alone: nothing that judges the rows of `data` takes it for theirs
    assert "last-answer" in {str(objective) for objective in recipe.retention_objectives}
    assert {str(objective) for objective in recipe.objectives} == {"answers"}
    again = parse_recipe(recipe.as_written(), folder=tmp_path)
    assert again.as_written() == recipe.as_written()
    assert again.data_paths == recipe.data_paths


def test_a_long_row_of_the_gate_follows_the_policy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_files(tmp_path)
    long = " ".join(["word"] * 80)
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": long}]}) + "\n"
    )
    evaluation = {"gate": True, "retention": {"rows": ["general.jsonl", "long.jsonl"]}}
    with pytest.raises(FindingsError, match=r"long\.jsonl:1"):
        prepare(make_recipe(evaluation=evaluation, training={"max_length": 60}))
    kept = prepare(make_recipe(evaluation=evaluation, training={"max_length": 60, "truncation": "drop"}))
    assert len(kept.gate_rows.retention.encoded) == FEWEST_CONVERSATIONS
    evaluation["retention"] = {"rows": ["long.jsonl"]}
    with pytest.raises(InputError, match="none of its 1 rows is left"):
        prepare(make_recipe(evaluation=evaluation, training={"max_length": 60, "truncation": "drop"}), unjudged=True)


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"gate": True}, r"evaluation\.gate without rows to judge; expected data\.eval, data\.held_out or"),
        ({"retention": {"rows": ["general.jsonl"]}}, "evaluation: retention without gate; expected gate: true"),
        ({"gate": True, "retention": {"rows": []}}, r"evaluation\.retention\.rows"),
        ({"gate": True, "retention": {"rows": ["a"], "max_loss_increase": -1}}, r"retention\.max_loss_increase"),
        ({"gate": True, "retention": {"rows": ["a"], "max_loss": 1}}, "did you mean 'max_loss_increase'"),
        ({"gate": True, "retention": {"rows": [{"path": "a", "format": "x"}]}}, r"retention\.rows\.0\.format"),
        ({"gate": "yes"}, r"evaluation\.gate"),
    ],
    ids=str,
)
def test_a_bad_gate_is_refused(evaluation: dict[str, Any], words: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(evaluation=evaluation)


def test_bad_rows_of_the_gate_are_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_files(tmp_path)
    with (tmp_path / "general.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "bot", "content": "Hi."}]}\n')
    recipe = make_recipe(evaluation={"gate": True, "retention": {"rows": ["general.jsonl"]}})
    with pytest.raises(FindingsError, match=rf"general\.jsonl:{FEWEST_CONVERSATIONS + 1}, messages\[0\]\.role"):
        prepare(recipe)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.as_written()))
    results = dataset_results(RecipeTarget("recipe", tmp_path / "recipe.yaml"))
    [finding] = results["rows-are-valid"].findings
    assert str(finding.place).startswith(f"{tmp_path / 'general.jsonl'}:{FEWEST_CONVERSATIONS + 1}")


def test_an_output_may_not_hold_rows_of_the_gate(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "general.jsonl", general, range(2))
    recipe: Recipe = make_recipe(evaluation={"gate": True, "retention": {"rows": ["out/general.jsonl"]}})
    with pytest.raises(InputError, match=r"out holds .*general\.jsonl"):
        train(recipe)
