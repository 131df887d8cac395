"""`train` judges the rows that it encodes as `check` does, before a weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import recipe_data

from pytest_mistral_lora import judge
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.rows import RowJudge
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import FindingsError, RecipeError, RowsError
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training import run
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_folder import work_folder

Rows = list[Any]

CALL = "a1B2c3D4e"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def said(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def with_call() -> dict[str, Any]:
    function = {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}
    call = {"id": CALL, "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "How is the weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": CALL, "content": "mild and dry"},
        {"role": "assistant", "content": "It is mild and dry in Rome."},
    ]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


SOUND = [
    said("What is the capital of France?", "Paris is the capital of France."),
    said("Name a prime number.", "Seven is prime."),
    said("Which colour is the sky?", "The sky is blue on a clear day."),
    with_call(),
]
HELD_OUT = [said("How many legs does an ant have?", "An ant has six.")]
MANY = [said(f"What is thing {number}?", f"It is thing {number}.") for number in range(30)]


class Job:
    """A recipe on disk."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.data = recipe_data(base, data={"eval": ["held_out.jsonl"]}, training={"steps": 1, "dry_run": False})
        self.write(SOUND, HELD_OUT)

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def write(self, rows: Iterable[Any], held_out: Iterable[Any] = HELD_OUT, **keys: Any) -> Job:
        for name, lines in (("rows", rows), ("held_out", held_out)):
            text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
            (self.folder / f"{name}.jsonl").write_text(text)
        self.recipe.write_text(yaml.safe_dump({**self.data, **keys}))
        return self

    def xfails(self, text: str) -> Path:
        (self.folder / "known.txt").write_text(text)
        return self.folder / "known.txt"


@pytest.fixture
def job(tmp_path: Path, base: Path) -> Job:
    return Job(tmp_path, base)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(run, "load_base", refuse)


