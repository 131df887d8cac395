"""Which files of a folder load, and what of a folder can be judged without Mistral's own file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cut_sentencepiece import cut_v3
from transformers import AutoTokenizer

from pytest_mistral_lora.assertions import assert_labels_exact, assert_no_control_token_injection
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint import tokenizer_folder
from pytest_mistral_lora.checkpoint.tokenizer_folder import TokenizerFiles, loaded_place, template_places
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.checkpoint.weights import read_header
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.tokenizer.checks import checks as tokenizer_checks
from pytest_mistral_lora.errors import InputError, TokenizerError

SETTINGS = Settings(1, None, "cpu", True, (), False, Path())
COMMIT = "3f9c2e1b7a6d4c5080912efab3467dc15e8f20a9"
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    CheckpointTokenizer(cut_v3()).fast.save_pretrained(folder)
    shutil.copy(cut_v3(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def results(path: Path, oracle: str | None = None) -> dict[str, Result]:
    target = Target("target", path, oracle_name=oracle)
    return {check.case: check.run() for check in tokenizer_checks(target, SETTINGS)}


def rules(path: Path, oracle: str | None = None) -> set[str]:
    return {finding.rule for result in results(path, oracle).values() for finding in result.findings}


def snapshot(folder: Path, home: Path) -> Path:
    """Lay a folder out as the Hub's cache does: names are links to blobs, and blobs are named by their hash."""
    repository = home / "models--owner--name"
    place = repository / "snapshots" / COMMIT
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in folder.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, repository / "blobs" / blob)
        (place / file.name).symlink_to(f"../../blobs/{blob}")
    return place


def test_the_files_check_says_what_loads(folder: Path) -> None:
    facts = dict(results(folder)["file"].facts)
    assert facts["oracle_file"] == cut_v3().name
    assert facts["tokenizer_file"] == "tokenizer.json"
    assert facts["template_place"] == "chat_template.jinja"
    assert facts["tokenizer_class"] == json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert facts["files"]["tokenizer.json"] == digest
    assert "revision" not in facts
    json.dumps(facts)


def test_a_snapshot_of_the_hubs_cache_is_sound_and_says_its_revision(folder: Path, tmp_path: Path) -> None:
    place = snapshot(folder, tmp_path / "hub")
    found = results(place)
    assert [finding.text() for result in found.values() for finding in result.findings] == []
    facts = dict(found["file"].facts)
    assert (facts["repository"], facts["revision"]) == ("owner/name", COMMIT)


def test_a_single_file_is_judged_as_a_tokenizer_without_a_folder() -> None:
    found = results(shipped_tokenizer("spm-v1"))
    assert [finding.text() for result in found.values() for finding in result.findings] == []
    assert "declarations-agree" not in found
    assert {"control-tokens", "text-ids", "template-bounds"} <= found.keys()


def test_a_file_that_mistral_common_ships_is_not_parsed_for_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    parse = tokenizer_folder.loads_strict
    monkeypatch.setattr(tokenizer_folder, "loads_strict", lambda text: parsed.append(len(text)) or parse(text))
    shipped = shipped_tokenizer("tekken-240911")
    assert TokenizerFiles(shipped).faults == {}
    assert parsed == []
    # the same bytes anywhere else are a file like any other
    copied = tmp_path / "tekken.json"
    content = shipped.read_bytes().replace(b'"config"', b'"vocab"', 1)
    copied.write_bytes(content)
    assert "appears twice" in TokenizerFiles(copied).faults["tekken.json"].found
    assert parsed == [len(content.decode())]


def test_a_folder_of_one_file_passes_no_check_of_others(tmp_path: Path) -> None:
    shutil.copy(shipped_tokenizer("spm-v1"), tmp_path / "tokenizer.model.v1")
    found = results(tmp_path)
    unchecked = {case for case, result in found.items() if result.not_checked}
    files = {"one-revision", "declarations-agree", "class", "nothing-cut-or-padded", "model-config", "has-template"}
    files |= {"decoding", "configurations"}
    assert unchecked == files | {case for case in found if case.startswith("template-")}
    assert [finding.text() for result in found.values() for finding in result.findings] == []


