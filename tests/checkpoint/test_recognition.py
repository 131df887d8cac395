"""Folders without Mistral's own tokenizer file, as transformers and trainers save them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from transformers import AutoTokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.recognition import (
    StoredVocabulary,
    accept_vocabulary,
    recognise_vocabulary,
    shipped_oracle,
)
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
from pytest_mistral_lora.conformance import template
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.checks import checks as tokenizer_checks
from pytest_mistral_lora.errors import NoOracleError, TokenizerError

SETTINGS = Settings(2, None, "cpu", True, (), False, Path())
CASES = ("single", "system-multi-turn", "newlines", "tool-round-trip")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a shipped tokenizer as transformers does, once a module."""
    home = tmp_path_factory.mktemp("saved")

    def folder(name: str) -> Path:
        if not (home / name).exists():
            converted_tokenizer(name).fast.save_pretrained(home / name)
        return home / name

    return folder


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved("spm-v3"), tmp_path / "checkpoint"))


def results(path: Path, oracle: str | None = None, *, only: str = "") -> dict[str, Result]:
    target = Target("checkpoint", path, oracle_name=oracle)
    checks = [*tokenizer_checks(target, SETTINGS)]
    checks += [one for one in template.checks(target, SETTINGS) if one.case in CASES]
    return {check.case: check.run() for check in checks if only in ("", check.case)}


def rules(path: Path, *, only: str = "") -> set[str]:
    found = results(path, only=only).values()
    return {finding.rule for result in found for finding in result.findings if finding.severity == "error"}


def edit(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def edit_template(folder: Path, old: str, new: str) -> None:
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "spm-v1",
        pytest.param("spm-v2", marks=pytest.mark.slow),
        "spm-v3",
        pytest.param("spm-v7", marks=pytest.mark.slow),
        "spm-v7m1",
        pytest.param("tekken-240911", marks=pytest.mark.slow),
    ],
)
def test_a_folder_as_transformers_saves_it_is_recognised(saved: Callable[[str], Path], name: str) -> None:
    found = CheckpointTokenizer(saved(name)).recognition
    assert (found.name, found.is_exact) == (name, True), found.text


@pytest.mark.parametrize(
    "name",
    [pytest.param("spm-v1", marks=pytest.mark.slow), "spm-v7m1", pytest.param("tekken-240718", marks=pytest.mark.slow)],
)
def test_a_healthy_folder_is_judged_in_full_and_passes(saved: Callable[[str], Path], name: str) -> None:
    found = results(saved(name))
    assert [finding.text() for result in found.values() for finding in result.findings] == []
    reasons = {result.not_checked for result in found.values()} - {""}
    known = ("cannot encode this case", "there is no config.json", "the commits of the files")
    assert [reason for reason in reasons if not any(one in reason for one in known)] == []
    assert dict(found["oracle"].facts)["oracle of"].startswith(f"recognised as {name}: ")


@pytest.mark.parametrize("name", [pytest.param("spm-v2", marks=pytest.mark.slow), "spm-v7m1"])
def test_a_bare_sentencepiece_file_is_recognised(tmp_path: Path, name: str) -> None:
    shutil.copy(shipped_tokenizer(name), tmp_path / "tokenizer.model")
    found = CheckpointTokenizer(tmp_path).recognition
    assert name in (found.name, *found.alike)
    assert found.is_exact
    assert rules(tmp_path) == set()


def test_a_bare_file_with_other_scores_is_reported(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(shipped_tokenizer("spm-v3").read_bytes())
    model.pieces[5000].score, model.pieces[5001].score = model.pieces[5001].score, model.pieces[5000].score
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (found,) = results(tmp_path, only="one-tokenizer")["one-tokenizer"].findings
    assert found.rule == "ML211"
    assert "in 2 places, the first is 5000" in found.found


def no_eos(folder: Path) -> None:
    edit_template(folder, "{{- eos_token }}", "")


def markers_swapped_in_the_template(folder: Path) -> None:
    edit_template(folder, "[/INST]", "[PREFIX]")


def user_text_trimmed(folder: Path) -> None:
    user = "content=message['content'], context_name='user message content'"
    edit_template(folder, user, user.replace("['content']", "['content'] | trim"))


def markers_swapped(folder: Path) -> None:
    def change(data: Any) -> None:
        ids = {token["content"]: token for token in data["added_tokens"]}
        ids["[INST]"]["id"], ids["[/INST]"]["id"] = ids["[/INST]"]["id"], ids["[INST]"]["id"]
        vocab = data["model"]["vocab"]
        vocab["[INST]"], vocab["[/INST]"] = vocab["[/INST]"], vocab["[INST]"]

    edit(folder / "tokenizer.json", change)


def a_normalizer(folder: Path) -> None:
    def change(data: Any) -> None:
        own = [data["normalizer"]] if data["normalizer"] else []  # transformers 4 saves none
        data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *own]}

    edit(folder / "tokenizer.json", change)


def other_pre_tokenizer(folder: Path) -> None:
    def change(data: Any) -> None:
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]}

    edit(folder / "tokenizer.json", change)


