"""The rules of GGUF files against llama.cpp itself: a file without a finding is served with mistral-common's ids."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted_tokenizer
from derived_tekken import write_cut
from gguf_files import write_gguf
from llamacpp_process import BUILD, Post, converted_model, needs_llamacpp, served
from named_deviations import SEEN, seen_deviations
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.serving.servers import SERVERS

pytestmark = needs_llamacpp

TEXTS = (
    "'The' end",
    "What is the capital of France?",
    "  two spaces",
    "def f():\n\treturn  1\n",
    "I'LL DON'T HTTPServer 12345",
    "東京 🙂",
)
RELEASED = (32_768, 131_072)
INDIC = "हिन्दी भाषा"


# 131,000 tokens are written, read and served in ten times the time of the first 8,000
@pytest.fixture(scope="module", params=["spm-v3", "tekken-cut", pytest.param("tekken-240718", marks=pytest.mark.slow)])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Any, Any]:
    """The oracle of a tiny model, and the fields and tensors of its GGUF file."""
    is_cut = request.param == "tekken-cut"
    source = write_cut(tmp_path_factory.mktemp("cut"), words=8_000) if is_cut else shipped_tokenizer(request.param)
    base = write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", source)
    oracle = Oracle(source)
    return oracle, *converted_model(base, oracle)


def served_rules(oracle: Oracle, address: str, folder: Path) -> set[str]:
    """Return the rules of the subject `server` that fire."""
    judge = Target("own", oracle.path)
    target = ServerTarget("served", judge=judge, kind="llamacpp", url=address, version=BUILD)
    settings = Settings(20, None, "cpu", True, (), False, folder)
    return {finding.rule for check in collect([target], settings) for finding in check.run().findings}


def findings(file: Path, oracle: Oracle) -> list[Finding]:
    # no release has the vocabulary that is cut off: its tokenizer is named in place of recognised
    named = str(oracle.path) if oracle.vocab_size not in RELEASED else None
    settings = Settings(20, None, "cpu", True, (), False, file.parent)
    found = [
        finding
        for check in collect(NamedPaths(ggufs=[file], oracle=named).targets(), settings)
        for finding in check.run().findings
    ]
    return [finding for finding in found if finding.severity == "error"]


def prompts(oracle: Oracle, post: Post) -> list[tuple[Any, Any]]:
    """Return the ids of mistral-common and of the server for each text as a user's message."""
    found = []
    for text in TEXTS:
        user = {"role": "user", "content": text}
        prompt = post("/apply-template", {"messages": [user]})["prompt"]
        ids = post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        found.append((list(oracle.encode_prompt({"messages": [user, {"role": "assistant", "content": "a"}]})), ids))
    return found


def test_a_file_without_a_finding_is_served_with_the_ids_of_mistral_common(converted: Any, tmp_path: Path) -> None:
    oracle, fields, tensors = converted
    file = write_gguf(tmp_path / "model.gguf", fields, tensors)
    assert [finding.text() for finding in findings(file, oracle)] == []
    with served(file) as (post, address):
        assert [expected == found for expected, found in prompts(oracle, post)] == [True] * len(TEXTS)
        for number, literal in list(oracle.control_tokens.items())[:12]:
            data = {"content": literal, "add_special": False, "parse_special": True}
            assert post("/tokenize", data)["tokens"] == [number]
        text = {"content": (" " if oracle.kind == "spm" else "") + INDIC, "add_special": False}
        # the note of Tekken files: if this fails, llama.cpp reads combining marks now, and the rule can go
        if oracle.vocab_size in RELEASED:
            assert (post("/tokenize", text)["tokens"] == list(oracle.encode_text(INDIC))) is (oracle.kind == "spm")
        # a Jinja server encodes the rendered text, in which a user's [/INST] is the marker
        assert served_rules(oracle, address, tmp_path) == set()


