"""Rows of a golden folder, and what an adapter answers to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plugin_rows import NAMED, ROW, write_rows
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.records.compare_runs import compare_runs
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load
from pytest_mistral_lora.training.generate.model_spec import ModelSpec
from pytest_mistral_lora.training.merge import merge

Run = Callable[..., pytest.RunResult]
TENSORS = "adapter_model.safetensors"


@pytest.fixture
def own(here: Path, golden: Run) -> Run:
    """Run the checks of the user's own transcripts; the golden folder has one row, recorded."""

    def run(*args: str) -> pytest.RunResult:
        words = ("--mistral-adapter=lora", "--mistral-base=base", "--mistral-golden-dir=goldens")
        return golden(*words, "-k", "transcript::own-", *args)

    return run


def _file(here: Path, name: str = "prime", target: str = "lora") -> Path:
    return here / "goldens" / "transcripts" / target / f"{name}.json"


def _lines(result: pytest.RunResult, start: str) -> list[str]:
    return [line for line in result.outlines if line.startswith(start)]


def _failed(result: pytest.RunResult, start: str, value: str = "") -> None:
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    line = next(line for line in result.outlines if line.startswith("ML"))
    assert line.startswith(start)
    assert value in line


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _forget(here: Path) -> None:
    """Make another adapter of it, which has not learned its answer."""
    tensors = load_file(here / "lora" / TENSORS)
    save_file({name: tensor * 0.1 for name, tensor in tensors.items()}, here / "lora" / TENSORS)


def test_an_answer_is_recorded_once_and_held_to(own: Run, here: Path) -> None:
    shutil.rmtree(here / "goldens" / "transcripts")
    unrecorded = own()
    assert unrecorded.ret == pytest.ExitCode.TESTS_FAILED  # nothing was judged
    assert any("no answer to the row is recorded" in line for line in _lines(unrecorded, "  lora: "))
    assert not (here / "goldens" / "transcripts").exists()
    assert own("--mistral-fail-on=note,not-checked").ret == pytest.ExitCode.TESTS_FAILED
    first = own("--mistral-golden-update")
    assert first.ret == 0
    assert _lines(first, "golden") == [
        f"golden created: {_file(here)}",
        "goldens: 1 created, 0 rewritten, 0 unchanged",
    ]
    transcript = load(_file(here))
    assert transcript.text == "Seven is prime."
    assert transcript.max_new_tokens == NAMED["max_new_tokens"]
    assert [(check["name"], check["passed"]) for check in transcript.checks] == [("eos", True), ("max_tokens:9", True)]
    before = _file(here).read_bytes()
    assert _lines(own("--mistral-golden-update"), "golden ") == [f"golden unchanged: {_file(here)}"]
    assert _file(here).read_bytes() == before
    judged = own("-v", "--mistral-fail-on=note,not-checked")
    assert judged.ret == 0
    judged.stdout.fnmatch_lines(["*lora::transcript::own-prime PASSED*"])
    assert _lines(judged, "answers of") == ["answers of lora: 1 exact, 0 equivalent, 0 different"]


def test_another_answer_fails_until_it_is_recorded(own: Run, here: Path) -> None:
    _forget(here)
    result = own()
    _failed(result, f"ML804 {_file(here)}, token 0: answered")
    result.stdout.fnmatch_lines(
        [
            "  tier: different",
            "  token 0: recorded *S' (probability 0.*), found * (0.*)",
            "*update: pytest --mistral-golden --mistral-adapter=lora --mistral-base=base *--mistral-golden-update",
        ]
    )
    assert _lines(result, "answers of") == ["answers of lora: 0 exact, 0 equivalent, 1 different"]
    assert _lines(own("--mistral-golden-update"), "golden ") == [f"golden rewritten: {_file(here)}"]
    assert own().ret == 0


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "Another?"}, ROW["messages"][1]]},
        pytest.param({"max_new_tokens": 7}, marks=pytest.mark.slow),
        pytest.param({"checks": ["eos"]}, marks=pytest.mark.slow),
    ],
)
def test_a_row_that_asks_something_else_is_not_what_was_recorded(change: dict[str, Any], own: Run, here: Path) -> None:
    write_rows(here / "goldens" / "rows.jsonl", [{**NAMED, **change}])
    _failed(own(), f"ML007 {here / 'goldens'}/rows.jsonl:1: the row ")
    assert _lines(own("--mistral-golden-update"), "golden ") == [f"golden rewritten: {_file(here)}"]
    assert own().ret == 0


