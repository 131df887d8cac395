"""One file of rows goes through every road to a verdict: what is converted, compared or refused is the same on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import derived_tokenizer
from guarded_runs import begin, make_trainer
from sampling import sampled
from sound_rows import SOUND_ROWS
from toys import Data, ids_alone, with_ids, write_lines

from pytest_mistral_lora import audit, judge
from pytest_mistral_lora.chat.kinds.records import parse_trained
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.checks import check_dataset
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import FindingsError, RowError, RowsError
from pytest_mistral_lora.judging import Verdict
from pytest_mistral_lora.training.recipe import load_recipe
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.run import train

# PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

TOWNS = ("Rome", "Oslo", "Lima", "Cairo")
DUMPED: Data = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
"""The keys that `message.model_dump()` of OpenAI's client adds to an answer."""


def talks(*before: Data, **answer: Any) -> list[Data]:
    """Return rows with the messages before each question, and the keys of each answer."""
    return [
        {
            "messages": [
                *before,
                {"role": "user", "content": f"Where is {town}?"},
                {"role": "assistant", "content": f"{town} is on page {number} of the map.", **answer},
            ]
        }
        for number, town in enumerate(TOWNS)
    ]


Findings = Mapping[str, str]
"""The rule of each finding, with `note` if it is one, and the record and the field that it names first."""


@dataclass(frozen=True)
class Case:
    """A file of rows.

    Attributes:
        rows: Its rows.
        readable: Rows with the same ids, if a row of the file cannot be read.
        rule: The rule that the file breaks; empty if it is sound.
        at: The record and the field that a finding names.
        unseen: The roads that do not name the rule, although they read the file, each with the reason.
        converted: What the line of a verdict says about its conversion.
        version: The tokenizer, if it is not `spm-v3`.
        is_unchecked: Whether its rows are not judged, and `train` alone refuses them.
    """

    rows: list[Data]
    readable: list[Data] | None = None
    rule: str = ""
    at: str = ""
    unseen: Mapping[str, str] = field(default_factory=dict)
    converted: str = ""
    version: str = ""
    is_unchecked: bool = False

    def expected(self, road: str) -> Findings:
        """Return the findings of a road."""
        if not self.rule or road in self.unseen or (self.is_unchecked and road != "train"):
            return {}
        if self.readable is None or road in ROWS:
            return {self.rule: self.at}
        return {"ML501": self.at} if road in WITH_MESSAGES else {}


def sound(title: str) -> list[Data]:
    """Return the first file of a class of sound rows."""
    return next(rows for rows in SOUND_ROWS if rows.title == title).files[0]


