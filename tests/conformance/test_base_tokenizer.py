"""Tokenizer and template beside an adapter, against the base's; and the base's own pad and EOS."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.conformance.adapter.checks import base_cases
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

TOKENIZER, TEMPLATE, BASE = "tokenizer-of-base", "template-of-base", "base-tokenizer"
CONFIG = {"vocab_size": 32768, "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}


WORDS = 3000
"""Ids of the small vocabulary: each look at the whole one takes a second."""
of_whole = pytest.mark.parametrize("base", ["whole"], indirect=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of v3 as transformers saves it, beside the configuration of its model."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def small(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its first words alone, for what needs no oracle: no file of Mistral has this vocabulary."""
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("small") / "base"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = {word: number for word, number in model["vocab"].items() if number < WORDS}
    merges = [pair for pair in model["merges"] if vocab.keys() >= {*pair, "".join(pair)}]
    edit(folder / "tokenizer.json", model={**model, "vocab": vocab, "merges": merges})
    edit(folder / "config.json", vocab_size=WORDS)
    return folder


@pytest.fixture
def base(whole: Path, small: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    is_whole = getattr(request, "param", "small") == "whole"
    return Path(shutil.copytree(whole if is_whole else small, tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """The folder of an adapter with the tokenizer that a trainer saved beside it."""
    folder = Path(shutil.copytree(base, tmp_path / "lora"))
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    return folder


def findings(adapter: Path, base: Path, *names: str) -> list[Finding]:
    """Return the findings of these checks, by default of those of the adapter's own files."""
    cases = base_cases(AdapterFolder(adapter, BaseFolder(base)))
    return [finding for name in names or (TOKENIZER, TEMPLATE) for finding in cases[name]().findings]


def edit(file: Path, **values: Any) -> None:
    data = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


@of_whole
def test_settings_of_a_trainer_are_no_fault(adapter: Path, base: Path) -> None:
    settings = {"padding_side": "left", "model_max_length": 2048, "pad_token": "[control_12]"}
    edit(adapter / "tokenizer_config.json", **settings, truncation_side="left")
    # trainers that mask by the template put blocks into it
    template = training_template(shipped_tokenizer("spm-v3"))
    assert "generation" in template
    (adapter / "chat_template.jinja").write_text(template)
    assert findings(adapter, base, TOKENIZER, TEMPLATE, BASE) == []


def test_the_template_may_be_in_the_configuration(adapter: Path, base: Path) -> None:
    file = adapter / "chat_template.jinja"
    edit(adapter / "tokenizer_config.json", chat_template=file.read_text())
    file.unlink()
    assert findings(adapter, base) == []


@of_whole
def test_a_base_with_mistral_s_file_alone_has_the_same_ids(adapter: Path, base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    (base / "chat_template.jinja").unlink()
    shutil.copy(shipped_tokenizer("spm-v3"), base / "tokenizer.model.v3")
    assert findings(adapter, base) == []
    # the base has no template: that of the adapter is held to mistral-common, but for the named deviations
    file = adapter / "chat_template.jinja"
    file.write_text("{# mine #}" + file.read_text())
    assert findings(adapter, base, TEMPLATE) == []
    file.write_text(file.read_text().replace("eos_token", "''"))
    [finding] = findings(adapter, base, TEMPLATE)
    assert (finding.rule, str(finding.place)) == ("ML442", str(file))
    assert json.loads(finding.row)["messages"]


BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}


def with_bos(folder: Path) -> dict[str, Any]:
    """Return the post-processor of a folder's tokenizer, with BOS in front of each text."""
    processor = json.loads((folder / "tokenizer.json").read_text())["post_processor"]
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {**processor, "single": [BOS, *processor["single"]], "special_tokens": tokens}


def test_control_tokens_around_a_text_are_those_of_a_base_that_has_written_them(adapter: Path, base: Path) -> None:
    processor, written = json.loads((adapter / "tokenizer.json").read_text())["post_processor"], with_bos(adapter)
    edit(adapter / "tokenizer.json", post_processor=written)
    [finding] = findings(adapter, base)
    assert (finding.rule, finding.found) == ("ML440", "the text 'a' becomes <s> ▁a")
    edit(base / "tokenizer.json", post_processor=written)
    assert findings(adapter, base) == []
    edit(adapter / "tokenizer.json", post_processor=processor)
    assert [finding.found for finding in findings(adapter, base)] == ["the text 'a' becomes ▁a"]


@pytest.mark.slow
@of_whole
def test_a_base_with_mistral_s_file_alone_says_nothing_about_a_text_without_a_conversation(
    adapter: Path, base: Path
) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    shutil.copy(shipped_tokenizer("spm-v3"), base / "tokenizer.model.v3")
    edit(adapter / "tokenizer.json", post_processor=with_bos(adapter))
    assert findings(adapter, base) == []


def test_files_that_are_missing_are_no_fault(adapter: Path, base: Path) -> None:
    for file in adapter.iterdir():
        file.unlink()
    results = {name: judge() for name, judge in base_cases(AdapterFolder(adapter, BaseFolder(base))).items()}
    assert not any(result.findings for result in results.values())
    assert {name for name, result in results.items() if result.not_checked} == {"tokenizer-of-base", "template-of-base"}


def test_a_pad_token_with_a_row_of_its_own_is_no_fault(adapter: Path, base: Path) -> None:
    new = type(converted_tokenizer("spm-v3").fast).from_pretrained(adapter)
    new.add_special_tokens({"pad_token": "<my-pad>"})
    new.save_pretrained(adapter)
    # without a row, the model fails on it
    assert [finding.rule for finding in findings(adapter, base)] == ["ML440"]
    edit(base / "config.json", vocab_size=WORDS + 64)
    assert findings(adapter, base) == []


@pytest.mark.parametrize(
    ("file", "change", "rule", "named"),
    [
        ("tokenizer_config.json", {"eos_token": "[INST]"}, "ML441", "eos_token is '[INST]'"),
        ("tokenizer_config.json", {"add_eos_token": True}, "ML238", "add_eos_token is true"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "ML440", "gets other ids"),
    ],
)
def test_a_changed_tokenizer_is_found(
    adapter: Path, base: Path, file: str, change: dict[str, Any], rule: str, named: str
) -> None:
    edit(adapter / file, **change)
    found = findings(adapter, base)
    assert {finding.rule for finding in found if finding.severity == "error"} == ({rule} if rule else set())
    assert all(named in found[0].found for _ in found)


@of_whole
@pytest.mark.parametrize(
    ("shipped", "name", "rules"),
    [
        ("spm-v7", "tokenizer.model.v7", ["ML440"]),
        ("spm-v3", "tokenizer.model.v3", []),
    ],
)
def test_a_mistral_file_that_the_base_does_not_have_is_the_base_s_tokenizer(
    shipped: str, name: str, rules: list[str], adapter: Path, base: Path
) -> None:
    # the base is recognised by its vocabulary, and tokenizer.json is the same in both folders
    shutil.copy(shipped_tokenizer(shipped), adapter / name)
    found = findings(adapter, base)
    assert [finding.rule for finding in found] == rules
    assert all(str(finding.place) == str(adapter / name) for finding in found)


@of_whole
@pytest.mark.parametrize(
    ("file", "change", "rules"),
    [
        ("tokenizer_config.json", {"pad_token": "</s>"}, {"ML204"}),
        pytest.param("config.json", {"pad_token_id": 2}, {"ML204"}, marks=pytest.mark.slow),
        pytest.param("generation_config.json", {"pad_token_id": 2}, {"ML204"}, marks=pytest.mark.slow),
        ("generation_config.json", {"eos_token_id": [2, 5]}, {"ML217"}),
    ],
)
def test_the_base_s_own_pad_and_eos_are_judged(
    adapter: Path, base: Path, file: str, change: dict[str, Any], rules: set[str]
) -> None:
    edit(base / file, **change)
    assert {finding.rule for finding in findings(adapter, base, BASE)} == rules
