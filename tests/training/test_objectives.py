"""A run trains on the tokens of its objectives, and its records say so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from datasets import load_from_disk
from derived_tekken import derived_tokenizer
from sampling import sampled
from tiny_runs import MakeRecipe, recipe_data

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import ANSWERS, MODIFIERS, TURNS, Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.conformance.groups import FindingGroups, failed_rows
from pytest_mistral_lora.conformance.mask.checks import checks as mask_checks
from pytest_mistral_lora.conformance.targets import RecipeTarget
from pytest_mistral_lora.conformance.train.harness import SCALE, TrainerHarness
from pytest_mistral_lora.conformance.train.step_laws import TOLERANCE, ReferenceStep, reference_step, step_difference
from pytest_mistral_lora.errors import InputError, RecipeError, RowsError, StoppedError
from pytest_mistral_lora.formats.sources import recorded_file
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.manifest import MANIFEST, SCHEMA, sealed
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.runners import TRAINERS
from pytest_mistral_lora.training.adapter import adapter_tensors
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.export.bridge import plan_export
from pytest_mistral_lora.training.export.run import export
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.recipe import Recipe, load_recipe, parse_recipe
from pytest_mistral_lora.training.rerun import rerun
from pytest_mistral_lora.training.rows.loading import RunData
from pytest_mistral_lora.training.run import RunResult, train

EACH = [
    Objective(turns, without) for turns in TURNS for without in ((), ("no-thinking",), ("no-calls",), tuple(MODIFIERS))
]
CALL = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def called(question: str, answer: str) -> list[dict[str, Any]]:
    return [
        *said("Before that?", "This.", question),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "9", "tool_call_id": "123456789", "name": "f"},
        {"role": "assistant", "content": answer},
    ]


def thought(question: str, thinking: str, answer: str) -> list[dict[str, Any]]:
    chunks = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": answer}]
    return [*said(question), {"role": "assistant", "content": chunks}]


CHAT = [{"messages": said("one", "two", "three", "four")}, {"messages": said("red", "blue", "warm", "cold")}]
WITH_TOOLS = [{"messages": called(f"What is {n}?", f"It is {n}."), "tools": TOOLS} for n in ("up", "down")]
HELD_CHAT = [{"messages": said("sun", "moon", "sea", "land")}]
HELD_TOOLS = [{"messages": called("What is left?", "It is left."), "tools": TOOLS}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed(base: Path, folder: Path, **training: Any) -> Recipe:
    """Return a recipe of a chat file, by the default, and a tool file, by its own objective; both sides held out."""
    for name, rows, held_out in (("chat", CHAT, HELD_CHAT), ("tools", WITH_TOOLS, HELD_TOOLS)):
        write(folder / f"{name}.jsonl", rows)
        write(folder / f"held-{name}.jsonl", held_out)
    data = {
        "train": ["chat.jsonl", {"path": "tools.jsonl", "objective": "last-answer"}],
        "eval": ["held-chat.jsonl", {"path": "held-tools.jsonl", "objective": "last-answer"}],
    }
    return parse_recipe(recipe_data(base, data=data, training={"steps": 2, "batch_size": 3, **training}), folder=folder)


@pytest.fixture(scope="module")
def mixture(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(mixed(base, tmp_path_factory.mktemp("mixture")))


# the recipe


def parsed(**sections: Any) -> Recipe:
    data: dict[str, Any] = {"base": {"repo": "a/b", "revision": "1" * 40}, "output": "out"}
    data |= {"data": {"train": ["rows.jsonl"]}, "training": {"steps": 1}}
    return parse_recipe({**data, **{key: {**data[key], **changes} for key, changes in sections.items()}})


def test_each_file_has_the_objective_of_its_entry_or_of_the_recipe(tmp_path: Path) -> None:
    entries = ["a.jsonl", {"path": "b.jsonl", "objective": "no-calls, last-round"}]
    recipe = parsed(training={"objective": "last-answer"}, data={"train": entries, "eval": entries[::-1]})
    found = [(file.path.name, str(file.objective), file.is_held_out) for file in recipe.files()]
    of_train = [("a.jsonl", "last-answer", False), ("b.jsonl", "last-round,no-calls", False)]
    assert found == [*of_train, *((name, words, True) for name, words, _ in of_train[::-1])]
    assert parsed().files()[0].objective == ANSWERS


def test_an_objective_converts_no_rows_and_goes_with_a_conversion(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", CHAT)
    talk = [{"from": role, "value": text} for role, text in zip(("human", "gpt") * 2, "abcd", strict=True)]
    (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": talk}]))
    entries = [{"path": name, "objective": "last-answer"} for name in ("rows.jsonl", "sharegpt.json")]
    data = recipe_data(base, data={"train": ["rows.jsonl"], "eval": entries}, training={"steps": 1})
    recipe = parse_recipe(data, folder=tmp_path)
    found = [(str(file.objective), file.is_held_out, file.source is None) for file in recipe.files()]
    assert found == [("answers", False, True), ("last-answer", True, True), ("last-answer", True, False)]
    run = train(recipe, unjudged=True)  # the same file on both sides
    assert [len({span.turn for span in one.spans if span.supervised}) for one in run.data.held_out.encoded] == [1, 1, 1]
    states = checked(run.output, tmp_path)
    assert {name for name, state in states.items() if state == "mismatch"} == set()
    written = json.loads((run.output / MANIFEST).read_text())["dataset"]["eval_files"]
    assert [(entry["objective"], "source" in entry) for entry in written] == [
        ("last-answer", False),
        ("last-answer", True),
    ]
    assert rerun(run.output, base=base, dataset=tmp_path).fact.state == "match"


def test_a_recipe_is_written_with_its_objectives_and_read_again() -> None:
    recipe = parsed(training={"objective": "everything"}, data={"train": [{"path": "b.jsonl", "objective": "answers"}]})
    written = json.loads(json.dumps(recipe.as_written()))
    assert written["training"]["objective"] == "everything"
    assert written["data"]["train"] == [{"path": "b.jsonl", "objective": "answers"}]
    assert parse_recipe(written) == recipe


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("last-anwser", "did you mean 'last-answer'"),
        ("answers,last-round", "answers and last-round"),
        ("answers, answers", "twice"),
        ([1], "[1] is no objective"),
    ],
)
def test_a_wrong_objective_is_refused_with_file_line_and_field(words: Any, found: str, tmp_path: Path) -> None:
    text = "base: {repo: a/b, revision: %s}\ndata:\n  train:\n    - {path: a.jsonl, objective: %s}\n"
    text += "training:\n  steps: 1\n  objective: %s\noutput: out\n"
    path = tmp_path / "recipe.yaml"
    for at, line, field in ((0, 4, "data.train.0.objective"), (1, 7, "training.objective")):
        shown = [json.dumps(words) if number == at else "answers" for number in range(2)]
        path.write_text(text % ("a" * 40, *shown))
        with pytest.raises(RecipeError) as refused:
            load_recipe(path)
        assert str(refused.value).startswith(f"{path}:{line}, {field}: ")
        assert found in str(refused.value)


def test_words_that_a_comma_splits_in_braces_are_named_with_their_quotes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = f"base: {{repo: a/b, revision: {'a' * 40}}}\noutput: out\n"
    for line, key, keys in (
        (3, "data.train.0", "data: {train: [{path: a.jsonl, objective: last-answer,no-calls}]}\ntraining: {steps: 1}"),
        (4, "training", "data: {train: [a.jsonl]}\ntraining: {steps: 1, objective: last-answer,no-calls}"),
    ):
        path.write_text(text + keys)
        with pytest.raises(RecipeError, match=r"objective: 'last-answer,no-calls'") as refused:
            load_recipe(path)
        assert str(refused.value).startswith(f"{path}:{line}, {key}: ")
        path.write_text(text + keys.replace("last-answer,no-calls", "'last-answer,no-calls'"))
        assert Objective("last-answer", ("no-calls",)) in load_recipe(path).objectives


def test_an_editor_accepts_the_words_that_a_recipe_accepts() -> None:
    of_training = Recipe.json_schema["$defs"]["Training"]["properties"]["objective"]
    of_entry = Recipe.json_schema["$defs"]["DataSource"]["properties"]["objective"]
    assert of_training["default"] == "answers"
    for schema in (of_training, of_entry):
        for objective in EACH:
            jsonschema.validate(str(objective), schema)
        jsonschema.validate("no-calls , answers", schema)
        for wrong in ("", "last", "answers,", "answers last-round"):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)


def test_a_manifest_accepts_each_objective_and_nothing_else() -> None:
    assert {*SCHEMA.data["$defs"]["objective"]["enum"]} == {*map(str, EACH)}


def test_an_objective_about_a_token_that_the_base_lacks_is_refused_at_its_key(make_recipe: MakeRecipe) -> None:
    for backend in ("mistral-common", "chat-template"):
        for place, recipe in {
            "training.objective": make_recipe(training={"objective": "no-thinking"}),
            "data.train.0.objective": make_recipe(data={"train": [{"path": "rows.jsonl", "objective": "no-thinking"}]}),
        }.items():
            with pytest.raises(RecipeError, match=r"\[THINK\]") as refused:
                prepare(recipe.model_copy(update={"backend": backend}))
            assert str(refused.value.place) == place


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "suffix": "b", "completion": "c"},
        {"prompt": said("q"), "chosen": said("q", "a")[1:], "rejected": said("q", "b")[1:]},
        {"prompt": said("q"), "completion": said("q", "a")[1:], "label": True},
    ],
    ids=["fim", "pair", "rated"],
)
def test_a_record_of_another_kind_takes_no_objective(
    record: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", [*CHAT, record])
    for recipe in (
        make_recipe(training={"objective": "last-answer"}),
        make_recipe(data={"train": [{"path": "rows.jsonl", "objective": "everything"}]}),
    ):
        with pytest.raises(RowsError, match="takes no objective") as refused:
            train(recipe, unjudged=True)
        assert f"{tmp_path / 'rows.jsonl'}:3" in str(refused.value)
        assert refused.value.exit_code == 2
        assert not recipe.output.exists()


# the rows


def encodings(data: RunData) -> list[Any]:
    return [list(split.encoded) for split in (data.train, data.held_out)]


@pytest.mark.parametrize("many", [False, True])
def test_rows_are_encoded_and_read_again_by_the_objective_of_their_file(
    many: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    if many:
        monkeypatch.setattr(chunks, "MANY_BYTES", 1)
        monkeypatch.setenv("MISTRAL_LORA_PROCESSES", "1")
    prepared = prepare(mixed(base, tmp_path))
    oracle = prepared.encoder.tokenizer.oracle
    for split in (prepared.data.train, prepared.data.held_out):
        assert [oracle.encode(row) for row in split.rows] == list(split.encoded)
    named = [str(row.objective) for row in prepared.data.train.rows]
    assert named == ["answers"] * 2 + ["last-answer"] * 2
    files = {"train": ["chat.jsonl", "tools.jsonl"], "eval": ["held-chat.jsonl", "held-tools.jsonl"]}
    undeclared = {**prepared.recipe.as_written(), "data": files}
    plain = prepare(parse_recipe(undeclared, folder=tmp_path))
    for kept, (one, other) in enumerate(zip(prepared.data.train.encoded, plain.data.train.encoded, strict=True)):
        assert one.input_ids == other.input_ids
        assert (one.labels == other.labels) == (kept < 2)


# the run


def stop_after_one_step(recipe: Recipe) -> None:
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(StoppedError):
        train(recipe, stop=stop)


def test_a_resumed_run_is_the_run_that_never_stopped_and_has_its_objective(
    mixture: RunResult, base: Path, tmp_path: Path
) -> None:
    recipe = mixed(base, tmp_path)
    stop_after_one_step(recipe)
    written = recipe.as_written()
    for changed, key in (
        ({"training": {**written["training"], "objective": "last-round"}}, "training.objective"),
        ({"data": {**written["data"], "train": ["chat.jsonl", "tools.jsonl"]}}, "set of rows"),
    ):
        other = parse_recipe({**written, **changed}, folder=tmp_path)
        with pytest.raises(InputError, match=f"had another .*{re.escape(key)}"):
            train(other, resume=True)
    resumed = train(recipe, resume=True)
    assert resumed.manifest["training"]["resumed_from_step"] == 1
    assert resumed.manifest["lora"]["tensors_sha256"] == mixture.manifest["lora"]["tensors_sha256"]
    losses = [[line["eval_loss"] for line in one.log if "eval_loss" in line] for one in (resumed, mixture)]
    assert losses[0] == losses[1]


def checked(folder: Path, data: Path) -> dict[str, str]:
    fields = verify(folder, dataset=data, open_file=recorded_file)
    return {field.name: field.state for field in fields}


def test_the_records_of_a_mixture_name_each_objective_and_verify(mixture: RunResult) -> None:
    manifest, home = mixture.manifest, mixture.output.parent
    assert manifest["masking"]["objective"] == "answers"
    for name in ("files", "eval_files"):
        assert [entry.get("objective") for entry in manifest["dataset"][name]] == [None, "last-answer"]
    decision = (mixture.output / "DECISION.md").read_text()
    assert "`answers` (`chat.jsonl`, `held-chat.jsonl`)" in decision
    assert "`last-answer` (`tools.jsonl`, `held-tools.jsonl`)" in decision
    states = checked(mixture.output, home)
    assert {name for name, state in states.items() if state == "mismatch"} == set()
    assert states["masking.labels_sha256"] == states["masking.objective"] == "match"
    assert rerun(mixture.output, base=mixture.base_folder, dataset=home).fact.state == "match"


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    write_json(folder / MANIFEST, sealed(data))
    return folder


LABELS = {"masking.labels_sha256", "masking.supervised_tokens"}
OF_TOOLS = "dataset.files[1].objective"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: data["masking"].update(objective="last-answer"), {*LABELS, "masking.objective"}),
        (lambda data: data["dataset"]["files"][1].update(objective="last-round"), {*LABELS, OF_TOOLS}),
        (lambda data: data["dataset"]["files"][1].pop("objective"), {*LABELS, OF_TOOLS}),
        (lambda data: data["dataset"]["eval_files"][1].pop("objective"), {"dataset.eval_files[1].objective"}),
        (lambda data: data["masking"].update(supervised_tokens=1), {"masking.supervised_tokens"}),
        (lambda data: data["recipe"]["training"].update(objective="everything"), {"masking.objective"}),
    ],
)
def test_a_changed_objective_or_label_is_a_mismatch(
    change: Callable[[dict[str, Any]], Any], found: set[str], mixture: RunResult, tmp_path: Path
) -> None:
    folder = reseal(Path(shutil.copytree(mixture.output, tmp_path / "changed")), change)
    states = checked(folder, mixture.output.parent)
    # the note that this manifest would have is another one, too
    assert {name for name, state in states.items() if state == "mismatch" and not name.startswith("files.")} >= found
    assert LABELS - found <= {name for name, state in states.items() if state == "match"}


def test_runs_of_different_objectives_differ_in_them(mixture: RunResult, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["masking"]["objective"] = "last-answer"
        data["dataset"]["files"][1]["objective"] = "last-round"

    other = reseal(Path(shutil.copytree(mixture.output, tmp_path / "changed")), change)
    facts = {field.path: (field.a, field.b) for field in compare_runs(mixture.output, other).facts}
    assert facts["$.masking.objective"] == ("answers", "last-answer")
    assert facts["$.dataset.files[1].objective"] == ("last-answer", "last-round")


# each objective, beside the reference in float64


LONG = "Here is a beginning that is the same in two of the rows, and long enough to be shared by them. "
TALKS = [
    thought("Why?", "Let me see.", "Because."),
    [*said(LONG + "one?", "It is one."), *called("Which?", "This one.")],
    [*said(LONG + "two?", "It is two."), *thought("Sure?", "Am I?", "Yes.")],
    [*said("Hello", "Hi there"), *thought("And now?", "Hm, now.", "Now we go.")],
]
"""Thoughts, calls, several rounds, and rows with the same beginning; each row has a loss under each objective."""


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> TrainerHarness:
    folder = tmp_path_factory.mktemp("thinking")
    write_tiny_base(folder / "base", derived_tokenizer("derived-v13-thinking"))
    write(folder / "rows.jsonl", [{"messages": talk, "tools": TOOLS} for talk in TALKS])
    return TrainerHarness(folder, folder, "cpu")


def under(harness: TrainerHarness, objective: Objective) -> TrainerHarness:
    """Return a harness of the same rows, loaded as those of a recipe with the objective."""
    found = TrainerHarness(harness.folder, harness.scratch, harness.device)
    oracle = harness.encoder.tokenizer.oracle
    vars(found).update(encoder=harness.encoder, base_sha256=harness.base_sha256)
    talks = [parse_row({"messages": talk, "tools": TOOLS}) for talk in TALKS]
    vars(found)["encoded"] = [oracle.encode(talk.with_objective(objective)) for talk in talks]
    return found


def near(difference: Mapping[str, Any]) -> None:
    assert difference["missing"] == []
    assert difference["gradient"] < TOLERANCE["cpu"]
    assert difference["loss"] == pytest.approx(difference["expected_loss"], rel=TOLERANCE["cpu"])


# each way to choose turns, and each to take tokens away; the labels of all of them are tested above
@pytest.mark.parametrize(
    "objective",
    sampled(EACH, ["answers", "last-answer,no-calls", "last-round,no-thinking", "everything,no-thinking,no-calls"]),
)
def test_a_step_and_the_held_out_loss_are_those_of_the_reference(
    objective: Objective, thinking: TrainerHarness
) -> None:
    harness = under(thinking, objective)
    model = harness.perturbed_model()
    truth = reference_step(harness.base, adapter_tensors(model), SCALE, harness.encoded)
    for settings in ({"micro_batch_tokens": 4096}, {"micro_batch_tokens": 1}, {"share_prefix": True}):
        step = harness.step(**settings)
        near(step_difference(step, truth.loss, truth.gradients))
    trainer = harness.trainer(model, harness.recipe(), held_out=len(TALKS))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth.loss, rel=TOLERANCE["cpu"])


def test_the_reference_tells_objectives_apart(thinking: TrainerHarness) -> None:
    adapter = adapter_tensors(thinking.perturbed_model())
    found: dict[str, ReferenceStep] = {}
    for objective in (Objective(turns) for turns in TURNS):
        harness = under(thinking, objective)
        found[str(objective)] = reference_step(harness.base, adapter, SCALE, harness.encoded)
    assert len({step.tokens for step in found.values()}) == len({round(step.loss, 3) for step in found.values()}) == 4
    with pytest.raises(AssertionError):
        near(step_difference(thinking.step(), found["last-answer"].loss, found["last-answer"].gradients))


# laws, exports and the command line


def recipe_file(folder: Path, base: Path, **entry: str) -> Path:
    """Write a recipe of the mixture's files, and return it."""
    recipe = mixed(base, folder).as_written()
    recipe["data"] = {"train": ["chat.jsonl", {"path": "tools.jsonl", **entry}]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def laws_of(recipe: Path, *rules: str) -> dict[str, list[str]]:
    settings = Settings(20, None, "cpu", False, (), False, recipe.parent)
    cases = {check.case: check for check in mask_checks(RecipeTarget("recipe", recipe), settings)}
    return {rule: [finding.text() for finding in cases[RULES[rule].case].run().findings] for rule in rules}


LAWS = tuple(f"ML{number}" for number in range(101, 106))


@pytest.mark.parametrize("words", ["last-round", "everything", "last-answer,no-calls"])
def test_the_laws_of_labels_hold_under_the_objectives_of_a_recipe(words: str, base: Path, tmp_path: Path) -> None:
    assert laws_of(recipe_file(tmp_path, base, objective=words), *LAWS) == {rule: [] for rule in LAWS}


def test_labels_against_the_objective_of_a_recipe_break_a_law(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Oracle.encode
    # a trainer that ignores the objective of its rows
    monkeypatch.setattr(Oracle, "encode", lambda oracle, row: encode(oracle, replace(row, objective=ANSWERS)))
    [found] = laws_of(recipe_file(tmp_path, base, objective="last-answer"), "ML103")["ML103"]
    assert "(objective: last-answer)" in found


@pytest.mark.usefixtures("data_alone")
def test_check_judges_the_rows_of_a_recipe_by_their_objective(base: Path, tmp_path: Path, capsys: Any) -> None:
    path = recipe_file(tmp_path, base, objective="last-answer")
    assert main(["check", str(path), "--examples", "1", "-v", "--no-cache"]) == 0
    out = capsys.readouterr().out
    assert "objective of recipe.yaml: answers, last-answer (data.train.1.objective)" in out
    assert re.search(r"objective +answers \(chat\.jsonl\); last-answer \(tools\.jsonl\)", out)
    # nothing is left in a row whose last answer is a call
    write(tmp_path / "tools.jsonl", [{"messages": called("What?", "x")[:4], "tools": TOOLS}])
    recipe_file_of = recipe_file(tmp_path, base, objective="last-answer,no-calls")
    write(tmp_path / "tools.jsonl", [{"messages": called("What?", "x")[:4], "tools": TOOLS}])
    assert main(["check", str(recipe_file_of), "--examples", "1", "--no-cache"]) == 1
    out = capsys.readouterr().out
    assert "ML605" in out
    assert f"{tmp_path / 'tools.jsonl'}:1" in out


def test_the_tokens_of_a_finding_have_the_labels_of_its_file(base: Path, tmp_path: Path) -> None:
    target = RecipeTarget("recipe", recipe_file(tmp_path, base, objective="last-answer"))
    found = {}
    for name in ("chat", "tools"):
        causes, row = FindingGroups(), json.dumps(CHAT[0])
        causes.add(
            Finding("ML601", "a fault", Place.of(tmp_path / f"{name}.jsonl", 1), row=row), "recipe::dataset::x", ""
        )
        [shown] = failed_rows(causes, [target])
        [(_, _, found[name])] = shown.counts()
    assert found == {"chat": 4, "tools": 2}


def test_render_and_stats_show_the_objective_that_is_declared(base: Path, tmp_path: Path, capsys: Any) -> None:
    path = recipe_file(tmp_path, base, objective="last-answer")
    rows, page = tmp_path / "chat.jsonl", tmp_path / "page.html"

    def run(*words: str) -> tuple[int, str, str]:
        code = main([*words])
        out = capsys.readouterr()
        return code, out.out, out.err

    chosen = ("--tokenizer", "spm-v3", "--objective", "last-answer")
    code, out, _ = run("render", str(rows), *chosen, "--json")
    assert code == 0
    labels = [json.loads(line)["labels"] for line in out.splitlines()]
    assert [sum(label != IGNORE_INDEX for label in one) for one in labels] == [2, 2]
    assert "objective last-answer: 11 tokens, 2 trained on" in run("render", str(rows), *chosen)[1]
    assert "objective" not in run("render", str(rows), "--tokenizer", "spm-v3")[1]
    out = run("render", str(path))[1]
    assert [line.count("objective last-answer") for line in out.splitlines() if " tokens, " in line] == [0, 0, 1, 1]
    assert run("render", str(path), "--html", str(page))[0] == 0
    assert "Objective last-answer: the last answer alone." in page.read_text()
    assert run("render", str(rows), "--tokenizer", "spm-v3", "--html", str(page))[0] == 0
    assert "Objective" not in page.read_text()
    assert json.loads(run("stats", str(rows), *chosen, "--json")[1])["supervised_tokens"]["total"] == 4
    assert re.search(r"^ objective +last-answer$", run("stats", str(rows), *chosen)[1], re.MULTILINE)
    assert "objective" not in run("stats", str(rows), "--tokenizer", "spm-v3")[1]
    figures = json.loads(run("stats", str(path), "--json")[1])
    assert [file.get("objective") for file in figures["files"]] == [None, "last-answer"]


@pytest.mark.parametrize("verb", ["render", "stats"])
def test_an_objective_that_cannot_be_is_a_usage_error(verb: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    path, rows = recipe_file(tmp_path, base), tmp_path / "chat.jsonl"
    write(tmp_path / "fim.jsonl", [{"prompt": "a", "suffix": "b", "completion": "c"}])
    for words, found in (
        ([str(rows), "--tokenizer", "spm-v3", "--objective", "no-thinking"], "no-thinking is about [THINK]"),
        ([str(tmp_path / "fim.jsonl"), "--tokenizer", "spm-v3", "--objective", "last-answer"], "takes no objective"),
        ([str(path), "--objective", "last-answer"], "training.objective"),
    ):
        assert main([verb, *words]) == 2
        assert found in capsys.readouterr().err
    encoded = write(tmp_path / "encoded.jsonl", [{"messages": CHAT[0]["messages"], "input_ids": [1], "labels": [1]}])
    assert main(["render", str(encoded), "--tokenizer", "spm-v3", "--objective", "last-answer"]) == 2
    assert "--objective last-answer" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([verb, str(rows), "--tokenizer", "spm-v3", "--objective", "last-anwser"])
    assert ended.value.code == 2
    assert "did you mean 'last-answer'" in capsys.readouterr().err


@pytest.mark.parametrize("to", [trainer.name for trainer in TRAINERS.of_this_package() if trainer.exporter])
@pytest.mark.parametrize(
    "words", sampled(["answers", "last-answer", "everything", "last-answer,no-calls"], ["last-answer"])
)
def test_an_exported_run_has_the_labels_and_declares_the_objective_if_a_setting_does(
    to: str, words: str, make_full: MakeRecipe, tmp_path: Path
) -> None:
    write(tmp_path / "rows.jsonl", CHAT)
    recipe, bridge = make_full(training={"objective": words}), TRAINERS[to].load_exporter()
    done = export(recipe, bridge, tmp_path / "to", form="tokens")
    keys = bridge.objectives.get(words, {})
    written = yaml.safe_load(done.config.read_text())
    assert {key: written[key] for key in keys} == keys
    assert not {key for named in bridge.objectives.values() for key in named} & {*written} - {*keys}
    readme = (done.folder / "README.md").read_text()
    assert (f" --objective {words} " in readme) == (words != "answers")
    remarks = [remark for remark in done.remarks if "objective" in remark]
    assert len(remarks) == (words != "answers")
    assert all(("has no setting for it" in remark) != bool(keys) and words in remark for remark in remarks)
    wanted = [list(row.labels or ()) for row in plan_export(recipe).data.train.encoded]
    assert exported_labels(done.folder) == wanted
    if words != "answers" and bridge.takes_messages:
        with pytest.raises(InputError, match=f"the objective is {words}"):
            export(recipe, bridge, tmp_path / "messages", form="messages")


def exported_labels(folder: Path) -> list[list[int]]:
    rows = folder / "rows"
    if (rows / "train.jsonl").is_file():
        return [json.loads(line)["labels"] for line in (rows / "train.jsonl").read_text().splitlines()]
    return [*load_from_disk(rows)["train"]["labels"]]


@pytest.mark.of_field
def test_an_exported_mixture_says_what_no_setting_expresses(full_base: Path, tmp_path: Path) -> None:
    done = export(mixed(full_base, tmp_path), TRAINERS["axolotl"].load_exporter(), tmp_path / "to")
    [remark] = [remark for remark in done.remarks if "objective" in remark]
    assert "answers (chat.jsonl), last-answer (tools.jsonl)" in remark
