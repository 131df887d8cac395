"""The tokenizer of a checkpoint, as the oracle reads it and as transformers does."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from sampling import sampled

from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.tokenizer_file import oracle_file
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import TokenizerError

PLAIN = [
    {
        "messages": [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "End.  Next  sentence, a   b."},
            {"role": "assistant", "content": "Two  spaces,\ttabs\t\tand\n\n\nlines."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Write a loop."},
            {"role": "assistant", "content": "def f(n):\n    for k in range(n):\n        print(k)\n    return  None"},
            {"role": "user", "content": " k"},
            {"role": "assistant", "content": "Größe 你好 🙂 can't I'LL 12345"},
        ]
    },
]


def differing(oracle: Oracle, tokenizer: Any) -> list[int]:
    """The plain rows whose ids differ from the oracle's."""
    return [
        index
        for index, row in enumerate(PLAIN)
        if tokenizer.apply_chat_template(row["messages"], return_dict=False) != list(oracle.encode(row).input_ids)
    ]


@pytest.fixture(scope="module", params=sampled([*SHIPPED, "derived-v13"], ("spm-v1", "spm-v3", "derived-v13")))
def shipped(request: pytest.FixtureRequest) -> CheckpointTokenizer:
    return converted_tokenizer(request.param)


@pytest.fixture(scope="module")
def saved(shipped: CheckpointTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    shipped.fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def v3() -> CheckpointTokenizer:
    return converted_tokenizer("spm-v3")


@pytest.fixture
def v3_folder(v3: CheckpointTokenizer, tmp_path: Path) -> Path:
    v3.fast.save_pretrained(tmp_path)
    return tmp_path


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_a_file_is_its_own_oracle_file(tmp_path: Path) -> None:
    file = folder_with(tmp_path, "any.model.v3") / "any.model.v3"
    assert oracle_file(file) == file


def test_tekken_is_found_before_sentencepiece(tmp_path: Path) -> None:
    assert oracle_file(folder_with(tmp_path, "tokenizer.model.v3", "tekken.json")) == tmp_path / "tekken.json"


@pytest.mark.parametrize(
    ("older", "newer"), [("v1", "v2"), ("v3", "v7"), ("v7", "v7m1"), ("v7m1", "v11"), ("v3m9", "v7")]
)
def test_the_newest_version_is_found(tmp_path: Path, older: str, newer: str) -> None:
    folder = folder_with(tmp_path, f"tokenizer.model.{newer}", f"tokenizer.model.{older}", "tokenizer.model")
    assert oracle_file(folder) == folder / f"tokenizer.model.{newer}"


@pytest.mark.parametrize("names", [(), ("tokenizer.model",), ("tokenizer.json", "tokenizer_config.json")])
def test_nothing_is_found_where_no_file_says_its_version(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert oracle_file(folder_with(tmp_path, *names)) is None


def test_a_folder_does_not_count_as_a_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").mkdir()
    (tmp_path / "tokenizer.model.v3").mkdir()
    assert oracle_file(tmp_path) is None


def test_every_shipped_tokenizer_converts_to_the_oracles_ids(shipped: CheckpointTokenizer) -> None:
    assert differing(shipped.oracle, shipped.fast) == []


def test_every_shipped_tokenizer_keeps_its_vocabulary(shipped: CheckpointTokenizer) -> None:
    oracle, fast = shipped.oracle, shipped.fast
    assert len(fast) == oracle.vocab_size
    assert (fast.bos_token_id, fast.eos_token_id) == (oracle.bos_id, oracle.eos_id)
    assert {token: fast.convert_ids_to_tokens(token) for token in oracle.control_tokens} == oracle.control_tokens


def test_a_saved_tokenizer_loads_back_with_the_same_ids(shipped: CheckpointTokenizer, saved: Path) -> None:
    again = CheckpointTokenizer(saved).fast
    assert again.chat_template == shipped.fast.chat_template
    assert differing(shipped.oracle, again) == []


def test_a_checkpoint_folder_with_both_forms_gives_both(
    shipped: CheckpointTokenizer, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    name = "tekken.json" if shipped.oracle.kind == "tekken" else f"tokenizer.model{shipped.path.suffix}"
    shutil.copy(shipped.path, folder / name)
    both = CheckpointTokenizer(folder)
    assert oracle_file(folder) == folder / name
    assert differing(shipped.oracle, both.fast) == []


def load_legacy(file: Path) -> Any:
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(file, Path(folder) / "tokenizer.model")
        loader = getattr(transformers, "TokenizersBackend", transformers.LlamaTokenizerFast)
        return loader.from_pretrained(folder, legacy=True, from_slow=True)


def test_mutant_a_tokenizer_loaded_as_legacy_differs_on_every_row(v3: CheckpointTokenizer) -> None:
    legacy = load_legacy(v3.path)
    legacy.chat_template = v3.oracle.chat_template()
    assert differing(v3.oracle, legacy) == [0, 1, 2]


def test_mutant_merges_in_id_order_differ_only_where_spaces_run(v3: CheckpointTokenizer, v3_folder: Path) -> None:
    file = v3_folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data["model"]
    model["merges"].sort(key=lambda pair: model["vocab"]["".join(pair)])
    file.write_text(json.dumps(data), encoding="utf-8")
    assert differing(v3.oracle, CheckpointTokenizer(v3_folder).fast) == [1, 2]


@pytest.mark.parametrize("legacy", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_folder_that_transformers_itself_converts_is_judged_as_it_converts_it(legacy: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("tokenizer.model", "tokenizer.model.v3"):
        shutil.copy(shipped_tokenizer("spm-v3"), tmp_path / name)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a  b", "<s>[INST] a[/INST]"):
        expected = loaded(text, add_special_tokens=False)["input_ids"]
        assert CheckpointTokenizer(tmp_path).fast(text, add_special_tokens=False)["input_ids"] == expected
    assert CheckpointTokenizer(tmp_path).fast.chat_template is None


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file or folder") as caught:
        CheckpointTokenizer(tmp_path / "absent")
    assert str(caught.value.place) == str(tmp_path / "absent")


@pytest.mark.parametrize("names", [(), ("tokenizer.model",)])
def test_a_folder_without_a_mistral_tokenizer_is_an_error(tmp_path: Path, names: tuple[str, ...]) -> None:
    empty = CheckpointTokenizer(folder_with(tmp_path, *names))
    for attribute in ("oracle", "fast"):
        with pytest.raises(TokenizerError, match=r"no Mistral tokenizer file.*tekken\.json") as caught:
            getattr(empty, attribute)
        assert str(caught.value.place) == str(tmp_path)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3", "notes.txt"])
@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"{}"])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"cannot load it|not valid JSON|an object of 0") as caught:
        _ = CheckpointTokenizer(file).oracle
    assert str(caught.value.place).partition(",")[0] == str(file)


@pytest.mark.parametrize(("name", "as_name"), [("tekken-240911", "tekken.json"), ("spm-v3", "tokenizer.model.v3")])
def test_a_truncated_tokenizer_file_is_an_error(tmp_path: Path, name: str, as_name: str) -> None:
    data = shipped_tokenizer(name).read_bytes()
    (tmp_path / as_name).write_bytes(data[: len(data) // 2])
    with pytest.raises(TokenizerError, match=r"cannot load it|not valid JSON"):
        _ = CheckpointTokenizer(tmp_path).fast


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"'])
def test_a_damaged_tokenizer_json_is_an_error(v3_folder: Path, content: str) -> None:
    (v3_folder / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="transformers cannot load it") as caught:
        _ = (tokenizer := CheckpointTokenizer(v3_folder)).fast
    assert str(caught.value.place) == str(v3_folder)
    # it is loaded once: each attempt takes long, and a library that panics prints its stack
    with pytest.raises(TokenizerError) as again:
        _ = tokenizer.fast
    assert again.value is caught.value
