from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.train.tiny_run import tiny_run

TESTS = """
import torch
from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_tokenizer(mistral_tokenizer):
    assert isinstance(mistral_tokenizer, CheckpointTokenizer)
    assert mistral_tokenizer.fast.bos_token == "<s>"


def test_oracle(mistral_oracle, mistral_tokenizer):
    assert isinstance(mistral_oracle, Oracle)
    assert mistral_oracle is mistral_tokenizer.oracle
    assert mistral_oracle.version == "v3"


def test_encode(mistral_encode, mistral_oracle):
    encoded = mistral_encode(ROW)
    assert isinstance(encoded, EncodedRow)
    assert encoded.labels[-1] == mistral_oracle.eos_id


def test_golden(mistral_golden, mistral_encode):
    golden = mistral_golden("single")
    assert golden.case == "single"
    assert mistral_encode(golden.row) == golden.encoded


def test_tiny_model(mistral_tiny_model, mistral_encode):
    ids = torch.tensor([mistral_encode(ROW).input_ids])
    assert mistral_tiny_model(input_ids=ids).logits.shape == (1, ids.shape[1], 32768)
"""
RUN = """
def test_run(mistral_lora_run):
    assert (mistral_lora_run.adapter / "adapter_model.safetensors").is_file()
    assert all(one["equal"] for one in mistral_lora_run.smoke["completions"])


def test_manifest(mistral_manifest):
    assert mistral_manifest["kind"] == "adapter"
"""

SHARED = """
from pathlib import Path

import pytest

@pytest.fixture(scope="session")
def tmp_path_factory(tmp_path_factory):
    tmp_path_factory.mktemp = lambda name: Path({folder!r})
    return tmp_path_factory
"""


def test_each_fixture_works_without_the_suite(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess().assert_outcomes(passed=5)


@pytest.mark.parametrize("is_made", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_run_and_its_manifest_are_real(is_made: bool, pytester: pytest.Pytester, tiny_work: Path) -> None:
    pytester.makepyfile(RUN)
    if is_made:
        # as in a session whose worker has made the run before: it takes twelve seconds, and the laws need it, too
        tiny_run(Oracle(shipped_tokenizer("spm-v3")), tiny_work, device="cpu")
        pytester.makeconftest(SHARED.format(folder=str(tiny_work)))
    pytester.runpytest_inprocess().assert_outcomes(passed=2)


def test_the_fixtures_use_the_tokenizer_of_the_ini_file_wherever_pytest_is_started(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shipped_tokenizer("spm-v1"), pytester.path / "tok.model.v1")
    pytester.makeini("[pytest]\nmistral_tokenizers = tok.model.v1")
    folder = pytester.mkdir("sub")
    (folder / "test_mine.py").write_text("def test_v1(mistral_oracle): assert mistral_oracle.version == 'v1'")
    monkeypatch.chdir(folder)
    pytester.runpytest_inprocess("test_mine.py").assert_outcomes(passed=1)


def test_an_option_is_relative_to_where_pytest_was_started(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shipped_tokenizer("spm-v1"), pytester.path / "tok.model.v1")
    pytester.mkdir("sub")
    pytester.makepyfile(
        """
        import os

        def test_moves_away(request, monkeypatch):
            monkeypatch.chdir("sub")
            assert request.getfixturevalue("mistral_oracle").version == "v1"
        """
    )
    arguments = ("--mistral-golden", "--mistral-tokenizer=tok.model.v1", "-k", "test_moves_away", ".")
    assert pytester.runpytest_inprocess(*arguments).parseoutcomes()["passed"] == 1


def test_a_case_without_a_golden_is_an_error_that_lists_the_cases(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(mistral_golden): mistral_golden('no-such')")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*InputError: *'no-such' for spm-v3; expected *single*"])


def test_pytest_lists_each_fixture_with_its_scope(pytester: pytest.Pytester) -> None:
    lines = pytester.runpytest_inprocess("--fixtures").outlines
    for name in ("tokenizer", "oracle", "encode", "golden", "tiny_model", "lora_run", "manifest"):
        at = next(n for n, line in enumerate(lines) if line.startswith(f"mistral_{name} [session scope]"))
        assert "(session)" in lines[at + 1], name
