"""Every assertion takes a path: of nothing, of something else, or of a file that cannot be read, and says so alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from peft_adapters import save_adapter
from safetensors.torch import save_file
from small_mistral import write_small_mistral

from pytest_mistral_lora.assertions import (
    NotCheckedWarning,
    assert_adapter_sound,
    assert_encoded_rows_sound,
    assert_labels_exact,
    assert_manifest_valid,
    assert_no_control_token_injection,
    assert_rows_sound,
    assert_served_as_trained,
    assert_template_faithful,
    assert_transcript_matches,
)
from pytest_mistral_lora.errors import InputError, PinError

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
Assertion = Callable[[Any], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that answers at random, and an adapter that PEFT wrote for it, trained by hand."""
    folder = tmp_path_factory.mktemp("made")
    save_adapter(write_small_mistral(folder / "base"), folder / "adapter")
    return folder


@pytest.fixture
def assertions(made: Path) -> dict[str, Assertion]:
    """Each assertion, as a function of one of its paths; the others are sound."""
    oracle = converted_tokenizer("spm-v3")
    encoded = oracle.oracle.encode(ROW)
    ids, labels, adapter = list(encoded.input_ids), list(encoded.labels or ()), made / "adapter"
    return {
        "template": lambda path: assert_template_faithful(ROW, path),
        "labels": lambda path: assert_labels_exact(ROW, ids, labels, path),
        "injection": lambda path: assert_no_control_token_injection(ROW, ids, path),
        "served": lambda path: assert_served_as_trained("llamacpp=http://127.0.0.1:9", ROW, path),
        "rows": lambda path: assert_rows_sound(path, oracle),
        "encoded": lambda path: assert_encoded_rows_sound(path, oracle),
        "manifest": assert_manifest_valid,
        "adapter": assert_adapter_sound,
        "base": lambda path: assert_adapter_sound(adapter, path),
        "transcribed adapter": lambda path: assert_transcript_matches(path, adapter),
        "transcript": lambda path: assert_transcript_matches(adapter, path),
        "transcribed base": lambda path: assert_transcript_matches(adapter, adapter, path),
    }


FOLDERS = {"adapter", "base", "transcribed adapter", "transcribed base"}


def _refusals(assertions: dict[str, Assertion], path: Any) -> dict[str, str]:
    """The error of each assertion for a path, which has to be one of ours that names it."""
    errors = {}
    for name, judge in assertions.items():
        with pytest.raises((InputError, AssertionError)) as caught:
            judge(path)
        errors[name] = str(caught.value)
        assert str(path).split("\0")[0] in errors[name], name
    return errors


def test_nothing_at_a_path_is_one_error(assertions: dict[str, Assertion], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    nothing = (tmp_path / "missing", tmp_path / "file" / "below", tmp_path / "loop", Path(f"{tmp_path}/a\0b"))
    for path in nothing:
        errors = _refusals(assertions, path)
        assert [name for name, text in errors.items() if "no such file or folder; expected" not in text] == []
    for name, text in _refusals(assertions, tmp_path / ("x" * 300)).items():
        assert text.startswith(str(tmp_path)), name
        assert "; expected" in text, name


@pytest.mark.of_field
def test_a_file_is_no_folder_and_a_folder_no_file(assertions: dict[str, Assertion], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    errors = _refusals(assertions, tmp_path / "file")
    assert {name for name, text in errors.items() if f"{tmp_path}/file: a file; expected" in text} == FOLDERS
    _refusals(assertions, tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    for name, text in _refusals(assertions, tmp_path / "pipe").items():
        assert "not a regular file" in text or "is not a regular file" in text, name


@pytest.mark.of_field
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"], ids=["empty", "cut off", "bytes", "a list"])
def test_a_file_that_is_no_json_is_refused(content: bytes, assertions: dict[str, Assertion], tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(content)
    _refusals(assertions, tmp_path / "it.json")
    (tmp_path / "all").mkdir()
    for name in ("adapter_config.json", "manifest.json", "config.json", "tokenizer.json", "adapter_model.safetensors"):
        (tmp_path / "all" / name).write_bytes(content)
    _refusals(assertions, tmp_path / "all")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(assertions: dict[str, Assertion], tmp_path: Path) -> None:
    (tmp_path / "closed").write_text("{}")
    (tmp_path / "closed").chmod(0)
    for name, text in _refusals(assertions, tmp_path / "closed").items():
        assert "ermission denied" in text, name


def test_a_number_is_no_path(assertions: dict[str, Assertion]) -> None:
    for judge in assertions.values():
        with pytest.raises(InputError, match=r"no (path|tokenizer).*: int; expected"):
            judge(3)


def test_a_base_of_an_unknown_class_is_no_pass(made: Path, tmp_path: Path) -> None:
    assert_adapter_sound(made / "adapter", made / "base")
    shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    other = config | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(other))
    with pytest.raises(PinError, match=r"\['GemmaForCausalLM'\]; expected .*Mistral") as caught:
        assert_adapter_sound(made / "adapter", tmp_path / "base")
    assert str(caught.value.place) == str(tmp_path / "base" / "config.json")
    # one that the adapter records is judged by all that needs no base
    adapter = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.warns(NotCheckedWarning, match=r"fits-base, changes-the-base: .*\['GemmaForCausalLM'\]"):
        assert_adapter_sound(adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(AssertionError, match=r"^ML401 .*holds no tensors"):
        assert_adapter_sound(adapter)


def test_a_merged_model_that_is_compared_with_nothing_is_no_pass(made: Path) -> None:
    with pytest.raises(AssertionError, match=r"not checked\n.*names-and-shapes.*: .*this folder"):
        assert_adapter_sound(made / "base", made / "base")


def test_a_base_that_is_missing_is_a_warning(made: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/where"}))
    with pytest.warns(NotCheckedWarning, match=r"not checked\n  fits-base, changes-the-base: .*'some/where'"):
        assert_adapter_sound(adapter)