def test_a_folder_without_a_mistral_file_is_judged_in_what_needs_none(folder: Path) -> None:
    (folder / cut_v3().name).unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(pad_token="</s>", chat_template="{{ messages[0].content }}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    config = {"model_type": "mistral", "vocab_size": Oracle(cut_v3()).vocab_size - 1, "eos_token_id": 1100}
    (folder / "config.json").write_text(json.dumps(config))
    found = results(folder, "none")
    unchecked = {case for case, result in found.items() if result.not_checked}
    assert unchecked == {"oracle", "control-tokens", "bos-eos-unk", "vocabulary", "text-ids", "one-revision"}
    assert {"ML204", "ML215", "ML217", "ML220"} == {f.rule for result in found.values() for f in result.findings}


def test_a_derivatives_chat_markup_is_no_finding_where_there_is_no_oracle(folder: Path) -> None:
    (folder / cut_v3().name).unlink()
    prompt = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}" + prompt
    (folder / "chat_template.jinja").write_text(template)
    assert rules(folder, "none") == set()
    (folder / "chat_template.jinja").write_text(template.replace("</s>", ""))
    assert rules(folder, "none") == {"ML226"}


def test_a_derivative_that_closes_answers_with_a_token_of_its_own_is_sound(folder: Path) -> None:
    (folder / cut_v3().name).unlink()
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    loaded.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    loaded.save_pretrained(folder)
    assert rules(folder, "none") == set()
    assert "ML229" in rules(folder)  # nobody has declared that it is no Mistral layout


def test_a_folder_without_a_template_is_not_checked_for_one(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    found = results(folder)
    assert "no chat template" in found["template-bounds"].not_checked
    assert [f.rule for result in found.values() for f in result.findings] == ["ML233"]


def test_what_must_not_be_opened_is_refused_before_it_is(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "special_tokens_map.json").symlink_to(secret)
    for attribute in ("fast", "oracle"):
        with pytest.raises(TokenizerError, match="links out of the folder"):
            getattr(CheckpointTokenizer(folder), attribute)
    assert "special_tokens_map.json" not in TokenizerFiles(folder).digests


def test_a_link_within_the_folder_is_fine(folder: Path) -> None:
    (folder / "tokenizer.model").symlink_to(cut_v3().name)
    assert rules(folder) == set()


def test_templates_are_found_in_every_place(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    (tmp_path / "chat_template.jinja").write_text("d\n")
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "u"}, {"name": "broken"}, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "d"}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": {"default": "p"}}))
    key = "tokenizer_config.json, chat_template"
    found = template_places(TokenizerFiles(tmp_path)).items()
    assert {name: {str(place): text for place, text in texts.items()} for name, texts in found} == {
        "default": {
            "chat_template.jinja": "d",
            key: "d",
            "chat_template.json, chat_template": "d",
            "processor_config.json, chat_template": "p",
        },
        "tool_use": {"additional_chat_templates/tool_use.jinja": "t", key: "u"},
    }
    assert str(loaded_place(TokenizerFiles(tmp_path))) == "chat_template.jinja"


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": "many", "eos_token_id": {"a": 1}, "pad_token_id": [[2]], "text_config": 3},
        {"eos_token_id": [], "pad_token_id": -1},
        pytest.param({"eos_token_id": [2, 99999]}, marks=pytest.mark.slow),
    ],
)
def test_a_configuration_of_any_types_gives_findings_and_no_traceback(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", **config}))
    assert rules(folder) & {"ML201", "ML217"}  # transformers 5 refuses some of them itself


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}more",
        b"\x04\x00\x00\x00\x00\x00\x00\x00[[]]",
        b"\x02\x00\x00\x00\x00\x00\x00\x00\xff\xff",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert str(caught.value.place) == str(file)


def test_ids_are_taken_as_a_list_a_batch_encoding_a_tensor_or_an_array() -> None:
    checkpoint = CheckpointTokenizer(shipped_tokenizer("spm-v1"))
    labels = checkpoint.oracle.encode(ROW).labels
    for options in ({"return_dict": False}, {"return_dict": True}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        ids = checkpoint.fast.apply_chat_template(ROW["messages"], **options)
        assert_no_control_token_injection(ROW, ids, checkpoint)
        assert_labels_exact(ROW, ids, labels, checkpoint)
    ids = checkpoint.fast.apply_chat_template([ROW["messages"], ROW["messages"]], return_dict=True)
    for two in (ids, ids["input_ids"], ["input_ids", "attention_mask"], "1 2"):
        with pytest.raises(InputError, match="not the ids of one row"):
            assert_no_control_token_injection(ROW, two, checkpoint)