def test_what_a_row_does_not_say_stays_as_it_was_recorded(own: Run, here: Path) -> None:
    write_rows(here / "goldens" / "rows.jsonl", [{**ROW, "name": "prime"}])
    assert own().ret == 0
    (here / "goldens" / "rows.jsonl").unlink()
    assert own().ret == 0
    _forget(here)
    own("--mistral-golden-update")
    assert (load(_file(here)).max_new_tokens, len(load(_file(here)).checks)) == (8, 2)


@pytest.mark.parametrize("update", [(), ("--mistral-golden-update",)])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checks": ["jsno"]}, "checks.0: expected json, tool_call"),
        pytest.param({"max_new_tokens": 0}, "max_new_tokens: expected more than 0", marks=pytest.mark.slow),
        pytest.param(
            {"checks": [{"json_schema": "none.json"}]}, "cannot be read: No such file", marks=pytest.mark.slow
        ),
        ({"messages": [ROW["messages"][1]]}, ""),
    ],
)
def test_a_row_that_cannot_be_asked_fails_by_name(
    update: tuple[str, ...], change: dict[str, Any], said: str, own: Run, here: Path
) -> None:
    before = _file(here).read_bytes()
    write_rows(here / "goldens" / "rows.jsonl", [{**NAMED, **change}])
    result = own(*update)
    _failed(result, "ML007 ")
    assert said in result.stdout.str()
    assert _file(here).read_bytes() == before


def test_the_form_of_an_answer_is_kept_or_it_fails(own: Run, here: Path) -> None:
    (here / "goldens" / "answer.json").write_text('{"type": "string"}')
    row = {**ROW, "name": "prime", "checks": [{"json_schema": "answer.json"}, {"regex": "Seven.*"}]}
    write_rows(here / "goldens" / "rows.jsonl", [row])
    own("--mistral-golden-update")
    passed = {check["name"]: check["passed"] for check in load(_file(here)).checks}
    assert passed == {"json_schema:answer.json": False, "regex:Seven.*": True}
    check = {"name": "regex:Eight.*", "kind": "regex", "value": "Eight.*", "passed": True, "reason": ""}
    (here / "goldens" / "rows.jsonl").unlink()
    _edit(_file(here), checks=[check])
    _failed(own(), f"ML805 {_file(here)}: regex:Eight.*: the text does not match")


def _other_prompt(here: Path) -> None:
    _edit(_file(here), prompt_ids=[1, *load(_file(here)).prompt_ids])


def _other_base(here: Path) -> None:
    _edit(_file(here), model={**load(_file(here)).model, "base_weights_sha256": "0" * 64})


def _other_tokenizer(here: Path) -> None:
    _edit(_file(here), tokenizer={**load(_file(here)).tokenizer, "file": "tekken.json", "sha256": "0" * 64})


def _not_one(here: Path) -> None:
    _edit(_file(here), margins=[])


@pytest.mark.parametrize(
    ("change", "judged", "updated"),
    [
        (_other_prompt, "ML802", ()),
        (_other_base, "ML803", ("ML007 {file}: ", "base 000000000000")),
        (_other_tokenizer, "", ("ML007 {file}: ", "tekken.json 000000000000")),
        (_not_one, "ML801", ("ML801 {file}: ", "$.margins")),
    ],
)
def test_what_is_no_transcript_of_this_model_is_not_written_over(
    change: Callable[[Path], None], judged: str, updated: tuple[str, ...], own: Run, here: Path
) -> None:
    change(here)
    before = _file(here).read_bytes()
    result = own()
    assert [line[:5] for line in _lines(result, "ML")][:1] == ([judged] if judged else [])
    again = own("--mistral-golden-update")
    if updated:
        start, value = updated
        _failed(again, start.format(file=_file(here)), value)
        assert _file(here).read_bytes() == before
        assert "to record anew" in again.stdout.str()
    else:
        assert _lines(again, "golden ") == [f"golden rewritten: {_file(here)}"]


