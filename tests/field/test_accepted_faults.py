"""A list of known deviations accepts a finding by the id of the known fault that explains it."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from check_outcomes import outcome_of
from local_server import Behaviour, serving
from transformers import AutoTokenizer

from pytest_mistral_lora import environment
from pytest_mistral_lora import judge as judge_folder
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.known import Xfail, read_xfails
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.session import Session
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.programs.facts import fact

IDS = Finding("ML205", "other ids", "tokenizer.json")


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the installed versions."""

    def run(**versions: str) -> None:
        monkeypatch.setattr(environment, "installed_versions", lambda: versions)

    return run


def session_of(*ids: str, target: Target | None = None) -> Session:
    settings = Settings(1, None, "cpu", False, (), False, Path())
    xfails = [Xfail(name, "looked at", f"known.txt:{line}", is_of_fault=True) for line, name in enumerate(ids, 1)]
    return Session(lambda: [target or Target("a", Path("a"))], settings, CheckOptions(xfails=tuple(xfails)))


def judge(session: Session, subject: Any, case: str, *findings: Finding) -> CheckOutcome:
    check = Check(session.targets[0], subject, case, Result)
    session.collected.append(f"mistral-golden::{check.name}")
    outcome = session.outcome_of(check, Result(findings))
    session.take(outcome)
    return outcome


@pytest.mark.parametrize(
    ("transformers", "state", "remark"),
    [
        ("4.57.6", "failed", "not met: merges-by-id (known.txt:1): the versions of this run do not have the fault"),
        ("5.23.0", "known", None),
        (
            "5.24.0",
            "known",
            "merges-by-id (known.txt:1): until transformers 5.24, you run 5.24.0: ended; "
            "it is still accepted: remove it",
        ),
    ],
)
def test_a_finding_is_accepted_from_the_first_version_that_has_the_fault(
    transformers: str, state: str, remark: str | None, running: Any
) -> None:
    running(transformers=transformers)
    session = session_of("merges-by-id")
    assert judge(session, "tokenizer", "text-ids", IDS).state == state
    other = judge(session, "tokenizer", "bos-eos-unk", Finding("ML203", "x", "tokenizer.json"))
    assert other.state == "failed"
    if state == "failed":
        # the finding is there, though this fault cannot be its cause
        assert (session.remarks_on_known, session.unmatched) == ([], [])
        session = session_of("merges-by-id")
        judge(session, "tokenizer", "text-ids")
    assert session.remarks_on_known == ([remark] if remark else [])
    assert session.unmatched == []


def test_an_open_fault_of_a_newer_version_is_accepted_and_not_checked(running: Any) -> None:
    running(transformers="5.31.0")
    session = session_of("llama-tokenizer-merges")
    assert judge(session, "tokenizer", "text-ids", IDS).state == "known"
    line = "llama-tokenizer-merges (known.txt:1): seen with 5.24.0, you run 5.31.0: not checked"
    assert session.remarks_on_known == [line]


@pytest.mark.parametrize(("transformers", "is_out_of_date"), [("5.24.0", True), ("5.31.0", False), ("5.23.0", False)])
def test_an_entry_without_a_finding_is_out_of_date_only_if_the_versions_have_the_fault(
    transformers: str, is_out_of_date: bool, running: Any
) -> None:
    running(transformers=transformers)
    session = session_of("llama-tokenizer-merges")
    judge(session, "tokenizer", "text-ids")
    assert [xfail.id for xfail in session.unmatched] == ["llama-tokenizer-merges"] * is_out_of_date
    assert session.exit_code == int(is_out_of_date)


@pytest.mark.parametrize(
    ("served", "state", "remark"),
    [
        ("0.31.0", "failed", None),
        ("0.32.0", "known", None),
        ("0.33.0", "known", "seen with 0.32.0, you run 0.33.0: not checked"),
        ("", "known", None),
    ],
)
def test_the_version_of_the_judged_server_decides(
    served: str, state: str, remark: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ServerTarget("a", judge=Target("spm-v3"), kind="vllm", url="http://127.0.0.1:9")
    monkeypatch.setattr(ServerTarget, "served_version", served)
    session = session_of("served-letters-as-markers", target=target)
    session.take(outcome_of("a::server::reachable", facts={"server of": f"vLLM {served}".strip() + ", model m"}))
    outcome = judge(session, "answer", "spelled", Finding("ML924", "spelled-call: x"))
    assert outcome.state == state
    lines = [line for line in session.remarks_on_known if "not checked" in line]
    assert lines == ([f"served-letters-as-markers (known.txt:1): {remark}"] if remark else [])


def test_the_id_of_a_fault_that_explains_no_finding_is_refused(tmp_path: Path) -> None:
    assert not fact("tekken-first").can_explain
    (tmp_path / "known.txt").write_text("merges-by-id # x\ntekken-first # x\n")
    with pytest.raises(ValueError, match=r"known\.txt:2: the known fault .tekken-first. explains .* no rule"):
        read_xfails(tmp_path / "known.txt")
    (tmp_path / "known.txt").write_text("merges-by-ids # x\n")
    with pytest.raises(ValueError, match=r"did you mean 'merges-by-id'\?"):
        read_xfails(tmp_path / "known.txt")


def test_a_folder_that_transformers_converts_wrongly_is_accepted_by_the_fault(
    tmp_path: Path,
) -> None:
    """The real fault, of the installed transformers; with an entry that has ended beside it."""
    known = fact("llama-tokenizer-merges")
    if known.standing({"transformers": version("transformers")}).state != "present":
        pytest.skip("not a version of transformers with the fault")
    folder, saved = tmp_path / "made", tmp_path / "saved"
    folder.mkdir()
    shutil.copy(shipped_tokenizer("spm-v3"), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    shutil.copy(shipped_tokenizer("spm-v3"), saved / "tokenizer.model.v3")

    assert "ML205" in {finding.rule for finding in judge_folder(saved, examples=1).findings}
    list_ = tmp_path / "known.txt"
    list_.write_text("llama-tokenizer-merges  # we keep this folder\nmerges-by-id  # of an older environment\n")
    verdict = judge_folder(saved, examples=1, xfails=list_)
    assert "ML205" not in {finding.rule for finding in verdict.findings}
    ended = f"until transformers 5.24, you run {version('transformers')}: ended"
    assert f"merges-by-id ({list_}:2): {ended}" in str(verdict)


@pytest.mark.parametrize(
    ("running", "remark"), [("0.32.0", ""), ("0.33.0", "seen with 0.32.0, you run 0.33.0: not checked")]
)
def test_serve_check_names_a_server_that_is_newer_than_the_facts_about_it(
    running: str, remark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with serving(Behaviour(Oracle(shipped_tokenizer("spm-v3")), version=running)) as url:
        words = ["serve-check", f"vllm={url}", "--tokenizer", "spm-v3", "--rows", str(tmp_path / "rows.jsonl")]
        code = main(words)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("known faults and deviations of ")
    ]
    assert [line.partition(": ")[2] for line in lines] == ([remark] if remark else [])
    # the prompts were judged, and are right
    assert code == 0
