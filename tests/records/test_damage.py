"""Damaged and hostile files end in this project's errors and findings, within seconds: never in a traceback."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from damage import damaged_bytes, damaged_json
from manifests import adapter
from sample_transcripts import transcript
from suite_outcomes import suite_outcomes

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.hazards import MAX_CONTAINERS, json_hazard, refuse_damaged
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, convert
from pytest_mistral_lora.errors import InputError, MistralLoraError, TokenizerError
from pytest_mistral_lora.records import transcripts
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.records.manifest import build
from pytest_mistral_lora.records.notes import note_texts, write_notes
from pytest_mistral_lora.records.verify import verify

SECONDS = 20
ROW = parse_row({"messages": [{"role": "user", "content": "héllo ☃ 12"}, {"role": "assistant", "content": "b"}]})


@contextmanager
def only_our_errors(what: object) -> Iterator[None]:
    """Fail on a traceback of another kind, and on an answer that takes long."""
    start = time.process_time()
    try:
        with suppress(MistralLoraError):
            yield
    except BaseException as error:
        raise AssertionError(f"{what} ends in {type(error).__name__}: {error}") from error
    assert time.process_time() - start < SECONDS, what


def small_tekken() -> dict[str, Any]:
    """A real tekken.json with 500 of its tokens, which loads in milliseconds."""
    data: dict[str, Any] = json.loads(_small_text())
    return data


@functools.cache
def _small_text() -> str:
    data: dict[str, Any] = json.loads(shipped_tokenizer("tekken-240911").read_text(encoding="utf-8"))
    literals = [*converted_tokenizer("tekken-240718").oracle.control_tokens.values()][:20]
    specials = [{"rank": rank, "token_str": one, "is_control": True} for rank, one in enumerate(literals)]
    sizes = {"num_vocab_tokens": 700, "default_vocab_size": 600, "default_num_special_tokens": 100}
    config = {**data["config"], **sizes}
    return json.dumps({**data, "vocab": data["vocab"][:700], "special_tokens": specials, "config": config})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with every file of a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tekken.json").write_text(json.dumps(small_tekken()), encoding="utf-8")
    convert(Oracle(folder / "tekken.json")).save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 600, **ids}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a finished run: manifest, notes and a transcript."""
    folder = tmp_path_factory.mktemp("finished")
    parts = adapter()
    for name, text in note_texts(parts).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "transcripts").mkdir()
    (folder / "transcripts" / "row-0001.json").write_text(transcript().to_text(), encoding="utf-8")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_json(folder / "manifest.json", build(**{**parts, "files": listing(folder)}))
    return folder