def test_without_the_base_nothing_is_judged_and_recording_fails(own: Run, here: Path, golden: Run) -> None:
    (here / "base").rename(here / "elsewhere")
    words = ("--mistral-adapter=lora", "--mistral-golden-dir=goldens", "-k", "transcript::own-")
    for update, outcome in (((), "skipped"), (("--mistral-golden-update",), "failed")):
        result = golden(*words, *update)
        assert "the base 'base' is missing" in result.stdout.str()
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        assert outcome in result.parseoutcomes()


def test_a_recipe_records_renderings_and_answers_under_its_name(golden: Run, here: Path) -> None:
    words = ("--mistral-recipe=recipe.yaml", "--mistral-golden-dir=goldens", "-k", "own-")
    result = golden(*words, "--mistral-golden-update")
    assert _lines(result, "golden ") == [
        f"golden created: {here / 'goldens'}/templates/recipe.yaml/prime.json",
        f"golden created: {_file(here, target='recipe.yaml')}",
    ]
    assert golden(*words).parseoutcomes()["passed"] == 2


def test_two_adapters_are_asked_one_after_the_other(own: Run, here: Path) -> None:
    shutil.copytree(here / "lora", here / "other")
    _forget(here)
    both = ("--mistral-adapter=other", "--mistral-golden-update")
    assert _lines(own(*both), "golden ") == [
        f"golden rewritten: {_file(here)}",
        f"golden created: {_file(here, target='other')}",
    ]
    assert load(_file(here)).text != load(_file(here, target="other")).text == "Seven is prime."
    assert own(both[0]).parseoutcomes()["passed"] == 2


def test_the_model_is_loaded_once_for_the_folder_s_transcripts_and_the_user_s(
    here: Path, golden: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "lora" / TRANSCRIPTS).mkdir()
    shutil.copy(_file(here), here / "lora" / TRANSCRIPTS)
    loaded, load_model = [], ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec: loaded.append(spec) or load_model(spec))
    words = ("--mistral-adapter=lora", "--mistral-base=base", "--mistral-golden-dir=goldens", "-k", "::transcript::")
    assert golden(*words).parseoutcomes()["passed"] == 6
    assert len(loaded) == 1


def test_a_merged_model_records_its_own_answers(golden: Run, here: Path) -> None:
    merge(here / "lora", here / "whole", here / "base")
    words = ("--mistral-adapter=whole", "--mistral-golden-dir=goldens", "-k", "transcript::own-")
    assert _lines(golden(*words, "--mistral-golden-update"), "golden ") == [
        f"golden created: {_file(here, target='whole')}"
    ]
    recorded = load(_file(here, target="whole"))
    assert (recorded.text, recorded.model["kind"]) == ("Seven is prime.", "merged")
    judged = golden(*words, "--mistral-fail-on=note,not-checked")
    assert _lines(judged, "answers of") == ["answers of whole: 1 exact, 0 equivalent, 0 different"]
    merge(here / "lora", here / "half", here / "base", dtype="bfloat16")
    found = compare_runs(here / "whole", here / "half")
    assert ("record", "$.parent.merge_dtype") in {(fact.group, fact.path) for fact in found.facts}
    assert not isinstance(found.tensors, str)
    assert found.tensors.compared == found.tensors.different > 20


def test_transcripts_of_no_target_are_said(own: Run, here: Path) -> None:
    shutil.copytree(here / "goldens" / "transcripts" / "lora", here / "goldens" / "transcripts" / "lora-1")
    [line] = _lines(own(), "  goldens/")
    assert line.startswith("  goldens/transcripts/lora-1: ")