def tokens_swapped(folder: Path) -> None:
    def change(data: Any) -> None:
        vocab = data["model"]["vocab"]
        one, other = (token for token, number in vocab.items() if number in (9000, 9001))
        vocab[one], vocab[other] = vocab[other], vocab[one]

    edit(folder / "tokenizer.json", change)


def a_third_of_the_ids_moved(folder: Path) -> None:
    def change(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["vocab"] = {
            token: number if number < 20_000 else 20_000 + (number - 19_999) % (len(vocab) - 20_000)
            for token, number in vocab.items()
        }

    edit(folder / "tokenizer.json", change)


def merges_reversed(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda data: data["model"]["merges"].reverse())


def merges_cut(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda data: data["model"]["merges"].__delitem__(slice(30_000, None)))


def another_word_in_the_place_of_a_control_token(folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        lambda data: next(one for one in data["added_tokens"] if one["content"] == "[TOOL_CALLS]").update(
            content="<t>"
        ),
    )


def cut_at_512(folder: Path) -> None:
    cut = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", lambda data: data.update(truncation=cut))


@pytest.mark.parametrize(
    ("change", "case", "rule"),
    [
        (no_eos, "template-bos-eos", "ML226"),
        (markers_swapped_in_the_template, "single", "ML004"),
        pytest.param(user_text_trimmed, "newlines", "ML004", marks=pytest.mark.slow),
        (markers_swapped, "control-tokens", "ML202"),
        (a_normalizer, "text-ids", "ML205"),
        pytest.param(other_pre_tokenizer, "text-ids", "ML205", marks=pytest.mark.slow),
        (tokens_swapped, "vocabulary", "ML214"),
        pytest.param(a_third_of_the_ids_moved, "vocabulary", "ML214", marks=pytest.mark.slow),
        pytest.param(merges_reversed, "text-ids", "ML205", marks=pytest.mark.slow),
        pytest.param(merges_cut, "text-ids", "ML205", marks=pytest.mark.slow),
        pytest.param(another_word_in_the_place_of_a_control_token, "control-tokens", "ML202", marks=pytest.mark.slow),
        (cut_at_512, "nothing-cut-or-padded", "ML231"),
    ],
)
def test_a_broken_folder_is_judged_by_the_tokenizer_it_was_made_from(
    folder: Path, change: Callable[[Path], None], case: str, rule: str
) -> None:
    change(folder)
    assert CheckpointTokenizer(folder).recognition.name == "spm-v3"
    assert rule in rules(folder, only=case)


def test_a_pad_token_of_a_trainer_is_an_addition(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.add_special_tokens({"pad_token": "<pad>"})
    loaded.save_pretrained(folder)
    found = CheckpointTokenizer(folder).recognition
    assert (found.name, found.added, found.is_exact) == ("spm-v3", 1, False)
    assert "ML202" in rules(folder, only="control-tokens")


def test_an_unknown_vocabulary_is_one_finding_and_everything_else_is_not_checked(folder: Path) -> None:
    def change(data: Any) -> None:
        vocab = data["model"]["vocab"]
        data["model"]["vocab"] = {t: n if n < 1000 else 1000 + 7 * (n - 1000) % 31_768 for t, n in vocab.items()}

    edit(folder / "tokenizer.json", change)
    found = results(folder)
    assert [finding.rule for finding in found["oracle"].findings] == ["ML229"]
    assert {name for name, result in found.items() if result.findings} == {"oracle"}
    assert "its vocabulary is not that of" in found["control-tokens"].not_checked


def test_a_later_version_of_the_same_vocabulary_is_not_taken_for_an_older_one() -> None:
    vocabulary = StoredVocabulary("tekken", dict(enumerate(shipped_oracle("tekken-240718").vocabulary)), "")
    found = recognise_vocabulary(vocabulary, "{{ bos_token }}[SYSTEM_PROMPT]{{ messages[0].content }}")
    assert found.oracle is None
    assert "the chat template writes [SYSTEM_PROMPT]" in found.reason
    declared = accept_vocabulary(str(shipped_tokenizer("tekken-240718")), vocabulary, None)
    assert declared.oracle is not None
    assert declared.oracle.version == "v3"


def test_none_declares_that_there_is_no_oracle(folder: Path) -> None:
    found = results(folder, "none")
    assert found["oracle"].not_checked == "the oracle is declared as none"
    assert [finding.text() for result in found.values() for finding in result.findings] == []
    assert not found["template-drops-nothing"].not_checked
    with pytest.raises(NoOracleError, match="declared as none"):
        _ = CheckpointTokenizer(folder, "none").oracle


def test_a_folder_whose_ids_differ_is_not_trained_by_the_oracle(folder: Path) -> None:
    CheckpointTokenizer(folder).require_same_ids()
    a_normalizer(folder)
    with pytest.raises(TokenizerError, match=r"32,768 of 32,768 ids are the same, but .* gets the ids"):
        CheckpointTokenizer(folder).require_same_ids()


def test_a_derivative_with_tokens_of_its_own_keeps_its_template(folder: Path) -> None:
    official = training_template(folder)
    assert "[INST]" in official
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    loaded.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}{{ message['content'] }}{% else %}{{ message['content'] }}{% endif %}"
        "<|im_end|>\n{% endfor %}"
    )
    loaded.save_pretrained(folder)
    assert "<|im_start|>" in training_template(folder)
