from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from dataset_recipes import SOUND, Target, facts, found, make_target, said, v3, write_rows

from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.bounded_findings import SHOWN
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.dataset.cases import CASES
from pytest_mistral_lora.conformance.dataset.checks import check_dataset, checks, dataset_results
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import NoOracleError, PinError, RowsError


def settings_for(folder: Path) -> Settings:
    folder.mkdir(exist_ok=True)
    return Settings(1, None, "cpu", True, (), False, folder)


def corpus() -> list[dict[str, Any]]:
    folder = files("chatterbot_corpus") / "data" / "english"
    texts = [file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name[-4:] == ".yml"]
    conversations = [one for text in texts for one in yaml.safe_load(text)["conversations"]]
    spoken = [[text for text in map(str, one) if text.strip(" ")] for one in conversations]
    return [said(*one[: len(one) // 2 * 2]) for one in spoken if len(one) > 1]


@pytest.mark.parametrize("backend", ["mistral-common", pytest.param("chat-template", marks=pytest.mark.slow)])
def test_two_thousand_real_rows_break_no_rule(backend: str, tmp_path: Path) -> None:
    rows = corpus()[:2000]
    results = dataset_results(make_target(tmp_path, rows, backend=backend))
    assert [finding.text() for finding in found(results) if finding.severity == "error"] == []
    # people repeat themselves, and some answers end with a space
    assert {finding.rule for finding in found(results)} <= {"ML604", "ML608", "ML609", "ML648"}
    assert facts(results)["rows"] == 2000
    assert facts(results)["rows_refused"] == 0


def test_the_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    target = make_target(tmp_path, SOUND, [said("a", "b")])
    encoded = [v3().oracle.encode(row) for row in (*SOUND, said("a", "b"))]
    lengths = sorted(len(row.input_ids) for row in encoded)
    supervised = sum(row.supervised_tokens for row in encoded)
    seen = facts(dataset_results(target))
    assert seen["tokens"] == {
        "total": sum(lengths),
        "mean": sum(lengths) / 4,
        "p50": lengths[1],
        "p95": lengths[3],
        "max": lengths[3],
    }
    assert seen["supervised_tokens"]["total"] == supervised
    assert seen["supervised_share"] == round(supervised / sum(lengths), 4)
    assert (seen["rows"], seen["rows_trained_on"], seen["rows_held_out"], seen["rows_refused"]) == (4, 3, 1, 0)
    assert (seen["messages"], seen["assistant_turns"]) == (11, 5)
    assert (seen["rows_with_system_prompt"], seen["rows_with_tools"]) == (1, 0)
    assert seen["longest_row"] == f"{tmp_path / 'rows.jsonl'}:3"
    assert [file["rows"] for file in seen["files"]] == [3, 1]
    assert [file["held_out"] for file in seen["files"]] == [False, True]


def test_the_sides_of_a_split_are_the_trainers(tmp_path: Path) -> None:
    from pytest_mistral_lora.training.rows.loading import load_data

    rows = [said(f"Question {number}?", f"Answer {number}.") for number in range(60)]
    target = make_target(tmp_path, rows, data={"held_out": 0.3})
    data = load_data(target.recipe, make_encoder("mistral-common", v3()))
    seen = facts(dataset_results(target))
    assert (seen["rows_trained_on"], seen["rows_held_out"]) == (len(data.train.rows), len(data.held_out.rows))
    assert seen["supervised_tokens"]["total"] == sum(
        one.figures.tally.supervised_tokens for one in (data.train, data.held_out)
    )


@pytest.mark.parametrize("backend", ["mistral-common", "chat-template"])
def test_what_the_trainer_refuses_is_an_error_and_what_mistral_common_refuses(backend: str, tmp_path: Path) -> None:
    from pytest_mistral_lora.training.rows.loading import load_data

    silent = said("a", "b")
    silent["messages"][1]["weight"] = 0
    bad = ["{", "[]", silent, said("a", " word" * 200), said("a", "b", "c"), said("a [INST] b", "c"), said("a", "b ")]
    target = make_target(tmp_path, [*SOUND, *bad], max_length=100, backend=backend)
    with pytest.raises(RowsError) as caught:
        load_data(target.recipe, make_encoder(backend, v3()))
    refused = {str(error.place).split(",")[0] for error in caught.value.errors}
    findings = [finding for finding in found(dataset_results(target)) if finding.severity == "error"]
    # the template alone would train on a row that ends with the user
    also = {f"{tmp_path / 'rows.jsonl'}:8"}
    assert {str(finding.place).split(",")[0] for finding in findings} == refused | also
    assert len(refused - also) == (5 if backend == "chat-template" else 4)


def test_several_processes_say_what_one_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LINES", 50)
    rows = [said(f"Question {number % 70}?", f"Answer {number % 140}.") for number in range(250)]
    rows[3:3] = ["{", said("a", "b", "c"), said("x[INST]", "y"), said("a", "b "), said("long " * 50, "c")]
    # more notes than are shown, and then the errors of the same rule
    rows += [said(f"Hi {number}<|im_end|>", f"Hello {number}.") for number in range(30)]
    rows += [said(f"<|im_start|>user\nHi {number}<|im_end|>", f"Yes {number}.") for number in range(30)]
    # signs of a whole file
    texts = ("VoilÃ\xa0", "Caf\\u00e9")
    signed = [said(f"And {number}?", f" {texts[number % 2]} {number}.") for number in range(120)]
    target = make_target(tmp_path, [*rows, *signed[:5]], signed, max_length=40)
    alone = dataset_results(target, processes=1)
    assert dataset_results(target, processes=2) == alone
    assert facts(alone)["rows"] > 400
    errors = [finding for finding in found(alone, "ML628") if finding.severity == "error"]
    assert sum(finding.more or 1 for finding in errors) == 30
    shown = {finding.rule for finding in found(alone)}
    assert {"ML601", "ML607", "ML608", "ML609", "ML610", "ML612", "ML624", "ML636", "ML661"} <= shown, shown


def test_findings_of_one_rule_are_shown_up_to_a_number_and_all_counted(tmp_path: Path) -> None:
    results = dataset_results(make_target(tmp_path, [*SOUND, *["{"] * 60, *[SOUND[0]] * 2]))
    findings = found(results, "ML601")
    assert len(findings) == SHOWN + 1
    assert str(findings[0].place) == f"{tmp_path / 'rows.jsonl'}:4"
    assert (findings[-1].found, findings[-1].more) == ("… and 40 more", 40)
    assert facts(results)["rows_refused"] == 60
    [repeated] = found(results, "ML608")
    assert (repeated.found, str(repeated.others[0])) == ("the row is there 3 times", f"{tmp_path / 'rows.jsonl'}:1")


def test_a_named_deviation_is_counted_and_no_error_where_mistral_common_encodes(tmp_path: Path) -> None:
    results = dataset_results(make_target(tmp_path, [*SOUND, said("a", "b  "), said("c", "d ")]))
    assert [finding.rule for finding in found(results)] == ["ML648"]
    assert facts(results, "backends-agree")["deviations"] == {"assistant-trailing-spaces": 2}


def test_what_a_cut_would_remove_is_added_up(tmp_path: Path) -> None:
    results = dataset_results(make_target(tmp_path, [said("a", "b", "c", " word" * 50)], max_length=20))
    [finding] = found(results)
    length = len(v3().oracle.encode(said("a", "b", "c", " word" * 50)).input_ids)
    assert finding.found == f"{length} tokens"
    assert f" {length - 20} tokens, {length - 20} supervised tokens, 1 closing </s>" in finding.detail
    cut = facts(results, "nothing-is-cut")["beyond_max_length"]
    assert cut == {"tokens": length - 20, "supervised_tokens": length - 20, "closing_</s>": 1}


SILENT = {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "b", "weight": 0}]}
LONG_ANSWER, LONG_PROMPT = said("a", " word" * 50), said(" word" * 50, "b")


@pytest.mark.parametrize("backend", ["mistral-common", "chat-template"])
@pytest.mark.parametrize("truncation", ["error", "drop", "right"])
@pytest.mark.parametrize("unsupervised", ["error", "drop", "warn"])
def test_rows_are_judged_by_what_the_recipe_does_with_them(
    truncation: str, unsupervised: str, backend: str, tmp_path: Path
) -> None:
    from pytest_mistral_lora.training.rows.loading import load_data

    training = {"steps": 1, "max_length": 30, "truncation": truncation, "unsupervised": unsupervised}
    rows = [said("f", "g"), SILENT, LONG_ANSWER, LONG_PROMPT]
    target = make_target(tmp_path, rows, [said("c", "d"), said("e", "other " * 50)], backend=backend, training=training)
    results = dataset_results(target)
    errors = {str(finding.place) for finding in found(results, "ML605", "ML607")}
    notes = {str(finding.place) for finding in found(results, "ML620")}
    if "error" in (truncation, unsupervised):
        with pytest.raises(RowsError) as caught:
            load_data(target.recipe, make_encoder(backend, v3()))
        assert errors == {str(error.place) for error in caught.value.errors}
        return
    data = load_data(target.recipe, make_encoder(backend, v3()))
    assert [finding for finding in found(results) if finding.severity == "error"] == []
    seen, tallies = facts(results), [split.figures.tally for split in (data.train, data.held_out)]
    assert (seen["rows_trained_on"], seen["rows_held_out"]) == (tallies[0].used, tallies[1].used)
    assert seen["rows_dropped"] == sum(tally.rows - tally.used for tally in tallies)
    assert seen["tokens"]["total"] == sum(tally.tokens for tally in tallies)
    assert seen["supervised_tokens"]["total"] == sum(tally.supervised_tokens for tally in tallies)
    changed = facts(results, "nothing-is-cut")["rows_changed"]
    assert changed == dict(tallies[0].changes + tallies[1].changes)
    files = [target.recipe.data.train[0], target.recipe.data.eval[0]]
    named = [place for tally in tallies for places in tally.places.values() for place in places]
    assert notes == {f"{files[file]}:{line}" for file, line in named}


def test_what_is_cut_is_said(tmp_path: Path) -> None:
    training = {"steps": 1, "max_length": 30, "truncation": "right"}
    [finding] = found(dataset_results(make_target(tmp_path, [said("c", "d"), LONG_ANSWER], training=training)))
    length = len(v3().oracle.encode(LONG_ANSWER).input_ids) - 30
    without = f"{length} tokens, {length} supervised tokens, 1 closing </s>"
    assert finding.found == f"cut to training.max_length = 30, without {without}"
    assert (finding.rule, finding.severity) == ("ML620", "note")


def test_a_row_of_exactly_max_length_is_fine(tmp_path: Path) -> None:
    length = max(len(v3().oracle.encode(row).input_ids) for row in SOUND)
    assert found(dataset_results(make_target(tmp_path, SOUND, max_length=length))) == []
    assert len(found(dataset_results(make_target(tmp_path, SOUND, max_length=length - 1)), "ML607")) == 1


def test_how_a_conversation_begins_may_be_held_out_and_trained_on(tmp_path: Path) -> None:
    begins_alike = said("How many legs has a spider?", "Eight.", "And a fly?", "Six, too.")
    assert found(dataset_results(make_target(tmp_path, SOUND, [begins_alike]))) == []
    asked_alone = said("How many legs has a spider?", "It has eight.")
    [finding] = found(dataset_results(make_target(tmp_path, SOUND, [asked_alone])))
    assert (finding.rule, str(finding.place)) == ("ML611", f"{tmp_path / 'held-out.jsonl'}:1")


def test_equal_rows_in_two_files_are_repeated(tmp_path: Path) -> None:
    write_rows(tmp_path / "more.jsonl", SOUND[:1])
    results = dataset_results(make_target(tmp_path, SOUND, data={"train": ["rows.jsonl", "more.jsonl"]}))
    [finding] = found(results)
    assert (finding.rule, str(finding.place)) == ("ML608", f"{tmp_path / 'more.jsonl'}:1")


def test_without_a_mistral_tokenizer_the_template_alone_is_judged(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    v3().fast.save_pretrained(folder)
    target = make_target(tmp_path, [*SOUND, said("a", "b", "c")], backend="chat-template")
    target.__dict__["tokenizer"] = CheckpointTokenizer(folder, "none")
    results = dataset_results(target)
    assert "no Mistral tokenizer file" in results["backends-agree"].not_checked
    assert found(results, "ML601", "ML603") == []
    assert facts(results)["rows"] == 4
    target.__dict__["tokenizer"] = CheckpointTokenizer(folder)
    plain = make_target(tmp_path, SOUND)
    plain.__dict__["tokenizer"] = CheckpointTokenizer(folder, "none")
    with pytest.raises(NoOracleError):
        dataset_results(plain)


def test_without_a_chat_template_the_backends_are_not_compared(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    v3().fast.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.model.v3").write_bytes(v3().oracle.path.read_bytes())
    target = make_target(tmp_path, SOUND)
    target.__dict__["tokenizer"] = CheckpointTokenizer(folder)
    results = dataset_results(target)
    assert "has no chat template" in results["backends-agree"].not_checked
    assert found(results) == []


def outcome(target: Target, folder: Path) -> dict[str, Result]:
    return {check.case: check.run() for check in checks(target, settings_for(folder))}


def test_the_checks_of_one_session_share_one_pass(tmp_path: Path) -> None:
    target = make_target(tmp_path, [*SOUND, "{"], [SOUND[0]])
    first = outcome(target, tmp_path / "work")
    assert tuple(first) == CASES
    assert first == dataset_results(target)
    [file] = (tmp_path / "work").glob("dataset-*.json")
    stored = json.loads(file.read_text())
    stored["statistics"]["facts"]["rows"] = 99
    file.write_text(json.dumps(stored))
    assert facts(outcome(Target("recipe", target.path), tmp_path / "work"))["rows"] == 99


def test_rows_that_have_changed_are_read_again(tmp_path: Path) -> None:
    target = make_target(tmp_path, SOUND)
    assert facts(outcome(target, tmp_path / "work"))["rows"] == 3
    write_rows(tmp_path / "rows.jsonl", SOUND * 2)
    assert facts(outcome(Target("recipe", target.path), tmp_path / "work"))["rows"] == 6


def test_a_base_that_is_not_there_is_one_finding_of_every_check(tmp_path: Path) -> None:
    from pytest_mistral_lora.conformance.targets import RecipeTarget

    path = make_target(tmp_path, SOUND).path
    with pytest.raises(PinError):
        check_dataset(str(path))
    results = [check.run() for check in checks(RecipeTarget("recipe", path), settings_for(tmp_path / "work"))]
    assert [[one.rule for one in result.findings] for result in results] == [["ML208"]] * len(CASES)


def test_a_real_base_serves(tmp_path: Path) -> None:
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    base = write_tiny_base(tmp_path / "base", v3().oracle.path)
    pinned = {"path": "base", "weights_sha256": BaseFolder(base).weights_sha256}
    results = check_dataset(make_target(tmp_path, SOUND, base=pinned).path or "")
    assert found(results) == []
    assert facts(results)["rows"] == len(list(read_rows(tmp_path / "rows.jsonl")))


def places(findings: Sequence[Finding]) -> list[str]:
    return [Path(str(finding.place)).name for finding in findings]


def test_each_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for name in ("empty.jsonl", "blank.jsonl"):
        (tmp_path / name).write_text("\n \n" if name[0] == "b" else "")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    names = ["empty.jsonl", "rows.jsonl", "blank.jsonl", "folder.jsonl", "loop.jsonl", "missing.jsonl"]
    results = dataset_results(make_target(tmp_path, SOUND, data={"train": names}))
    assert places(found(results)) == [name for name in names if name != "rows.jsonl"]
    assert {finding.rule for finding in found(results)} == {"ML602"}
    assert facts(results)["rows"] == 3


@pytest.mark.parametrize("lines", [[], ["", " "], ["\ufeff"], ["{"], ["{", "[]"]])
def test_a_dataset_without_rows_passes_no_check(lines: list[str], tmp_path: Path) -> None:
    results = dataset_results(make_target(tmp_path, lines))
    failed = [case for case, result in results.items() if result.findings]
    assert failed == ["rows-are-valid"]
    assert [case for case in CASES if not results[case].not_checked] == failed


def test_a_dataset_whose_rows_are_all_dropped_has_none_left(tmp_path: Path) -> None:
    training = {"steps": 1, "max_length": 20, "truncation": "drop"}
    results = dataset_results(make_target(tmp_path, [said("a", " word" * 200)], training=training))
    assert [case for case, result in results.items() if result.findings] == ["split-has-rows", "nothing-is-cut"]
    not_checked = [case for case in CASES if results[case].not_checked]
    assert not_checked == ["no-duplicates", "no-leakage", "no-near-leakage", "statistics"]


@pytest.mark.parametrize(
    ("answered", "expected"), [(["call_2"], "'call_1'"), (["call_1", "call_1"], ""), (["abcdefgh1"], "'call_1'")]
)
def test_a_finding_on_a_converted_row_quotes_the_file(answered: list[str], expected: str, tmp_path: Path) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    results = [{"role": "tool", "tool_call_id": name, "content": "1"} for name in answered]
    asked = [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}, *results]
    row = {
        "messages": [*asked, {"role": "assistant", "content": "a"}],
        "tools": [{"type": "function", "function": function}],
    }
    foreign = {"messages": [{"role": "human", "content": "u"}, {"role": "gpt", "content": "a"}]}
    entry = {"path": "rows.jsonl", "format": "messages"}
    target = make_target(tmp_path, [*SOUND, foreign, row], data={"train": [entry]})
    judged = dataset_results(target)
    [finding] = found(judged, "ML601", "ML621")
    place = finding.place
    assert (finding.rule, place.record, place.part[1], finding.expected) == ("ML621", 5, 1 + len(answered), expected)
    assert repr(answered[-1]) in finding.found
    words = facts(judged)["rows of"]
    assert f"1 row ({tmp_path}/rows.jsonl:4)" in words
    assert f"mistral-lora import {tmp_path}/rows.jsonl --to" in words
