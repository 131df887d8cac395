"""Named deviations of served prompts: accepted of the servers and versions that the table has, and of no other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from local_server import Behaviour, Ids, serving, space_for_an_empty_text

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.answer.deviations import ANSWER_DEVIATIONS
from pytest_mistral_lora.errors import EntryPointError
from pytest_mistral_lora.serving.deviations import READ_DEVIATIONS, ReadDeviation, deviations_in
from pytest_mistral_lora.serving.servers import SERVERS

ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yo"}]} for text in ("Hi", "")
]
Check = Callable[..., tuple[int, str]]


def with_a_space(ids: Ids, data: dict[str, Any]) -> Ids:
    """Put a space behind BOS and the first marker (ids of `spm-v3`)."""
    return (*ids[:2], 29473, *ids[2:])


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


@pytest.fixture
def check(oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check a server that puts a space where a text is empty."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def judge(kind: str, version: str, prompt: Any = space_for_an_empty_text) -> tuple[int, str]:
        with serving(Behaviour(oracle, prompt=prompt, version=version)) as url:
            code = main(
                ["serve-check", f"{kind}={url}", "--tokenizer", "spm-v3", "--rows", str(tmp_path / "rows.jsonl")]
            )
        return code, "".join(capsys.readouterr())

    return judge


@pytest.mark.parametrize(
    ("kind", "version", "title"),
    [
        ("llamacpp", "b11549-8b3f1c2", "llama.cpp b11549-8b3f1c2"),
        ("llamacpp", "b12000-8b3f1c2", "llama.cpp b12000-8b3f1c2"),
        ("vllm", "0.32.0+cpu", "vLLM 0.32.0+cpu"),
        # a build outside of Git reports no number
        ("llamacpp@11549", "b0-unknown", "llama.cpp 11549"),
    ],
)
def test_a_known_deviation_is_accepted_by_its_name(kind: str, version: str, title: str, check: Check) -> None:
    code, out = check(kind, version)
    assert code == 0, out
    assert "1 of 2 prompts have the ids" in out
    assert f"named deviations, known of {title}: empty-text-space (1)" in out


@pytest.mark.parametrize(
    ("kind", "version", "says"),
    [
        ("llamacpp", "b8671-8b3f1c2", "is not known of llama.cpp b8671-8b3f1c2"),
        ("vllm", "0.31.2", "is not known of vLLM 0.31.2"),
        ("llamacpp", "b0-unknown", "llamacpp@VERSION=http://127.0.0.1:"),
        # a version that is named does not replace one that is reported
        ("llamacpp@11549", "b8671-8b3f1c2", "is not known of llama.cpp b8671-8b3f1c2"),
    ],
)
def test_a_deviation_of_another_version_is_a_finding(kind: str, version: str, says: str, check: Check) -> None:
    code, out = check(kind, version)
    assert (code, len(re.findall("^ML902 ", out, re.MULTILINE))) == (1, 1), out
    assert "a named deviation (empty-text-space)" in out
    assert "empty-text-space is known of llama.cpp >=8672, vLLM >=0.32" in out
    assert says in out
    # whether the version is named or the file is wrong
    assert ("mistral-lora check FILE.gguf" in " ".join(out.split())) == kind.startswith("llamacpp")


def test_another_difference_of_a_known_server_is_a_finding(check: Check) -> None:
    def twice(ids: Ids, data: dict[str, Any]) -> Ids:
        return space_for_an_empty_text(space_for_an_empty_text(ids, data), data)

    code, out = check("llamacpp", "b11549-8b3f1c2", twice)
    assert (code, "ML902" in out, "a named deviation (" in out) == (1, True, False), out


@pytest.mark.parametrize(
    ("named", "prompt", "says"),
    [
        ("spm-v3", None, ""),
        ("spm-v7", None, "of spm-v3, and 73% have the ids of spm-v7"),
        pytest.param(
            "tekken-240911",
            None,
            "of spm-v3, and 2% have the ids of tekken-240911",
            marks=pytest.mark.slow,
        ),
        # a fault in each prompt hides the version, and not the vocabulary; it has two causes, before texts and tools
        ("spm-v3", with_a_space, ""),
        pytest.param(
            "spm-v1",
            with_a_space,
            " by spm-v2 or spm-v3 or spm-v7 or spm-v7m1, and ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_prompts_of_another_tokenizer_are_one_finding_that_names_it(
    named: str, prompt: Any, says: str, oracle: Oracle, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(oracle, prompt=prompt or (lambda ids, _: ids), version="0.32.0")) as url:
        code = main(["serve-check", f"vllm={url}", "--tokenizer", named])
    out = "".join(capsys.readouterr())
    assert (code, says in out) == (bool(says or prompt), True), out
    found = re.findall("^ML9.*$", out, re.MULTILINE)
    assert ("Else another model is served" in out, "than the named one (" in out) == (bool(says), bool(says)), out
    assert len(found) == (bool(says) or 2 * bool(prompt)), out


@pytest.mark.parametrize("deviation", READ_DEVIATIONS, ids=lambda deviation: deviation.id)
@pytest.mark.parametrize(
    ("kind", "version", "says"),
    [
        ("vllm", "0.32.0", ""),
        ("vllm", "0.31.2", "is not known of vLLM 0.31.2"),
        # a server that is not known to change messages
        ("llamacpp", "b11549-8b3f1c2", "ML902 "),
    ],
)
def test_what_a_server_changes_before_it_renders_is_named(
    kind: str, version: str, says: str, deviation: ReadDeviation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = converted_tokenizer(deviation.tokenizer).oracle
    (tmp_path / "row.jsonl").write_text(json.dumps(deviation.example) + "\n")
    changed = deviation.change(parse_row(deviation.example))
    served = oracle.encode_prompt(changed)
    assert served != oracle.encode_prompt(deviation.example)
    with serving(Behaviour(oracle, prompt=lambda ids, _: served, version=version)) as url:
        words = ["--tokenizer", str(oracle.path), "--rows", str(tmp_path / "row.jsonl")]
        code = main(["serve-check", f"{kind}={url}", *words])
    out = "".join(capsys.readouterr())
    assert (code, f"known of vLLM 0.32.0: {deviation.id} (1)" in out) == (bool(says), not says), out
    assert says in out


@pytest.mark.parametrize("kind", SERVERS.ours)
def test_a_server_names_deviations_of_the_tables(kind: str) -> None:
    server = SERVERS[kind]
    assert server.known_deviations("prompts").keys() <= {one.id for one in (*DEVIATIONS, *READ_DEVIATIONS)}
    assert server.known_deviations("answers").keys() <= {one.id for one in ANSWER_DEVIATIONS}


def test_a_deviation_is_known_of_versions_that_are_numbers_alone() -> None:
    # llama.cpp writes tools anew
    found = [SERVERS[kind].has_deviation("prompts", "tools-as-written", "99999") for kind in SERVERS.ours]
    assert dict(zip(SERVERS.ours, found, strict=True)) == {kind: kind == "vllm" for kind in SERVERS.ours}
    vllm = SERVERS["vllm"]
    assert vllm.has_deviation("answers", "thought-edges", "0.32.0+cpu")
    assert not any(vllm.has_deviation("prompts", "tools-as-written", version) for version in ("main", "", "0.31.2"))
    assert not vllm.has_deviation("answers", "tools-as-written", "0.32.0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[prompts]\ncontrol-literal = "from 0.32 on"', "prompts.control-literal: 'from 0.32 on'"),
        ("[prompts]\ncontrol-literal = 32", "prompts.control-literal: 32"),
        ('[prompt]\ncontrol-literal = ">=0.32"', "unknown section 'prompt'"),
        ("[prompts", "not valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_deviations_that_is_none_is_an_error_of_its_package(
    text: str | None, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "deviations.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(EntryPointError) as error:
        deviations_in(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)