FIND = {
    "name": "find",
    "description": "Find a town on the map.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


def calls(cut: int | None) -> list[Data]:
    """Return rows that call a tool, the second with arguments without their last letters."""
    rows = []
    for number, (row, town) in enumerate(zip(talks(), TOWNS, strict=True)):
        question, answer = row["messages"]
        text = json.dumps({"town": town})[: cut if number == 1 else None]
        call = {"id": f"a1B2c3D4{number}", "type": "function", "function": {"name": "find", "arguments": text}}
        asks = {"role": "assistant", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": call["id"], "content": f"page {number}"}
        rows.append({"messages": [question, asks, result, answer], "tools": [{"type": "function", "function": FIND}]})
    return rows


def rendered() -> list[Data]:
    """Return rows whose texts are rendered as ChatML."""
    turn = "<|im_start|>user\n{}<|im_end|>"
    messages = ([{**said, "content": turn.format(said["content"])} for said in row["messages"]] for row in talks())
    return [{"messages": said} for said in messages]


def beside(key: str, *values: object) -> list[Data]:
    """Return rows with a key beside the messages, with the values in turn."""
    return [{**row, key: values[number % len(values)]} for number, row in enumerate(talks())]


NO_KEYS = dict.fromkeys(
    ("audit of a file of ids", "audit of ids in memory", "a guard's batch of ids"), "has no key beside the ids"
)
SAMPLE = {"a guard's batch": "does not show a whole column"}
BRIEF = {"role": "system", "content": "Be brief."}
DEVELOPER = {**BRIEF, "role": "developer"}
CASES = {
    "our form": Case(talks(BRIEF)),
    "developer": Case(talks(DEVELOPER), converted="developer is system (4 rows)"),
    "model_dump": Case(talks(**DUMPED), converted="keys that are null or empty are left out (4 rows)"),
    "reasoning_content": Case(
        talks(reasoning_content="It is on the map."),
        converted="reasoning is a thinking chunk (4 rows)",
        version="derived-v13-thinking",
    ),
    "flags": Case(talks(train=True), converted="flags of training are `weight`: train (4 rows)"),
    "audio that is lost": Case(
        talks(DEVELOPER, **{**DUMPED, "audio": {"id": "a"}}),
        talks(BRIEF),
        "ML601",
        "1, messages[2].audio",
        is_unchecked=True,
    ),
    "a misspelt key": Case(talks(wieght=0), talks(), "ML601", "1, messages[1].wieght"),
    "a shell": Case(sound("Shell and code with a line break at their end")),
    "texts of one form": Case(sound("Texts of one form that end with a value")),
    "a tag in a sentence": Case(sound("Lessons about reasoning models"), version="derived-v13-thinking"),
    "arguments": Case(calls(None)),
    "arguments that were cut": Case(calls(-3), rule="ML619", at="2, messages[1].tool_calls[0].function.arguments"),
    "rewards": Case(beside("reward", 1)),
    # not `label`, which the collator of transformers takes for labels
    "rewards of 1 and -1": Case(beside("reward", 1, -1), rule="ML668", unseen={**NO_KEYS, **SAMPLE}),
    "whole answers": Case(beside("finish_reason", "stop")),
    "no loss": Case(talks(weight=0), rule="ML605", at="1"),
    "another family's turns": Case(rendered(), rule="ML628", at="1, messages[0].content"),
    "answers that were cut": Case(beside("finish_reason", "stop", "length"), rule="ML669", at="2", unseen=NO_KEYS),
}


KEPT = (
    "no loss",
    "another family's turns",
    "reasoning_content",
    "audio that is lost",
    "a shell",
    "arguments that were cut",
    "rewards of 1 and -1",
    "answers that were cut",
)


@dataclass
class Walk:
    """What the roads share: the file, its rows with their ids, and a base."""

    case: Case
    folder: Path
    base: Path
    run_pytest: Callable[..., pytest.RunResult]

    @cached_property
    def rows(self) -> Path:
        return write_lines(self.folder / "rows.jsonl", self.case.rows)

    @cached_property
    def lines(self) -> list[Data]:
        oracle = CheckpointTokenizer(self.base).oracle
        with_row = zip(self.case.rows, self.case.readable or self.case.rows, strict=True)
        return [{**with_ids(oracle, [readable])[0], **row} for row, readable in with_row]

    @cached_property
    def recipe(self) -> Path:
        path = self.folder / "recipe.yaml"
        weights = BaseFolder(self.base).weights_sha256
        path.write_text(
            f"base: {{path: {self.base}, weights_sha256: {weights}}}\ndata: {{train: [{self.rows.name}]}}\n"
            "training: {steps: 1, dry_run: false, device: cpu}\noutput: out\n"
        )
        return path

    def by_pytest(self, option: str, path: Path) -> Findings:
        report = self.folder / f"{option}.json"
        words = (f"--mistral-{option}={path}", f"--mistral-tokenizer={self.base}", f"--mistral-report={report}")
        self.run_pytest("--mistral-golden", *words, "-k", option)
        return in_report(report)

    def by_guard(self, lines: list[Data]) -> Verdict:
        verdict = begin(
            make_trainer(self.base, lines, self.folder / "run"), on_finding="warn", tokenizer=self.base
        ).verdict
        assert verdict is not None
        return verdict


def named(findings: Iterable[Finding | RowError], rule: str = "") -> Findings:
    """Return what findings name, or refused rows by the rule on them."""
    names: dict[str, str] = {}
    for finding in findings:
        place = finding.place
        name = rule or f"{finding.rule}{' note' * (finding.severity == 'note')}"
        names.setdefault(name, ", ".join(filter(None, (str(place.record or ""), place.field))))
    return names


def in_report(path: Path) -> Findings:
    causes = json.loads(path.read_text())["causes"]
    return {
        f"{cause['rule']}{' note' * (cause['severity'] == 'note')}": cause["place"].partition(".jsonl")[2].strip(":")
        for cause in causes
    }


def of_recipe(walk: Walk) -> Findings:
    return named(finding for result in check_dataset(walk.recipe).values() for finding in result.findings)


def of_train(walk: Walk) -> Findings:
    try:
        train(load_recipe(walk.recipe))
    except FindingsError as error:
        return named(error.verdict.findings)
    except RowsError as error:
        return named(error.errors, "ML601")
    return {}


def of_check(walk: Walk) -> Findings:
    report = walk.folder / "check.json"
    main(["check", str(walk.rows), "--tokenizer", str(walk.base), "--no-cache", "--report", str(report)])
    return in_report(report)


def encoded_file(walk: Walk, *, alone: bool = False) -> Path:
    lines = ids_alone(walk.lines) if alone else walk.lines
    return write_lines(walk.folder / f"encoded-{alone}.jsonl", lines)


ROWS: Mapping[str, Callable[[Walk], Findings]] = {
    "check": of_check,
    "judge": lambda walk: named(judge(walk.rows, tokenizer=walk.base).findings),
    "judge in memory": lambda walk: named(judge(rows=walk.case.rows, tokenizer=walk.base).findings),
    "pytest --mistral-dataset": lambda walk: walk.by_pytest("dataset", walk.rows),
    "a recipe": of_recipe,
    "train": of_train,
}
WITH_MESSAGES: Mapping[str, Callable[[Walk], Findings]] = {
    "pytest --mistral-encoded": lambda walk: walk.by_pytest("encoded", encoded_file(walk)),
    "audit of a file": lambda walk: named(audit(encoded_file(walk), tokenizer=walk.base).findings),
    "judge of ids in memory": lambda walk: named(judge(rows=walk.lines, tokenizer=walk.base).findings),
    "audit in memory": lambda walk: named(audit(walk.lines, tokenizer=walk.base).findings),
}
BY_IDS: Mapping[str, Callable[[Walk], Findings]] = {
    "audit of a file of ids": lambda walk: named(audit(encoded_file(walk, alone=True), tokenizer=walk.base).findings),
    "audit of ids in memory": lambda walk: named(audit(ids_alone(walk.lines), tokenizer=walk.base).findings),
    # messages that cannot be read are those of another program, and the ids are read back
    "a guard's batch": lambda walk: named(walk.by_guard(walk.lines).findings),
    "a guard's batch of ids": lambda walk: named(walk.by_guard(ids_alone(walk.lines)).findings),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(version: str) -> Path:
        if version not in made:
            file = derived_tokenizer(version) if version else shipped_tokenizer("spm-v3")
            made[version] = write_tiny_base(tmp_path_factory.mktemp("roads") / "base", file)
        return made[version]

    return base


@pytest.mark.parametrize("name", sampled(CASES, KEPT))
def test_a_file_has_one_verdict_on_every_road(
    name: str, bases: Callable[[str], Path], tmp_path: Path, run_pytest: Callable[..., pytest.RunResult]
) -> None:
    case = CASES[name]
    walk = Walk(case, tmp_path, bases(case.version), run_pytest)
    roads = {**ROWS, **WITH_MESSAGES, **BY_IDS}
    assert len(roads) == 14
    assert case.unseen.keys() <= roads.keys()
    assert {road: take(walk) for road, take in roads.items()} == {road: case.expected(road) for road in roads}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.converted])
def test_a_conversion_is_said_in_one_line(
    name: str, bases: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    walk = Walk(case, tmp_path, bases(case.version), lambda *words: pytest.fail("not run"))
    facts = judge(walk.rows, tokenizer=walk.base).facts["rows.jsonl::dataset::statistics"]
    assert case.converted in facts["rows of"]
    for verdict in (audit(walk.lines, tokenizer=walk.base), walk.by_guard(walk.lines)):
        [words] = {facts["encoded rows of"] for facts in verdict.facts.values() if "encoded rows of" in facts}
        assert case.converted in words
    load_data(load_recipe(walk.recipe), make_encoder("mistral-common", CheckpointTokenizer(walk.base)))
    words = facts["rows of"].partition("; first ")[0]
    assert [message for message in caplog.messages if case.converted in message] == [f"rows to train on: {words}"]


def test_a_pair_is_converted_on_both_sides(tmp_path: Path) -> None:
    [row] = talks(DEVELOPER)[:1]
    prompt = row["messages"][:-1]
    sides = {side: [{"role": "assistant", "content": side, **DUMPED}] for side in ("chosen", "rejected")}
    path = write_lines(tmp_path / "pairs.jsonl", [{"prompt": prompt, **sides}])
    verdict = judge(path, tokenizer="spm-v3")
    assert verdict.ok
    assert "developer is system (1 row)" in verdict.facts["pairs.jsonl::dataset::statistics"]["rows of"]
    path = write_lines(path, [{"prompt": prompt, **sides, "images": ["a.png"]}])
    [reason] = [why for why in judge(path, tokenizer="spm-v3").not_checked.values() if "image" in why]
    assert reason.endswith("pairs.jsonl:1, prompt[1].content[0]")


def test_what_is_in_the_tokens_is_not_converted() -> None:
    """Ids of calls, letters of calls in a text, and nulls in arguments are the row's own."""
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"city": None}}}
    answer = {"role": "assistant", "content": text, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "<tool_response>1</tool_response>"}
    asked = {"role": "user", "content": "Go."}
    row = parse_trained({"messages": [DEVELOPER, asked, {**answer, "annotations": []}, result, {**answer, **DUMPED}]})
    assert row.messages == (BRIEF, asked, answer, result, {key: answer[key] for key in ("role", "content")})
