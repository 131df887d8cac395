"""The assertions about files of rows and manifests, and how a failed one is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_mistral_lora.assertions import (
    assert_manifest_valid,
    assert_rows_sound,
)
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError

COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"
MANIFEST = {"base": "mistralai/Mistral-7B-v0.3", "revision": COMMIT, "dataset_sha256": "ab" * 32, "seed": 42}


@pytest.fixture(scope="module")
def tokenizer() -> CheckpointTokenizer:
    return CheckpointTokenizer(shipped_tokenizer("spm-v3"))


def _report(error: pytest.ExceptionInfo[AssertionError]) -> list[str]:
    return str(error.value).splitlines()


def test_a_manifest_is_valid_as_data_file_or_folder(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(MANIFEST))
    for given in (MANIFEST, path, str(path), tmp_path):
        assert_manifest_valid(given)


@pytest.mark.parametrize("key", MANIFEST)
def test_a_manifest_without_a_key_is_not_valid(key: str, tmp_path: Path) -> None:
    less = {name: value for name, value in MANIFEST.items() if name != key}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(less))
    for given in (less, tmp_path):
        with pytest.raises(AssertionError) as error:
            assert_manifest_valid(given)
        assert _report(error)[0].startswith("ML701 ")
        assert key in _report(error)[0]


def test_every_violation_of_a_manifest_is_told(tmp_path: Path) -> None:
    bad = {**MANIFEST, "revision": "main", "dataset_sha256": "abc"}
    with pytest.raises(AssertionError) as error:
        assert_manifest_valid(bad)
    starts = [line for line in _report(error) if line.startswith("ML701 ")]
    assert len(starts) == 2
    assert "revision" in "".join(starts)
    assert "dataset_sha256" in "".join(starts)


def test_a_manifest_that_cannot_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder; expected a manifest\.json"):
        assert_manifest_valid(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        assert_manifest_valid(tmp_path)


def test_a_failed_assertion_shows_the_users_line_and_none_of_ours(
    suite_libraries: None, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(
        """
        from pytest_mistral_lora.assertions import assert_manifest_valid

        def test_mine():
            assert_manifest_valid({"seed": 1})
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(['>*assert_manifest_valid({"seed": 1})', "E*ML701 *"])
    result.stdout.no_fnmatch_line("*assertions.py:*")


def test_rows_are_sound_or_every_fault_is_named(tmp_path: Path, tokenizer: CheckpointTokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bot = {"messages": [{"role": "bot", "content": "a"}]}
    silent = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0}]}
    path.write_text(json.dumps(good) + "\n")
    assert_rows_sound(path, tokenizer)
    assert_rows_sound(str(path), shipped_tokenizer("spm-v3"))
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bot, good, silent)))
    with pytest.raises(AssertionError) as error:
        assert_rows_sound(path, tokenizer)
    # a repeated row is a note
    assert [line.split(":")[:2] for line in _report(error) if line.startswith("ML")] == [
        [f"ML601 {path}", "2, messages[0].role"],
        [f"ML605 {path}", "4"],
    ]


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"", "the file has no rows"), (b"PAR1", "cannot be read as Parquet")],
)
def test_a_file_without_rows_is_not_sound(
    data: bytes, found: str, tmp_path: Path, tokenizer: CheckpointTokenizer
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(AssertionError, match=rf"^ML602 .*rows.jsonl: {found}"):
        assert_rows_sound(tmp_path / "rows.jsonl", tokenizer)
