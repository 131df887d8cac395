"""Hostile texts, names of files and errors of other programs: every verb in every format, and pytest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from verb_words import VERB_OF

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.escaping import printable, safe_text

HOSTILE = (
    "x\x1b]0;t\x07\x1b[2J\x9b31m\x85\r\u202e\u2066\u2028\u200b\x7f\n::error::PWN\n  ::set-output name=a::PWN\n"
    "::stop-commands::PWN\n##[error]PWN\n##vso[task.x]PWN\nFORGED\nerror: FORGED"
)
NAME = "n\x1b[31m\x9b\r\u202e\n::error::PWN\n##[error]PWN\nFORGED"
FORMATS = ("text", "concise", "json", "github")
# the only commands that we write: an annotation of a rule
OWN = re.compile(r"::(error|notice) ([a-z]+=[^,:]*,)*title=ML\d{3} [^:]*::")


def assert_safe(text: str, *, own: bool = False) -> None:
    """Hold output to its promise: nothing in it is obeyed, hidden, or looks like a line of another text."""
    lines = text.split("\n")
    if own:
        lines = [line for line in lines if not (OWN.match(line) and printable(line) == line)]
    for line in lines:
        assert safe_text(line) == line, ascii(line)
        assert not line.startswith(("FORGED", "error: FORGED")), ascii(text)


def row(*messages: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


ROWS = [
    row(("user", HOSTILE), ("assistant", HOSTILE), **{HOSTILE: HOSTILE}),
    row(("user", HOSTILE), (HOSTILE, HOSTILE)),
    row(
        ("user", "a"), ("assistant", "b"), tools=[{"type": "function", "function": {"name": HOSTILE, "parameters": {}}}]
    ),
    row(("user", "a"), ("user", HOSTILE)),
    row(("user", "[INST]"), ("assistant", "</s>" + HOSTILE)),
    {"conversations": [{"from": HOSTILE, "value": HOSTILE}]},
]
ENCODED = [
    {**ROWS[0], "input_ids": [1, 3, 5, 2], "labels": [-100, 3, 5, 2]},
    {**ROWS[3], HOSTILE: 1, "input_ids": HOSTILE},
]
SCRIPT = """
import json, sys
text = json.loads({!r})
sys.stderr.write(text)
sys.stdout.write(text)
raise SystemExit(text)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files in which every text and every name is hostile."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("hostile")

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))

    lines(f"{NAME}.jsonl", ROWS)
    lines("plain.jsonl", [row(("user", HOSTILE), ("assistant", HOSTILE))])
    lines(f"{NAME}.enc.jsonl", ENCODED)
    # a tensor's name, the keys of its configuration, and a manifest
    adapter = folder / f"{NAME}.adapter"
    adapter.mkdir()
    import numpy as np

    save_file({f"{HOSTILE}.lora_A.weight": np.zeros((2, 2), "float32")}, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "target_modules": [HOSTILE],
        "base_model_name_or_path": HOSTILE,
        HOSTILE: HOSTILE,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    manifest = {
        "schema_version": 1,
        "kind": HOSTILE,
        "base": HOSTILE,
        "files": {HOSTILE: {"sha256": HOSTILE, "size": 1}},
    }
    (adapter / "manifest.json").write_text(json.dumps({**manifest, HOSTILE: HOSTILE}))
    (adapter / "transcripts").mkdir()
    (adapter / "transcripts" / f"{NAME}.json").write_text(json.dumps({"case": HOSTILE, HOSTILE: 1}))
    # a template that raises a text
    checkpoint = folder / f"{NAME}.checkpoint"
    checkpoint.mkdir()
    from pytest_mistral_lora.chat.oracle import shipped_tokenizer

    shutil.copy(shipped_tokenizer("spm-v3"), checkpoint / "tokenizer.model.v3")
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(HOSTILE) + ") }}")
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": HOSTILE, "tokenizer_class": HOSTILE, HOSTILE: 1})
    )
    (checkpoint / "config.json").write_text(json.dumps({"model_type": HOSTILE, "architectures": [HOSTILE]}))
    (folder / f"{NAME}.yaml").write_text(
        json.dumps({"base": {"path": HOSTILE}, "data": {"train": [HOSTILE]}, HOSTILE: HOSTILE})
    )
    (folder / f"{NAME}.py").write_text(SCRIPT.format(json.dumps(HOSTILE)))
    (folder / f"{NAME}.xfails").write_text(f"ML601  # {HOSTILE}")
    (folder / f"{NAME}.gguf").write_bytes(
        b"GGUF"
        + b"\x03\0\0\0"
        + b"\0" * 8
        + (1).to_bytes(8, "little")
        + len(HOSTILE.encode()).to_bytes(8, "little")
        + HOSTILE.encode()
        + b"\xff\0\0\0"
    )
    raw = os.fsencode(folder) + b"/\xff\xfe\x1b.jsonl"
    Path(os.fsdecode(raw)).write_text(json.dumps(ROWS[1]) + "\n")
    with contextlib.chdir(folder):
        assert main(["check", f"{NAME}.jsonl", *SPM, "--report", f"{NAME}.report.json"]) == 1
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in a workflow of GitHub."""
    shutil.copytree(made, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path / "x"


SPM = ("--tokenizer", "spm-v3")
RAW = os.fsdecode(b"\xff\xfe\x1b.jsonl")
COMMANDS: dict[str, list[list[str]]] = {
    "init": [
        [f"{NAME}.jsonl", "--base", f"{NAME}.checkpoint", "--dry-run"],
        [f"{NAME}.jsonl", "--base", HOSTILE],
        ["plain.jsonl", "--base", f"{NAME}.checkpoint"],
    ],
    "pin": [[HOSTILE], [f"{NAME}.yaml"], ["a/b", "--branch", HOSTILE]],
    "doctor": [["--json"], []],
    "check": [
        [f"{NAME}.jsonl", *SPM],
        [f"{NAME}.enc.jsonl", RAW, *SPM, "--xfails", f"{NAME}.xfails"],
        [RAW, *SPM],
        [f"{NAME}.adapter", f"{NAME}.gguf", "--as", "adapter"],
        [f"{NAME}.gguf", *SPM],
        ["plain.jsonl", "--tokenizer", f"{NAME}.checkpoint"],
        [f"{NAME}.yaml"],
        [NAME],
        [f"{NAME}.enc.jsonl", *SPM, "--dataset", f"{NAME}.jsonl"],
        ["--runner", f"{NAME}.py", *SPM],
        ["--runner", HOSTILE, *SPM],
    ],
    "render": [
        [f"{NAME}.jsonl", *SPM],
        [f"{NAME}.jsonl", *SPM, "--json"],
        [f"{NAME}.jsonl", *SPM, "--html", f"{NAME}.html"],
        ["plain.jsonl", "--tokenizer", f"{NAME}.checkpoint", "--backend", "chat-template"],
        [RAW, *SPM],
    ],
    "compare": [[f"{NAME}.jsonl", f"{NAME}.jsonl"], [HOSTILE, HOSTILE, "--markdown"]],
    "rules": [[HOSTILE], ["--search", HOSTILE]],
    "import": [
        [f"{NAME}.jsonl", "--to", f"{NAME}.to"],
        [f"{NAME}.jsonl", "--to", f"{NAME}.to", "--lossy", "bad-records"],
        [f"{NAME}.jsonl", "--to", "to", "--lossy", "bad-records", "--json"],
        [f"{NAME}.yaml", "--to", "to2"],
        [RAW, "--to", "to3"],
    ],
    "stats": [[f"{NAME}.jsonl", *SPM], [f"{NAME}.jsonl", *SPM, "--json"], [f"{NAME}.yaml"]],
    "train": [[f"{NAME}.yaml"]],
    "chat": [[f"{NAME}.adapter", "--prompt", HOSTILE], [f"{NAME}.checkpoint", "--prompt", HOSTILE]],
    "smoke": [
        [f"{NAME}.adapter"],
        [f"{NAME}.adapter", "--base", f"{NAME}.checkpoint", "--golden", f"{NAME}.adapter/transcripts"],
        [f"{NAME}.adapter", "--rows", f"{NAME}.jsonl", "--record", NAME, "--check", HOSTILE],
    ],
    "merge": [[f"{NAME}.adapter", f"{NAME}.merged"], [f"{NAME}.adapter", "m", "--base", f"{NAME}.checkpoint"]],
    "verify": [[f"{NAME}.adapter"], [f"{NAME}.adapter", "--base", f"{NAME}.checkpoint", "--dataset", f"{NAME}.jsonl"]],
    "diff": [[f"{NAME}.adapter", f"{NAME}.adapter"], [f"{NAME}.adapter/manifest.json", f"{NAME}.checkpoint"]],
    "note": [[f"{NAME}.adapter"]],
    "serve-check": [
        [f"{NAME}.py=http://127.0.0.1:9", *SPM],
        [HOSTILE, *SPM],
        ["openai=http://127.0.0.1:9/" + HOSTILE, *SPM],
    ],
    "export": [
        [f"{NAME}.yaml", "--to", "trl", "--output", "e"],
        [f"{NAME}.adapter", "--to", "vllm", "--output", f"{NAME}.e"],
    ],
    "template": [["--tokenizer", f"{NAME}.checkpoint"], ["--tokenizer", NAME]],
    "runner": [["setup", "trl", "--python", NAME], ["list"]],
}
"""Command lines of each verb that read hostile texts; a new verb is missing here until it has some."""


def formats(verb: str) -> tuple[str, ...]:
    import argparse

    parser = argparse.ArgumentParser()
    VERB_OF[verb].add_options(parser)
    found = [one.choices for one in parser._actions if "--output-format" in one.option_strings]
    assert all({*(choices or ())} - {"jsonl"} == {*FORMATS} for choices in found)
    return FORMATS if found else ("",)


@pytest.mark.parametrize("verb", VERB_OF)
def test_hostile_texts_are_only_text(verb: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in COMMANDS[verb]:
        for output_format in formats(verb):
            given = [*words, *(["--output-format", output_format] if output_format else [])]
            try:
                code = main([verb, *given])
            except SystemExit as error:
                code = int(str(error.code))
            out, err = capfd.readouterr()
            where = ascii((verb, given))
            assert code in (0, 1, 2), where
            assert "Traceback (most recent" not in out + err, (where, err)
            assert_safe(err)
            assert_safe(out, own=output_format == "github")
            if output_format == "json" and out:
                json.loads(out)
    summary = place.parent / "summary.md"
    if summary.exists():
        assert printable(summary.read_text()) == summary.read_text()
    for page in place.glob("*.html"):
        assert printable(page.read_text()) == page.read_text()


def assert_printable_texts(junit: str) -> None:
    for element in ElementTree.fromstring(junit).iter():
        for text in (element.text or "", *element.attrib.values()):
            assert printable(text) == text


def test_reports_keep_the_values_and_no_character_is_obeyed(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{NAME}.jsonl", *SPM, "--report", f"{NAME}.json", "--report", f"{NAME}.html"]) == 1
    assert_safe(capfd.readouterr().out)
    data = json.loads((place / f"{NAME}.json").read_text())
    # JSON has escapes for them: the value is the file's own
    assert f"{NAME}.jsonl" in data["command"]
    assert any(f"{NAME}.jsonl" in cause["structured"]["place"]["source"] for cause in data["causes"])
    assert all(cause["place"] == printable(cause["place"], lines=False) for cause in data["causes"])
    for file in (*place.glob("*.json"), *place.glob("*.html")):
        text = file.read_text()
        assert printable(text) == text
        assert file.suffix == ".html" or safe_text(text) == text


PYTEST = {
    "rows": [f"--mistral-dataset={NAME}.jsonl", "--mistral-tokenizer=spm-v3"],
    "encoded": [f"--mistral-encoded={NAME}.enc.jsonl", "--mistral-tokenizer=spm-v3", "-k", "encoded"],
    "adapter": [f"--mistral-adapter={NAME}.adapter", "--mistral-no-train"],
    "checkpoint": [
        f"--mistral-tokenizer={NAME}.checkpoint",
        "--mistral-no-train",
        "-k",
        "checkpoint::tokenizer",
    ],
    "runner": [
        f"--mistral-runner={NAME}.py",
        "--mistral-tokenizer=spm-v3",
        "--mistral-no-train",
        "-k",
        "runner",
    ],
    "recipe": [f"--mistral-recipe={NAME}.yaml", "--mistral-no-train"],
    "gguf": [
        f"--mistral-gguf={NAME}.gguf",
        "--mistral-tokenizer=spm-v3",
        "--mistral-no-train",
        "-k",
        "gguf",
    ],
    "usage": [f"--mistral-dataset={NAME}"],
    "xfails": [f"--mistral-dataset={NAME}.jsonl", "--mistral-tokenizer=spm-v3", f"--mistral-xfails={NAME}.xfails"],
}


@pytest.mark.parametrize("words", PYTEST.values(), ids=PYTEST)
def test_hostile_texts_are_only_text_for_pytest(words: list[str], place: Path, pytester: pytest.Pytester) -> None:
    shutil.copytree(place, pytester.path, dirs_exist_ok=True)
    os.chdir(pytester.path)
    result = pytester.runpytest(
        "--mistral-golden",
        "-rA",
        "-v",
        "--junitxml=junit.xml",
        "-p",
        "no:cacheprovider",
        "--mistral-report=report.json",
        *words,
    )
    # pytest's own header has the folder and the arguments of the run
    assert_safe("\n".join(result.outlines), own=True)
    assert_safe("\n".join(line for line in result.errlines))
    if (pytester.path / "junit.xml").is_file():
        assert_printable_texts((pytester.path / "junit.xml").read_text())
    if (pytester.path / "report.json").is_file():
        text = (pytester.path / "report.json").read_text()
        assert safe_text(text) == text
