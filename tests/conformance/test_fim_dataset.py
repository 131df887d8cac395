"""Files of fill-in-the-middle rows, judged by `check`, counted by `stats` and shown by `render`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.kinds.fim import FimRow, parse_fim_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.cases import OF_CONVERSATIONS
from pytest_mistral_lora.conformance.dataset.checks import file_results
from pytest_mistral_lora.conformance.dataset.fim import fim_signs
from pytest_mistral_lora.conformance.mask.fim_law import fim_violation
from pytest_mistral_lora.strategies import fim_rows

TOKENIZER = CheckpointTokenizer(shipped_tokenizer("spm-v3"))
GAPS = [
    {"prompt": f"def area_{n}(a, b):\n    ", "suffix": "\n    return area\n", "completion": f"area = a * b * {n}"}
    for n in range(3)
]
CHAT = {"messages": [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": "It is mild."}]}


def written(folder: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_gaps_passes_and_says_what_is_not_checked(tmp_path: Path) -> None:
    results = file_results(written(tmp_path, GAPS), TOKENIZER)
    assert [finding.text() for result in results.values() for finding in result.findings] == []
    assert {case for case, result in results.items() if result.not_checked} >= set(OF_CONVERSATIONS)
    assert not results["laws-hold"].not_checked
    figures = dict(results["statistics"].facts)
    assert (figures["rows"], figures["fim_rows"], figures["messages"]) == (3, 3, 0)
    assert figures["roles"] == {"completion": 3, "prompt": 3, "suffix": 3}


def test_conversations_beside_gaps_are_checked(tmp_path: Path) -> None:
    results = file_results(written(tmp_path, [*GAPS, CHAT]), TOKENIZER)
    assert [finding.text() for result in results.values() for finding in result.findings] == []
    assert not results["answers-are-read-back"].not_checked
    assert not results["tool-calls-fit-the-tools"].not_checked
    figures = dict(results["statistics"].facts)
    assert (figures["rows"], figures["fim_rows"], figures["messages"]) == (4, 3, 2)


def test_another_suffix_is_another_row(tmp_path: Path) -> None:
    same, other = GAPS[0], {**GAPS[0], "suffix": "\n    return area + 1\n"}
    results = file_results(written(tmp_path, [same, other]), TOKENIZER)
    assert not results["no-duplicates"].findings
    results = file_results(written(tmp_path, [same, same]), TOKENIZER)
    assert [finding.rule for finding in results["no-duplicates"].findings] == ["ML608"]


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=fim_rows())
def test_the_law_holds_for_hostile_rows(row: dict[str, Any]) -> None:
    found = parse_fim_row(row)
    assert fim_violation(found, TOKENIZER.oracle.encode(found), TOKENIZER.oracle) == ""


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(fim_rows(), min_size=20, max_size=30))
def test_hostile_gaps_break_no_law_of_rows(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    results = file_results(written(tmp_path_factory.mktemp("rows"), rows), TOKENIZER)
    errors = {finding.rule for result in results.values() for finding in result.findings if finding.is_raised}
    # a text of many letters of control tokens, or of U+FFFD, is no sound one
    assert errors <= {"ML636", "ML639", "ML608"}


def test_letters_that_completions_have_lost_are_an_error(tmp_path: Path) -> None:
    rows = [FimRow.of(f"a{n} = (", ")\n", f"'caf\ufffd {n}'").to_json() for n in range(6)]
    findings = file_results(written(tmp_path, rows), TOKENIZER)["statistics"].findings
    assert [(finding.rule, finding.severity) for finding in findings] == [("ML636", "error")]


_BODY = "    first = load(path)\n    second = parse(first)\n    return second\n"


@pytest.mark.parametrize(
    ("row", "signs"),
    [
        (FimRow.of("a", _BODY, "path = 1\n" + _BODY), {"suffix_repeated"}),
        (FimRow.of("a", _BODY + "# end", "path = 1\n" + _BODY), {"suffix_repeated"}),
        # the completion begins as the suffix does, and does not end so
        (FimRow.of("a", _BODY, _BODY + "path = 1\n"), set()),
        (FimRow.of("a", "-" * 80 + "\n", "b\n" + "-" * 80), set()),
        (FimRow.of("a", ")\n}\n", "f(1)\n}\n"), set()),
        (FimRow.of(_BODY, "c", _BODY + "b"), {"prompt_repeated"}),
        (FimRow.of(_BODY, "c", _BODY[:30]), set()),
        (FimRow.of("a", "", "b"), {"no_suffix"}),
        (FimRow.of("<fim_prefix>a", "c", "b"), {"fim_markers"}),
        (FimRow.of("a", "c<|fim_middle|>", "b"), {"fim_markers"}),
        (FimRow.of("<PRE> a <SUF> ", "c", "b"), {"fim_markers"}),
        (FimRow.of("<\uff5cfim\u2581begin\uff5c>a", "c", "b"), {"fim_markers"}),
        (FimRow.of("<pre>a</pre>", "<PREVIEW>", "<mid>"), set()),
    ],
)
def test_the_signs_of_a_row(row: FimRow, signs: set[str]) -> None:
    assert dict(fim_signs(row)).keys() == signs


def test_check_refuses_gaps_for_a_tokenizer_without_the_markers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(written(tmp_path, GAPS)), "--tokenizer", "spm-v2"]) == 1
    assert "ML601 rows.jsonl:1" in capsys.readouterr().out.replace(f"{tmp_path}/", "")


def test_render_shows_the_parts_in_the_order_of_their_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(written(tmp_path, GAPS)), "--tokenizer", "spm-v3", "--limit", "1"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if "trained on" in line]
    assert [line.split(None, 1)[-1] for line in lines[1:]] == [
        "beginning, not trained on",
        "turn 0: suffix, not trained on",
        "turn 1: prompt, not trained on",
        "turn 2: completion, trained on",
    ]


def test_render_as_json_has_the_row_beside_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", str(written(tmp_path, GAPS)), "--tokenizer", "spm-v3", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in GAPS[0]} for row in shown] == GAPS


def test_the_chat_template_renders_no_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["render", str(written(tmp_path, GAPS)), "--tokenizer", "spm-v3", "--backend", "chat-template"]
    assert main(arguments) == 2
    assert "no chat template renders" in capsys.readouterr().err