def errors_of(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return sorted((finding.rule, str(finding.place)) for finding in findings if finding.severity == "error")


def stopped(job: Job, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(FindingsError) as caught:
        train(job.recipe, **options)
    assert caught.value.exit_code == 1
    return errors_of(caught.value.verdict.findings)


def changed(change: Callable[[dict[str, Any]], object]) -> Rows:
    row = deepcopy(with_call())
    change(row)
    return [*SOUND[:3], row]


def arguments_of(row: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    return arguments


def answers(change: Callable[[str], str]) -> Rows:
    return [said(row["messages"][0]["content"], change(row["messages"][1]["content"])) for row in MANY]


FAULTS: dict[str, tuple[str, Rows, Rows]] = {
    "no JSON": ("ML601", [*SOUND, "{"], HELD_OUT),
    "an unknown role": ("ML601", [*SOUND, {"messages": [{"role": "bot", "content": "Hi"}]}], HELD_OUT),
    "a schema that is none": (
        "ML601",
        changed(lambda row: row["tools"][0]["function"].update(parameters={"type": "nonsense"})),
        HELD_OUT,
    ),
    "an empty file": ("ML602", SOUND, []),
    "no token is trained on": (
        "ML605",
        [*SOUND, {"messages": [SOUND[0]["messages"][0], {**SOUND[1]["messages"][1], "weight": 0}]}],
        HELD_OUT,
    ),
    "a row that is too long": ("ML607", [*SOUND, said("Count.", "one two three " * 2000)], HELD_OUT),
    "a held-out row is trained on": ("ML610", [*SOUND, *HELD_OUT], HELD_OUT),
    "a held-out row in another form": (
        "ML632",
        [*SOUND, said("how many legs does an ant have", "an ant has six")],
        HELD_OUT,
    ),
    "a result of no call": (
        "ML621",
        changed(lambda row: row["messages"][2].update(tool_call_id="zzzzzzzzz")),
        HELD_OUT,
    ),
    "an argument is missing": ("ML622", changed(lambda row: arguments_of(row).clear()), HELD_OUT),
    "an argument is null": ("ML623", changed(lambda row: arguments_of(row).update(days=None)), HELD_OUT),
    "letters as escapes": ("ML624", answers(lambda text: f"{text} Caf\\u00e9."), HELD_OUT),
    "a preference pair": ("ML601", [*SOUND, {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."}], HELD_OUT),
    "a kind without an answer": ("ML601", [*SOUND, {"prompt": "def f():", "suffix": "return 1"}], HELD_OUT),
    "rendered texts": ("ML639", [said(f"[INST] Thing {n}? [/INST]", f"Thing {n}.</s>") for n in range(30)], HELD_OUT),
}


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_check_finds_stops_the_run_before_a_weight_is_loaded(fault: str, job: Job) -> None:
    rule, rows, held_out = FAULTS[fault]
    job.write(rows, held_out)
    found = stopped(job)
    assert rule in {name for name, _ in found}
    assert found == errors_of(judge(job.recipe).findings)
    failure = json.loads((work_folder(load_recipe(job.recipe)) / "failure.json").read_text())
    assert sorted(failure["rows"]) == sorted(place for _, place in found)
    assert failure["exit_code"] == 1
    assert not job.output.exists()


def test_sound_rows_are_trained_on_and_the_manifest_says_that_they_were_judged(job: Job) -> None:
    assert train(job.recipe).manifest["dataset"]["judgement"] == {"judged": True, "accepted": []}


LEAK = [*SOUND, *HELD_OUT]


@pytest.mark.parametrize("by_recipe", [False, True])
def test_a_known_deviation_is_accepted_and_recorded_as_check_accepts_it(by_recipe: bool, job: Job) -> None:
    known = job.xfails("ML610  # the same ant on purpose\n")
    job.write(LEAK, **({"xfails": "known.txt"} if by_recipe else {}))
    assert ("ML610" in {rule for rule, _ in errors_of(judge(job.recipe).findings)}) == (not by_recipe)
    option = None if by_recipe else known
    accepted = train(job.recipe, xfails=option).manifest["dataset"]["judgement"]["accepted"]
    assert accepted == [{"id": "ML610", "reason": "the same ant on purpose"}]
    assert "| Accepted: `ML610` | the same ant on purpose |" in (job.output / "DECISION.md").read_text()
    assert all(field.state != "mismatch" for field in verify(job.output, dataset=job.folder))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_known_deviation_that_is_out_of_date_stops_the_run_as_it_fails_check(job: Job) -> None:
    known = job.xfails("ML623  # nulls of Arrow\n")
    with pytest.raises(FindingsError, match=r"known\.txt:1: ML623 matches no finding"):
        train(job.recipe, xfails=known)
    assert not judge(job.recipe, xfails=known).ok


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_list_that_cannot_be_read_is_named_by_check_and_by_the_run(job: Job) -> None:
    job.write(SOUND, xfails="missing.txt")
    with pytest.raises(RecipeError) as caught:
        train(job.recipe)
    assert caught.value.place.field == "xfails"
    assert ("ML641", str(caught.value.place)) in errors_of(judge(job.recipe).findings)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_row_that_cannot_be_encoded_is_refused_though_its_finding_is_accepted(job: Job) -> None:
    job.write([*SOUND, "{"])
    with pytest.raises(RowsError):
        train(job.recipe, xfails=job.xfails("ML601  # a broken line\n"))


def test_an_unjudged_run_says_so_in_manifest_note_and_verify(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = count_records(monkeypatch)
    assert main(["train", str(job.write(LEAK).recipe), "--unjudged"]) == 0
    assert judged == []
    manifest = json.loads((job.output / MANIFEST).read_text())
    assert manifest["dataset"]["judgement"] == {"judged": False, "accepted": []}
    assert "| Rows were judged | no: trained with `--unjudged` |" in (job.output / "DECISION.md").read_text()
    capsys.readouterr()
    assert main(["verify", str(job.output), "--dataset", str(job.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("not available") and "dataset.judgement" in line for line in lines)


def count_records(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets the file of each chunk that is judged."""
    judged: list[Path] = []
    own = RowJudge.judge_chunk

    def judge_chunk(self: RowJudge, chunk: Any, *given: Any) -> Any:
        judged.append(chunk.path)
        return own(self, chunk, *given)

    monkeypatch.setattr(RowJudge, "judge_chunk", judge_chunk)
    return judged


@pytest.mark.parametrize("many", [False, True])
def test_rows_are_read_once_and_a_later_run_takes_the_verdict(
    many: bool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(job.folder / "cache"))
    monkeypatch.setenv("MISTRAL_LORA_PROCESSES", "1")
    if many:
        monkeypatch.setattr(chunks, "MANY_BYTES", 1)
        train(job.recipe, unjudged=True)  # leaves encoded rows without a verdict
        job.output.rename(job.folder / "unjudged")
    read: list[Path] = []
    own = chunks.DataFile.lines
    monkeypatch.setattr(chunks.DataFile, "lines", lambda file: (read.append(file.path), own(file))[1])
    judged = count_records(monkeypatch)
    first = train(job.recipe)
    assert [path.name for path in judged] == [path.name for path in read] == ["rows.jsonl", "held_out.jsonl"]
    assert first.manifest["dataset"]["judgement"]["judged"]
    job.output.rename(job.folder / "first")
    second = train(job.recipe)
    assert len(judged) == 2
    assert len(read) == (2 if many else 4)
    assert second.manifest["dataset"] == first.manifest["dataset"]
    # a damaged verdict is made again
    [verdict] = (job.folder / "cache").glob("*.verdict")
    verdict.write_bytes(verdict.read_bytes()[:-1])
    job.output.rename(job.folder / "second")
    train(job.recipe)
    assert len(judged) == 4


@pytest.mark.usefixtures("nothing_is_loaded")
def test_findings_are_kept_as_well_and_may_be_accepted_without_judging_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = count_records(monkeypatch)
    job.write(LEAK)
    found = stopped(job)
    count = len(judged)
    assert stopped(job) == found
    with pytest.raises(AssertionError, match="weights are loaded"):
        train(job.recipe, xfails=job.xfails("ML610  # the same ant\n"))
    assert len(judged) == count


def test_the_judge_and_the_encoder_give_the_same_rows(job: Job) -> None:
    ids = [train(job.write(SOUND, output=name).recipe, unjudged=unjudged).manifest for name, unjudged in RUNS]
    assert ids[0]["masking"] == ids[1]["masking"]
    assert ids[0]["dataset"]["rows_sha256"] == ids[1]["dataset"]["rows_sha256"]
    assert ids[0]["lora"]["tensors_sha256"] == ids[1]["lora"]["tensors_sha256"]


RUNS = (("judged", False), ("unjudged", True))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_rows_of_other_subjects_are_judged_with_the_others(job: Job) -> None:
    (job.folder / "others.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (*HELD_OUT, SOUND[0], {})))
    job.write(SOUND, evaluation={"gate": True, "retention": {"rows": ["others.jsonl"]}})
    found = stopped(job)
    assert ("ML601", f"{job.folder / 'others.jsonl'}:3") in found
    assert found == errors_of(judge(job.recipe).findings)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_the_command_prints_the_findings_of_check_and_what_to_do(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(LEAK)
    assert main(["train", str(job.recipe)]) == 1
    errors = capsys.readouterr().err
    assert "ML610" in errors
    for words in (f"mistral-lora check {job.recipe}", "--xfails", "--unjudged"):
        assert words in errors
