"""The ids that Mistral recorded, and the requests of its own tests: `tox run -e recordings` fetches them."""

from __future__ import annotations

import os
from pathlib import Path

import mistral_recordings
import pytest
from mistral_recordings import (
    COMMIT,
    FILES,
    RESULTS,
    FetchError,
    RecordingResults,
    fetch_all,
    judged_recordings,
    read_requests,
    recording,
)

from pytest_mistral_lora.chat.oracle import VERSION
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes

ACCEPTED = {"same", "refused by both", "refused here", "media, refused here"}
NAME, DATA = "tests/data/one.json", b'{"tokens": [1, 3, 4]}'


@pytest.fixture(scope="module")
def results() -> RecordingResults:
    try:
        if os.environ.get("MISTRAL_LORA_FETCH") == "1":
            fetch_all()
        return judged_recordings()
    except FetchError as error:
        pytest.skip(str(error))


def test_our_ids_are_those_of_mistral_or_both_refuse(results: RecordingResults) -> None:
    assert set(results.samples.values()) <= {"same", "refused by both"}
    for tokenizer, classes in results.requests.items():
        assert {name: found for name, found in classes.items() if found not in ACCEPTED} == {}, tokenizer
    alone = {(tokenizer, name) for tokenizer, classes in results.requests.items() for name in _refused_here(classes)}
    # mistral-common leaves the tools out
    assert alone == {("spm-v1", f"REQUEST_MULTI_TURN_WITH_TOOLS_{kind}") for kind in ("TEST", "TRAIN")}


def _refused_here(classes: dict[str, str]) -> list[str]:
    return [name for name, found in classes.items() if found == "refused here"]


def test_the_counts_are_those_that_the_docs_show(results: RecordingResults) -> None:
    recorded = RESULTS.read_text(encoding="utf-8")
    if f'mistral_common = "{VERSION}"' not in recorded:
        pytest.skip(f"recorded under another mistral-common than {VERSION}")
    assert results.text() == recorded


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one pinned file, and an empty cache folder; returns the file."""
    source = tmp_path / "repository" / NAME
    source.parent.mkdir(parents=True)
    source.write_bytes(DATA)
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mistral_recordings, "FILES", {NAME: sha256_bytes(DATA)})
    monkeypatch.setattr(mistral_recordings, "_RAW", (tmp_path / "repository").as_uri())
    return source


def test_a_file_is_fetched_once(one_file: Path, tmp_path: Path) -> None:
    assert recording(NAME, fetch=True) == DATA
    one_file.unlink()
    assert recording(NAME, fetch=True) == DATA
    assert (tmp_path / "cache" / "recordings" / COMMIT / NAME).read_bytes() == DATA


def test_a_file_that_is_missing_or_changed_is_refused_with_the_reason(one_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"is missing: python scripts/mistral_recordings\.py"):
        recording(NAME, fetch=False)
    one_file.write_bytes(b"{}")
    with pytest.raises(FetchError, match="has the SHA-256 44136fa3"):
        recording(NAME, fetch=True)
    one_file.unlink()
    with pytest.raises(FetchError, match="cannot be fetched"):
        recording(NAME, fetch=True)
    kept = tmp_path / "cache" / "recordings" / COMMIT / NAME
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"changed in the cache")
    with pytest.raises(FetchError, match="is missing"):
        recording(NAME, fetch=False)


def test_each_file_is_pinned_by_its_hash() -> None:
    assert len(COMMIT) == 40
    assert all(len(digest) == 64 for digest in FILES.values())


REQUEST = "REQUEST_A = ChatCompletionRequest(messages=[UserMessage(content='Hi')])"


def test_requests_are_read_and_not_executed() -> None:
    [found] = read_requests(f"import os\nos.abort()\n{REQUEST}\n").values()
    assert found.messages[0].content == "Hi"


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').getcwd()",
        "open('/etc/passwd')",
        "UserMessage('Hi')",
        "[part for part in ()]",
        "UserMessage(**options)",
        "{**options}",
        "unknown",
        "'a' + 'b'",
    ],
)
def test_code_that_is_no_literal_of_mistral_common_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        read_requests(f"REQUEST_A = ChatCompletionRequest(messages=[{value}])")
