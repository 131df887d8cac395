"""Encoded rows are judged by the objective that is declared; without one, one finding names what all rows follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from each_oracle import oracle_named
from encoded_files import write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preference_records import texts_pair, with_ids
from sampling import sampled

from pytest_mistral_lora import Verdict, audit, judge
from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import Declaration, Objective
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.encoded import agreement
from pytest_mistral_lora.conformance.encoded import audit as audits
from pytest_mistral_lora.conformance.encoded.agreement import FEWEST_AGREEING
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.session import opened_session
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.judging import verdict_of

Data = dict[str, Any]
SPM = "spm-v7"
CALL = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
WORDS = ("answers", "last-answer", "last-round", "everything", "answers,no-calls")
"""Objectives whose labels of `rounds` all differ."""


@cache
def target() -> Target:
    return Target(SPM)


def rounds(number: int) -> Data:
    """Return a row with a first answer, a call, and a last answer."""
    return {
        "messages": [
            {"role": "user", "content": f"one {number}"},
            {"role": "assistant", "content": f"two {number}"},
            {"role": "user", "content": f"three {number}"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": f"{number}", "tool_call_id": "123456789", "name": "f"},
            {"role": "assistant", "content": f"four {number}"},
        ],
        "tools": TOOLS,
    }


def plain(number: int) -> Data:
    """Return a row with one answer, by which no objective of turns is told from `answers`."""
    return {"messages": [{"role": "user", "content": f"hi {number}"}, {"role": "assistant", "content": f"ho {number}"}]}


def encoded(row: Data, words: str, *, messages: bool = True) -> Data:
    parsed = replace(parse_row(row), objective=Objective.of(words, "test"))
    made = target().oracle.encode(parsed)
    ids = {"input_ids": list(made.input_ids), "labels": list(made.labels or ())}
    return {**row, **ids} if messages else ids


def lines(words: str, count: int = 6, *, messages: bool = True) -> list[Data]:
    return [encoded(rounds(number), words, messages=messages) for number in range(count)]


def judged(rows: list[Data], objective: str | None = None) -> Verdict:
    return audit(rows, tokenizer=SPM, objective=objective)


def errors(verdict: Verdict) -> set[str]:
    return {finding.rule for finding in verdict.findings if finding.severity == "error"}


@pytest.mark.parametrize(
    ("declared", "messages"), [*((words, True) for words in WORDS), ("last-answer", False), ("everything", False)]
)
def test_labels_of_each_other_objective_are_faults(declared: str, messages: bool) -> None:
    for words in WORDS:
        verdict = judged(lines(words, 1, messages=messages), declared)
        assert verdict.ok == (words == declared), words
        assert {str(finding.place) for finding in verdict.findings if finding.rule != "ML506"} <= {"rows[0]"}
        assert verdict.facts["rows::encoded::labels"]["objective"] == f"{declared} (objective=)"
        # no fix asks for the labels of another objective, or names a setting that makes these
        fixes = [finding for finding in verdict.findings if "labels" in RULES[finding.rule].cases]
        assert declared == "answers" or all(f"`{declared}`" in one.next_step and not one.fixes for one in fixes)
        assert str(verdict).startswith(f"objective: {declared} (objective=)\n")


def test_packed_rows_are_judged_by_a_declared_objective() -> None:
    parts = lines("everything", 2)
    packed = {
        "conversations": [{key: part[key] for key in ("messages", "tools")} for part in parts],
        "position_ids": [n for part in parts for n in range(len(part["input_ids"]))],
        "input_ids": [token for part in parts for token in part["input_ids"]],
    }
    # the first token of each conversation may have a loss
    for labels in (packed["input_ids"], [label for part in parts for label in part["labels"]]):
        assert judged([{**packed, "labels": labels}], "everything").findings == ()
    last = [label for part in lines("last-answer", 2) for label in part["labels"]]
    assert judged([{**packed, "labels": last}], "last-answer").findings == ()
    found = judged([{**packed, "labels": last}], "everything").findings
    assert [str(finding.place) for finding in found if finding.rule == "ML551"] == [
        "rows[0], conversations[0]",
        "rows[0], conversations[1]",
    ]


def test_a_weight_takes_the_loss_away_under_any_objective() -> None:
    row = rounds(1)
    row["messages"][-1]["weight"] = 0
    for words in ("last-answer", "everything"):
        line = encoded(row, words)
        trained = encoded(rounds(1), words)
        if words == "last-answer":
            assert set(line["labels"]) == {-100}
            continue
        assert judged([line], words).ok
        assert errors(judged([{**line, "labels": trained["labels"]}], words)) == {"ML549"}
        assert errors(judged([{**line, "labels": [-100] * 4 + trained["labels"][4:]}], words)) == {"ML549", "ML550"}


@pytest.mark.parametrize("tokenizer", ["spm-v1", "spm-v3", "tekken-240911"])
def test_neighbouring_answers_of_ids_have_the_weights_that_their_labels_fit(tokenizer: str) -> None:
    """Two turns of the model stand beside each other only if their weights differ."""
    said = plain(1)["messages"]
    for weights in ((0, 1), (1, 0)):
        answers = [{**said[1], "content": f"{said[1]['content']} {n}", "weight": one} for n, one in enumerate(weights)]
        row = parse_row({"messages": [*said, *plain(2)["messages"][:1], *answers]})
        for words in ("answers", "last-answer"):
            made = Target(tokenizer).oracle.encode(row.with_objective(Objective.of(words, "test")))
            line = {"input_ids": list(made.input_ids), "labels": list(made.labels or ())}
            found = audit([line], tokenizer=tokenizer, objective=words).findings
            # the last answer of weight 0 leaves nothing to train on
            assert {finding.rule for finding in found} <= ({"ML605", "ML551"} if not made.supervised_tokens else set())


def test_an_answer_whose_thought_has_no_loss_is_not_empty() -> None:
    oracle = oracle_named("derived-v13-thinking")
    thought = [{"type": "thinking", "thinking": "hm", "closed": False}]
    row: Data = {"messages": [plain(1)["messages"][0], {"role": "assistant", "content": thought}]}
    made = oracle.encode(parse_row(row).with_objective(Objective.of("no-thinking", "test")))
    line = {**row, "input_ids": list(made.input_ids), "labels": list(made.labels or ())}
    assert set(made.labels or ()) == {-100, oracle.eos_id}
    assert_encoded_rows_sound([line], oracle.path, objective="no-thinking")


@pytest.mark.parametrize(
    ("words", "messages"),
    [("last-answer", True), ("last-round", True), ("no-calls", True), ("last-answer", False), ("everything", False)],
)
def test_what_all_rows_follow_is_one_finding(words: str, messages: bool) -> None:
    rows = [*lines(words, messages=messages), *(encoded(plain(n), words, messages=messages) for n in range(3))]
    verdict = judged(rows)
    if words == "everything":
        assert errors(verdict) == {"ML543"}
        assert {finding.expected.endswith("(--objective everything)") for finding in verdict.findings} == {True}
        return
    [finding] = verdict.findings
    severity = "error" if messages else "note"
    assert (finding.rule, finding.severity, str(finding.place)) == ("ML508", severity, "rows")
    found = str(Objective.of(words, "test"))
    assert finding.name == f"objective-{found.replace(',', '-')}"
    assert f"--objective {found} " in finding.expected
    assert dict(finding.fixes)["LLaMA-Factory"] == "Set `mask_history: false`."
    assert verdict.ok != messages
    assert judged(rows, words).findings == ()


@pytest.mark.parametrize("messages", [True, False], ids=["with messages", "ids alone"])
def test_labels_that_leave_out_parts_of_answers_are_an_error(messages: bool) -> None:
    oracle, rows = oracle_named("derived-v13-thinking"), []
    for number in range(6):
        asked, said = plain(number)["messages"]
        thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": said["content"]}]
        row = {"messages": [asked, {**said, "content": thought}]}
        made = oracle.encode(parse_row(row).with_objective(Objective.of("no-thinking", "test")))
        rows.append({**(row if messages else {}), "input_ids": [*made.input_ids], "labels": [*(made.labels or ())]})
    [finding] = audit(rows, tokenizer=oracle.path).findings
    assert (finding.rule, finding.severity) == ("ML508", "error")
    assert "--objective answers,no-thinking" in finding.expected
    assert audit(rows, tokenizer=oracle.path, objective="no-thinking").findings == ()


def test_a_mask_of_zeros_follows_no_objective() -> None:
    """Of rows whose answers are calls alone, `no-calls` leaves nothing."""
    rows = [encoded({**rounds(n), "messages": rounds(n)["messages"][2:4]}, "answers") for n in range(6)]
    for line in rows:
        line["labels"] = [-100] * len(line["labels"])
    assert errors(judged(rows)) == {"ML544"}


@pytest.mark.parametrize("messages", [True, False], ids=["with messages", "ids alone"])
def test_too_few_rows_have_a_finding_each(messages: bool) -> None:
    rows = [*lines("last-answer", FEWEST_AGREEING - 1, messages=messages), encoded(plain(0), "answers")]
    verdict = judged(rows)
    assert "ML508" not in {finding.rule for finding in verdict.findings}
    assert errors(verdict) == ({"ML551"} if messages else set())
    agreeing = judged(lines("last-answer", FEWEST_AGREEING, messages=messages))
    assert [finding.rule for finding in agreeing.findings] == ["ML508"]
    assert f"{FEWEST_AGREEING} rows or more" in RULES["ML508"].why


@pytest.mark.parametrize(("row", "words"), [(rounds(9), "answers"), (rounds(9), "no-calls"), (plain(9), "everything")])
def test_rows_that_do_not_agree_keep_their_findings(row: Data, words: str) -> None:
    agreeing, other = lines("last-answer"), encoded(row, words)
    alone = {finding.rule for finding in judged([other]).findings}
    for rows in ([*agreeing, other], [other, *agreeing]):
        found = judged(rows).findings
        assert "ML508" not in {finding.rule for finding in found}
        of_rows = [str(finding.place) for finding in found if finding.rule == "ML551"]
        at = rows.index(other)
        wanted = [f"rows[{n}]" for n in range(7) if n != at or "ML551" in alone]
        assert of_rows == wanted


def test_a_setting_of_the_trainer_is_the_other_way_out(tmp_path: Path) -> None:
    from pytest_mistral_lora.runners import find_runner

    path = write_lines(tmp_path, lines("last-answer"))
    for name, words in (("llamafactory", "mask_history"), ("ms-swift", "loss_scale"), ("axolotl", "roles_to_train")):
        given = EncodedTarget("rows", path, judge=target(), fixes=find_runner(name).known_fixes(""))
        with opened_session([given]) as session:
            [finding] = verdict_of(session, "test").findings
        assert (finding.rule, finding.severity) == ("ML508", "error")
        assert words in finding.next_step


def outcomes(path: Path, **options: Any) -> tuple[list[Any], Data]:
    made = Audit(FileRows(path), target().oracle, tokenizer=target().tokenizer, **options)
    found = [(str(one.place), one.state, [finding.to_json() for finding in one.findings]) for one in made.verdicts()]
    return found, made.summary()


AGREEING = lines("last-answer", 4) + lines("last-answer", 8, messages=False)[4:]
MIXED = {
    "agree": AGREEING,
    "differ": [*AGREEING, encoded(rounds(99), "answers")],
    "other ids": [*AGREEING, {**rounds(77), "input_ids": [1, 2], "labels": [-100, -100]}],
    "everything": lines("everything", 7),
    "no messages": lines("no-calls", 7, messages=False),
    "sound": [encoded(plain(n), "answers") for n in range(5)] + lines("answers", 2, messages=False),
}


@pytest.fixture(scope="module", params=sampled(MIXED, ("agree", "differ", "no messages")))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("rows"), MIXED[request.param])


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(chunk=st.integers(1, 9), held=st.integers(1, 20))
def test_the_verdict_does_not_depend_on_the_parts(
    path: Path, chunk: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, figures = outcomes(path)
    with monkeypatch.context() as patch:
        patch.setattr(audits, "CHUNK_LINES", chunk)
        assert outcomes(path, processes=1) == (expected, figures)
        # beyond the lines that are held in full, the findings of a file that agrees to its end are the same
        patch.setattr(agreement, "MOST_ROWS_HELD", held)
        found, short = outcomes(path, processes=1)
    assert sorted(rule for _, _, all_of in found for rule in (one["rule"] for one in all_of)) == sorted(
        rule for _, _, all_of in expected for rule in (one["rule"] for one in all_of)
    )
    assert {key: short[key] for key in ("sound", "wrong")} == {key: figures[key] for key in ("sound", "wrong")}


@pytest.mark.slow
def test_the_verdict_does_not_depend_on_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path, MIXED["agree"])
    expected = outcomes(path)
    monkeypatch.setattr(audits, "CHUNK_LINES", 3)
    assert outcomes(path, processes=3) == expected


def test_an_objective_that_no_word_expresses_leaves_labels_unchecked() -> None:
    from pytest_mistral_lora.formats.row_sources import rows_source

    by = Declaration(None, "roles_to_train: [user]")
    for rows in (lines("everything", 2), lines("last-answer", 2, messages=False)):
        given = EncodedTarget("rows", judge=target(), source=rows_source(rows), objective=by)
        with opened_session([given]) as session:
            verdict = verdict_of(session, "test")
        assert verdict.findings == ()
        assert verdict.not_checked["rows::encoded::labels"] == "objective: not expressible (roles_to_train: [user])"
        assert str(verdict).startswith("objective: not expressible (roles_to_train: [user])\n")
    rows[0]["input_ids"][3] = 1000
    given = EncodedTarget("rows", judge=target(), source=rows_source([{**rounds(0), **rows[0]}]), objective=by)
    with opened_session([given]) as session:
        assert {RULES[finding.rule].case for finding in verdict_of(session, "test").findings} == {"ids"}


@pytest.mark.parametrize(
    ("words", "found"),
    [("last-anwser", "did you mean 'last-answer'"), ("no-thinking", r"about \[THINK\]"), ("", "''")],
)
def test_a_wrong_objective_is_bad_input_of_each_front(
    words: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = lines("answers", 1)
    for call in (
        lambda: audit(rows, tokenizer=SPM, objective=words),
        lambda: judge(write_lines(tmp_path, rows), tokenizer=SPM, objective=words),
        lambda: assert_encoded_rows_sound(rows, SPM, objective=words),
        lambda: assert_labels_exact(rounds(0), rows[0]["input_ids"], rows[0]["labels"], SPM, objective=words),
    ):
        with pytest.raises(InputError, match=found) as refused:
            call()
        assert str(refused.value).startswith("objective=: ")
    assert _exit_code(["check", str(write_lines(tmp_path, rows)), "--tokenizer", SPM, "--objective", words]) == 2
    assert "--objective: " in capsys.readouterr().err


def _exit_code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as left:
        return int(left.code or 0)


def test_check_is_judged_by_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path, lines("last-answer"))
    for declared, code in (("last-answer", 0), ("last-round", 1)):
        words = ["check", str(path), "--tokenizer", SPM, "--objective", declared]
        assert main(words) == code
        out = capsys.readouterr().out
        assert f"objective: {declared} (--objective)\n" in out
        assert ("ML549" in out or "ML551" in out) == bool(code)
        assert main([*words, "--report", str(tmp_path / f"{declared}.json")]) == code
        data = json.loads((tmp_path / f"{declared}.json").read_text())
        facts = {check["facts"]["objective"] for check in data["checks"] if "objective" in check["facts"]}
        assert facts == {f"{declared} (--objective)"}
        page = tmp_path / f"{declared}.html"
        assert main([*words, "--report", str(page)]) == code
        assert f"<dt>objective</dt><dd>{declared} (--objective)</dd>" in page.read_text()
        capsys.readouterr()


def test_judge_and_the_assertions_judge_by_the_argument(tmp_path: Path) -> None:
    rows = lines("last-answer", 2)
    path = write_lines(tmp_path, rows)
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    for words in WORDS:
        assert judge(path, tokenizer=SPM, objective=words, examples=1).ok == (words == "last-answer")
        calls: list[Callable[[], None]] = [
            partial(assert_encoded_rows_sound, path, SPM, objective=words),
            partial(assert_labels_exact, rounds(0), ids, labels, SPM, objective=words),
        ]
        for call in calls:
            if words == "last-answer":
                call()
                continue
            with pytest.raises(AssertionError, match="ML5"):
                call()


def test_the_option_is_for_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", SPM, "--objective", "last-answer"]) == 2
    assert "--objective is for rows and encoded rows" in capsys.readouterr().err
    with pytest.raises(InputError, match="objective= is for rows"):
        judge(SPM, objective="last-answer")


RECIPE = f"""\
base: {{path: base, weights_sha256: {"a" * 64}}}
data: {{train: [rows.jsonl]}}
training: {{steps: 1, learning_rate: 1e-3, batch_size: 1, micro_batch_tokens: 64OBJECTIVE}}
output: out
"""


def test_a_recipe_that_declares_another_objective_contradicts_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(tmp_path, lines("last-answer", 1), "encoded.jsonl")
    write_lines(tmp_path, [plain(0)])
    recipe = tmp_path / "recipe.yaml"
    for objective, found in (
        (", objective: last-round", "last-answer (--objective) and last-round (training.objective)"),
        (", objective: last-answer", ""),
        ("", ""),
    ):
        recipe.write_text(RECIPE.replace("OBJECTIVE", objective))
        words = ["check", str(rows), str(recipe), "--tokenizer", SPM, "--objective", "last-answer"]
        assert main(words) == (2 if found else 1)  # there is no base
        error = capsys.readouterr().err
        assert (f"{recipe}: two objectives are declared: {found}" in error) == bool(found)
    assert main(["check", str(recipe), "--objective", "last-answer"]) == 2
    assert "training.objective" in capsys.readouterr().err


def rated() -> Data:
    pair = texts_pair("a", "b", "c")
    return {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}


OTHER_KINDS: dict[str, Callable[[], list[Data]]] = {
    "a preference pair": lambda: [texts_pair("a", "b", "c")],
    "a rated answer": lambda: [rated()],
    "a fill-in-the-middle row": lambda: [{"prompt": "a = 1", "suffix": "c = 3", "completion": "b = 2"}],
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_rows_take_no_objective(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path, OTHER_KINDS[kind]())
    words = ["check", str(path), "--tokenizer", "spm-v3", "--objective", "last-answer"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"{path}:1" in error
    assert "--objective" in error
    assert "takes no objective" in error
    # behind a conversation, it is known when its line is judged
    path = write_lines(tmp_path, [plain(1), *OTHER_KINDS[kind]()])
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--objective", "last-answer"]) == 1
    out = capsys.readouterr().out
    assert f"{path}:2" in out
    assert "takes no objective" in out


def test_encoded_pairs_take_no_objective() -> None:
    record = with_ids(target().oracle, texts_pair("a", "b", "c"))
    with pytest.raises(InputError, match="a preference pair takes no objective") as refused:
        audit([record], tokenizer=SPM, objective="last-answer")
    assert "rows[0]" in str(refused.value)
    verdict = audit([encoded(plain(0), "answers"), record], tokenizer=SPM, objective="last-answer")
    assert [(finding.rule, str(finding.place)) for finding in verdict.findings if finding.rule == "ML501"] == [
        ("ML501", "rows[1]")
    ]