def damaged_copy(healthy: Path, name: str, seed: int, to: Path) -> Path:
    """Copy a folder, with damage to one file."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(healthy, to)
    data = (healthy / name).read_bytes()
    damaged = damaged_json(json.loads(data), seed) if name.endswith(".json") else damaged_bytes(data, seed)
    (to / name).write_bytes(damaged)
    return to


def test_damaged_tekken_files(tmp_path: Path) -> None:
    healthy, path = small_tekken(), tmp_path / "tekken.json"
    for seed in range(40):
        path.write_bytes(damaged_json(healthy, seed))
        with only_our_errors(f"seed {seed}"):
            oracle = Oracle(path)
            oracle.encode(ROW)
            oracle.chat_template()


FILES = (
    *("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tekken.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_checkpoint_are_loaded_or_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    for seed in range(8):
        tokenizer = CheckpointTokenizer(damaged_copy(checkpoint, name, seed, tmp_path / "folder"))
        with only_our_errors(f"{name}, seed {seed}"):
            assert tokenizer.files.faults is not None
            assert tokenizer.fast("a text")["input_ids"] is not None
            tokenizer.template.encode(ROW)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_checkpoint_are_judged(name: str, checkpoint: Path, tmp_path: Path) -> None:
    for seed in range(8, 16):
        folder = damaged_copy(checkpoint, name, seed, tmp_path / "folder")
        with only_our_errors(f"{name}, seed {seed}"):
            for outcome in suite_outcomes([folder]):
                if outcome.subject not in ("tokenizer", "template"):
                    break


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("manifest.json", lambda folder: verify(AdapterFolder(folder), base=AdapterFolder(folder).located_base)),
        ("manifest.json", write_notes),
        ("manifest.json", lambda folder: list(suite_outcomes([folder]))),
        ("DECISION.md", write_notes),
        ("README.md", lambda folder: verify(AdapterFolder(folder), base=AdapterFolder(folder).located_base)),
        ("transcripts/row-0001.json", lambda folder: transcripts.load_folder(folder / "transcripts")),
    ],
    ids=("verify", "note", "check", "decision", "card", "transcript"),
)
def test_damaged_records(name: str, entry: Callable[[Path], object], finished: Path, tmp_path: Path) -> None:
    for seed in range(20):
        folder = damaged_copy(finished, name, seed, tmp_path / "folder")
        with only_our_errors(f"{name}, seed {seed}"):
            entry(folder)


def test_damaged_templates() -> None:
    fast = converted_tokenizer("spm-v3").fast
    for seed in range(15):
        template = ChatTemplate(fast, damaged_bytes(fast.chat_template.encode(), seed).decode("utf-8", "replace"))
        with only_our_errors(f"seed {seed}"):
            template.encode(ROW)
            template.applied(ROW)
            template.printed_unknowns([ROW])


HOSTILE_TEKKEN = {
    "special tokens without end": (("config", "default_num_special_tokens"), 10**9, "1000000000"),
    "a vocabulary without end": (("config", "default_vocab_size"), 10**12, "1000000000000"),
    "a vocabulary without bytes": (("config", "default_vocab_size"), 300, "300"),
    "repetitions of repetitions": (("config", "pattern"), "((a{999}){999}){999}", "997,002,999 times"),
    "a pattern that matches nothing": (("config", "pattern"), "x*", "cannot load it"),
    "no pattern": (("config", "pattern"), "(", "cannot load it"),
    "a rank twice": (("vocab", 400, "rank"), 399, "399"),
    "bytes twice": (("vocab", 400, "token_bytes"), "YQ==", "as in vocab[97]"),
    "bytes that are none": (("vocab", 400, "token_bytes"), "a$b", "'a$b'"),
    "a byte of another place": (("vocab", 65, "token_bytes"), "QQ=", "'QQ='"),
    "half a surrogate pair": (("special_tokens", 2, "token_str"), "\ud800", "a text that no other token has"),
    "a special token twice": (("special_tokens", 2, "token_str"), "<s>", "a text that no other token has"),
    "no token for the end": (("special_tokens", 2, "token_str"), "<end>", "cannot load it"),
    "a rank that is true": (("special_tokens", 1, "rank"), True, "True"),
    "an image without end": (("image", "max_image_size"), 10**30, "image.max_image_size"),
}


@pytest.mark.parametrize("name", HOSTILE_TEKKEN)
def test_a_hostile_tekken_file_is_refused_with_its_key(name: str, tmp_path: Path) -> None:
    keys, value, found = HOSTILE_TEKKEN[name]
    data = small_tekken()
    holder: Any = data
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (tmp_path / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TokenizerError) as error:
        Oracle(tmp_path / "tekken.json")
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [("[" * 100_000, "not valid JSON"), ("[" + "{}," * MAX_CONTAINERS + "{}]", "lists and objects"), ("7", "7")],
)
def test_json_that_fills_the_memory_is_refused(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(text, encoding="utf-8")
    with pytest.raises(TokenizerError, match=found):
        refuse_damaged(tmp_path / "tekken.json")


@pytest.mark.parametrize("name", ["tekken-240718", "derived-v15"])
def test_real_tekken_files_are_not_refused(name: str) -> None:
    refuse_damaged(converted_tokenizer(name).oracle.path)


@pytest.mark.parametrize("name", ["spm-v1", "spm-v3"])
def test_real_converted_tokenizers_have_no_hazard(name: str) -> None:
    assert json_hazard(json.loads(converted_tokenizer(name).fast.backend_tokenizer.to_str())) == ""


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": step}


def replaced(count: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    return {"type": "Sequence", "normalizers": [step] * count}


FIXED = {
    "strategy": {"Fixed": 4_000_000_000},
    "direction": "Right",
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}
HOSTILE_JSON = {
    "doubling": ({"normalizer": replaced(28)}, "268,435,456 times as long"),
    "padding": ({"padding": {**FIXED, "pad_to_multiple_of": None}}, "padding.strategy.Fixed is 4,000,000,000"),
    "multiples": (
        {"padding": {**FIXED, "strategy": "BatchLongest", "pad_to_multiple_of": 10**10}},
        "pad_to_multiple_of",
    ),
    "repetitions": (split("((a{9999}){9999})"), "99,980,001 times"),
    "backtracking": (split("((x*)*)*#"), ""),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_a_hostile_tokenizer_json_is_refused_before_it_is_loaded(name: str, checkpoint: Path, tmp_path: Path) -> None:
    changes, found = HOSTILE_JSON[name]
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(data | changes), encoding="utf-8")
    with only_our_errors(name):
        CheckpointTokenizer(folder).fast("a text")
    if found:
        with pytest.raises(TokenizerError) as error:
            _ = CheckpointTokenizer(folder).fast
        assert found in str(error.value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"completion_ids": [7.0, 2.0]}, ""),
        ({"logprobs": [0, -1], "margins": [1, 10**30]}, ""),
        ({"completion_ids": [7, -2]}, r"\$.completion_ids\[1\]: -2; expected at least 0"),
        ({"completion_ids": [7, 2**31]}, r"\$.completion_ids\[1\]: 2147483648; .* 2147483647"),
        ({"completion_ids": [7, "2"]}, r"\$.completion_ids\[1\]: \"2\"; expected integer"),
        ({"completion_ids": [7, True]}, r"\$.completion_ids\[1\]: true; expected integer"),
        ({"prompt_ids": [[1]]}, r"\$.prompt_ids\[0\]: \[1\]; expected integer"),
        ({"margins": [1, 10**400]}, r"\$.margins\[1\]"),
        ({"max_new_tokens": 10**9}, r"\$.max_new_tokens: 1000000000; expected at most 65536"),
    ],
)
def test_numbers_of_a_transcript(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    file = tmp_path / "row-0001.json"
    file.write_text(json.dumps({**json.loads(transcript().to_text()), **change}), encoding="utf-8")
    if not found:
        read = transcripts.load(file)
        assert {type(one) for one in read.completion_ids} == {int}
        assert {type(one) for one in (*read.logprobs, *read.margins)} == {float}
        return
    with pytest.raises(InputError, match=found):
        transcripts.load(file)


def test_an_id_that_the_model_lacks_is_named_with_its_place() -> None:
    one = transcript(completion_ids=(7, 600), runner_up_ids=(9, 7))
    one.require_ids_below(601)
    with pytest.raises(InputError, match=r"row-0001, completion_ids\[1\]: .* 600.*; expected .* 600"):
        one.require_ids_below(600)
