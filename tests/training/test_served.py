"""An adapter of our trainer, converted to GGUF and replayed through llama.cpp's own server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cut_sentencepiece import cut_v3
from gguf_files import write_gguf
from learned_rows import LEARNED, learn_by_heart
from llamacpp_process import converted_model, needs_llamacpp, served, write_lora

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.server.chat_causes import RIGHT_MODEL
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.training.merge import merge
from pytest_mistral_lora.training.run import RunResult

pytestmark = needs_llamacpp

Check = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(run: RunResult, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The GGUF files of the base and of the adapter."""
    folder = tmp_path_factory.mktemp("gguf")
    model = converted_model(base, Oracle(cut_v3()))
    return write_gguf(folder / "base.gguf", *model), write_lora(folder / "lora.gguf", run.output, base)


@pytest.fixture
def check(run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check a server, asked for one row of its own and for the transcripts of the run."""
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")

    def judge(address: str, *words: str, adapter: Path = run.output, kind: str = "llamacpp") -> tuple[int, str]:
        asked = ["--tokenizer", str(cut_v3()), "--rows", str(tmp_path / "one.jsonl"), "--adapter", str(adapter), *words]
        capsys.readouterr()
        code = main(["serve-check", f"{kind}={address}", *asked])
        return code, capsys.readouterr().out

    return judge


def fired(out: str) -> set[str]:
    return set(re.findall(r"^(ML\d+) ", out, re.MULTILINE))


@pytest.mark.of_field
def test_an_adapter_answers_as_recorded_and_nothing_of_its_base_is_left_behind(
    files: tuple[Path, Path], run: RunResult, check: Check
) -> None:
    base, lora = files
    golden = max(load_folder(run.output / TRANSCRIPTS), key=lambda one: len(one.completion_ids))
    with served(base, lora=str(lora)) as (post, address):
        # the same server, as if it hid its ids
        code, out = check(address, kind="openai:fp32")
        assert code == 0, out
        assert "those of the right prompt in 5 of 5" in out
        assert "does not show the ids of a prompt" in out
        code, out = check(address)
        assert code == 0, out
        for way in ("ids", "messages"):
            assert f"answers by {way} of llamacpp-{address[7:].replace(':', '-')}: 5 exact of 5; fp32" in out
        assert "it changes 4 of 4 answers of the base" in out
        # the next client shares the cache in which the base's work on this prompt would be
        plain = {"prompt": list(golden.prompt_ids), "temperature": 0, "n_predict": 1, "n_probs": 1}
        [first] = post("/completion", plain)["completion_probabilities"]
        assert first["logprob"] == pytest.approx(golden.logprobs[0], abs=0.01)


@pytest.mark.of_field
def test_with_a_second_space_the_ids_are_answered_as_recorded_and_the_messages_are_not(
    files: tuple[Path, Path], base: Path, check: Check, tmp_path: Path
) -> None:
    fields, tensors = converted_model(base, Oracle(cut_v3()))
    spaced = write_gguf(tmp_path / "spaced.gguf", {**fields, "tokenizer.ggml.add_space_prefix": None}, tensors)
    with served(spaced, lora=str(files[1])) as (_, address):
        assert fired(check(address, kind="openai:fp32")[1]) == {"ML904", "ML905", "ML909"}
        code, out = check(address)
    assert code == 1
    # the answers differ because the prompts do: one finding, which counts them
    assert fired(out) == {"ML902"}
    assert re.search(r"explains: (\d) more findings: ML909 \(\1\)", out), out
    assert RIGHT_MODEL in out
    assert "5 exact of 5" in out


@pytest.mark.slow
def test_an_adapter_of_scale_0_is_loaded_and_not_applied(files: tuple[Path, Path], check: Check) -> None:
    with served(files[0], lora=str(files[1]), scale=0.0) as (_, address):
        code, out = check(address)
    assert code == 1
    assert "has the scale 0" in out
    assert "4 of 4 prompts are answered as by the base" in out
    assert "5 different of 5" in out
    assert RIGHT_MODEL not in out


@pytest.mark.of_field
def test_a_penalty_of_the_server_changes_the_answers_of_clients_and_not_those_that_are_judged(
    files: tuple[Path, Path], check: Check
) -> None:
    with served(files[0], lora=str(files[1]), set={"sampling.penalty_repeat": 8.0}) as (_, address):
        code, out = check(address)
    assert code == 1
    assert fired(out) == {"ML911"}
    assert "asked with the temperature 0 alone, it answers" in out
    assert "asked twice" not in out


@pytest.mark.slow
def test_eleven_answers_learned_by_heart_are_served_by_the_adapter_and_by_the_merged_model(
    check: Check, tmp_path: Path
) -> None:
    source = shipped_tokenizer("spm-v3")
    source_base = write_tiny_base(tmp_path / "base", source)
    adapter = learn_by_heart(tmp_path, source_base)
    merged = merge(adapter, tmp_path / "merged", source_base).output
    # tool calls, a character of several tokens and texts: the model has learned them
    assert [one.stop for one in load_folder(tmp_path / "answers")] == ["eos"] * len(LEARNED)
    oracle = Oracle(source)
    base = write_gguf(tmp_path / "base.gguf", *converted_model(source_base, oracle))
    whole = write_gguf(tmp_path / "merged.gguf", *converted_model(merged, oracle))
    for file, lora in ((base, write_lora(tmp_path / "lora.gguf", adapter, source_base)), (whole, None)):
        with served(file, **({"lora": str(lora)} if lora else {})) as (_, address):
            code, out = check(address, "--golden", str(tmp_path / "answers"))
        assert code == 0, out
        assert out.count("11 exact of 11") == 2
        assert ("the server has no adapter to leave out" in out) is (lora is None)
    # without the answers' adapter, none of them is given
    shutil.copytree(tmp_path / "answers", tmp_path / "other" / TRANSCRIPTS)
    with served(base) as (_, address):
        code, out = check(address, adapter=tmp_path / "other")
    assert (code, out.count("11 different of 11")) == (1, 2)