def test_an_end_that_is_left_out_is_a_finding_if_the_reader_takes_another_token(
    converted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle, fields, tensors = converted
    file = write_gguf(tmp_path / "model.gguf", {**fields, "tokenizer.ggml.eos_token_id": None}, tensors)
    with served(file) as (_, address), urllib.request.urlopen(f"{address}/props", timeout=60) as answer:
        taken = json.load(answer)["eos_token"]
    # llama.cpp itself, which takes 2 for SentencePiece, and 11 for Tekken
    assert (taken == oracle.piece(oracle.eos_id)) is (oracle.kind == "spm")
    found = findings(file, oracle)
    if oracle.kind == "spm":
        assert not found
        assert main(["check", str(file)]) == 0
        line = "end of answers of model.gguf: tokenizer.ggml.eos_token_id is missing, and readers take 2, which is </s>"
        assert line in capsys.readouterr().out
    else:
        [finding] = found
        assert finding.rule == "ML912"
        assert "eos_token_id is missing, and readers take 11" in finding.found


@pytest.mark.slow
def test_another_tokenizer_than_that_of_the_server_is_the_one_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    base = write_tiny_base(tmp_path / "tiny", oracle.path)
    with served(write_gguf(tmp_path / "model.gguf", *converted_model(base, oracle))) as (_, address):
        code = main(["serve-check", address, "--tokenizer", "tekken-240911"])
    out = capsys.readouterr().out
    assert (code, re.findall(r"^ML9\d\d", out, flags=re.MULTILINE)) == (1, ["ML902"]), out
    assert "ML902 " in out
    # the others are named deviations
    assert re.search("83% of .* of spm-v3, .*0% .* of tekken-240911", out)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SEEN if name != "spm-v3"]


def test_the_table_has_what_was_seen_of_llamacpp() -> None:
    seen = {name for names in SEEN.values() for name in names.split()}
    server = SERVERS["llamacpp"]
    assert seen == server.known_deviations("prompts").keys()
    assert all(server.has_deviation("prompts", name, BUILD) for name in seen)


@pytest.mark.parametrize("name", ["spm-v3", *SLOW])
def test_llamacpp_shows_the_named_deviations_that_the_table_has_of_it(name: str, tmp_path: Path) -> None:
    tokenizer = converted_tokenizer(name)
    oracle = tokenizer.oracle
    base = write_tiny_base(tmp_path / "tiny", oracle.path)
    with served(write_gguf(tmp_path / "model.gguf", *converted_model(base, oracle))) as (_, address):
        assert seen_deviations("llamacpp", address, tokenizer, BUILD) == set(SEEN[name].split())


def without_space_setting(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.add_space_prefix"] = None


def without_scores(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.tokens"])


def with_the_splitter_of_llama_3(fields: dict[str, Any]) -> None:
    fields["tokenizer.ggml.pre"] = "pixtral"


def with_the_name_of_a_template(fields: dict[str, Any]) -> None:
    fields["tokenizer.chat_template"] = "mistral-v3"


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    [
        pytest.param("spm", without_space_setting, "ML912", marks=pytest.mark.slow),
        ("spm", without_scores, "ML912"),
        ("tekken", with_the_splitter_of_llama_3, "ML912"),
        pytest.param("tekken", with_the_name_of_a_template, "ML913", marks=pytest.mark.slow),
    ],
)
def test_a_file_with_a_finding_is_served_with_other_ids(
    kind: str, change: Callable[[dict[str, Any]], None], rule: str, converted: Any, tmp_path: Path
) -> None:
    oracle, fields, tensors = converted
    if oracle.kind != kind:
        pytest.skip(f"a fault of {kind} files")
    changed = dict(fields)
    change(changed)
    file = write_gguf(tmp_path / "model.gguf", changed, tensors)
    assert {finding.rule for finding in findings(file, oracle)} == {rule}
    with served(file) as (post, address):
        assert any(expected != found for expected, found in prompts(oracle, post))
        assert "ML902" in served_rules(oracle, address, tmp_path)


@pytest.mark.slow
def test_llamacpp_reads_no_sliding_window(tmp_path: Path) -> None:
    # the fact served-without-a-window of field/facts/llamacpp.toml
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    base = write_tiny_base(tmp_path / "tiny", oracle.path)
    fields, tensors = converted_model(base, oracle)
    ids = [oracle.bos_id, *range(1000, 1040)]

    def likeliest(more: dict[str, Any]) -> list[tuple[int, float]]:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 5}
        with served(write_gguf(tmp_path / "model.gguf", {**fields, **more}, tensors)) as (post, _):
            [step] = post("/completion", asked)["completion_probabilities"]
        return [(token["id"], token["logprob"]) for token in step["top_logprobs"]]

    def of_transformers(window: int | None) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, sliding_window=window, attn_implementation="eager"
        )
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].topk(5).indices.tolist()

    found = likeliest({"llama.attention.sliding_window": 4})
    assert found == likeliest({})
    assert [token for token, _ in found] == of_transformers(None) != of_transformers(4)
