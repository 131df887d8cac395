"""The command line as a whole: its help, and how each verb ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pytest_mistral_lora.cli import EXIT_CODES, VERBS, main
from pytest_mistral_lora.errors import InputError, MergeError, Terminated

VERB_OF = {name: verb for group in VERBS.values() for name, verb in group.items()}
WORDS = {
    "init": [],
    "pin": ["a/b"],
    "doctor": [],
    "check": [],
    "audit": ["rows.jsonl", "--tokenizer", "."],
    "render": ["rows.jsonl", "--tokenizer", "."],
    "rules": [],
    "import": ["rows.json", "--to", "rows.jsonl"],
    "stats": ["recipe.yaml"],
    "train": ["recipe.yaml"],
    "chat": ["out"],
    "smoke": ["out"],
    "merge": ["out", "merged"],
    "verify": ["out"],
    "diff": ["a", "b"],
    "note": ["out"],
    "serve-check": ["openai=http://127.0.0.1:9", "--tokenizer", "."],
    "export": ["recipe.yaml", "--to", "trl", "--output", "to"],
    "template": ["--tokenizer", "."],
    "runner": ["list"],
}
"""The least that each verb has to be given."""


@pytest.fixture(autouse=True)
def common_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def heard_interrupt() -> Iterator[None]:
    # a command that a shell runs in the background ignores SIGINT, and so do its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def cli(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest_mistral_lora.cli", *words]


def test_help_lists_every_verb_once_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys)
    listed = re.findall(r"^  ([a-z-]+) +\S", text.partition("options:")[0], flags=re.MULTILINE)
    assert listed == list(VERB_OF) == list(WORDS)
    for group in VERBS:
        assert f"\n{group}:\n" in text
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "50")
    assert all(len(line) <= 50 or line.startswith("  $ ") for line in help_of(capsys).splitlines())


def test_each_group_of_verbs_has_an_example_that_can_be_parsed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys)
    for group, verbs in VERBS.items():
        section = text.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        [line] = re.findall(r"^  \$ mistral-lora (.*)$", section, flags=re.MULTILINE)
        verb = line.split()[0]
        monkeypatch.setattr(verbs[verb], "run", lambda args: 0)
        assert main(line.split()) == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="root may write everywhere else")
@pytest.mark.parametrize(
    ("words", "option", "name"),
    [
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--report", "out.html"),
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--report", "out.json"),
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--baseline", "known.txt"),
        (("audit", "--runner", "trl", "--tokenizer", "spm-v3"), "--output", "rows.jsonl"),
        (("render", "rows.jsonl", "--tokenizer", "spm-v3"), "--html", "out.html"),
        (("template", "--tokenizer", "spm-v3"), "--output", "chat.jinja"),
        (("import", "rows.json"), "--to", "rows.jsonl"),
    ],
)
def test_a_file_that_cannot_be_written_is_bad_usage_before_the_work_begins(
    words: tuple[str, ...], option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, found in (
        ("/proc", f"/proc/{name}: cannot be written: No such file"),
        ("nope", "nope: no such folder."),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, option, f"{folder}/{name}"])
        assert f"mistral-lora {words[0]}: error: argument {option}: {found}" in capsys.readouterr().err


def test_the_exit_codes_are_one_table_in_the_help_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)
    for code, meaning in EXIT_CODES.items():
        assert text.count(meaning) == 1
        assert re.search(rf"^  {code} +{re.escape(meaning)}$", text, flags=re.MULTILINE)
    assert list(EXIT_CODES) == [0, 1, 2, 3, 130, 143]


@pytest.mark.parametrize("verb", VERB_OF)
def test_the_help_of_a_verb_has_an_example_that_can_be_parsed(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, verb)
    assert f"usage: mistral-lora {verb}" in text
    assert "143" not in text
    assert "%%" not in text
    examples = re.findall(rf"^  mistral-lora ({verb}\b.*)$", text, flags=re.MULTILINE)
    assert examples
    monkeypatch.setattr(VERB_OF[verb], "run", lambda args: 0)
    for line in examples:
        assert main(line.partition(" >")[0].split()) == 0


@pytest.mark.parametrize(
    ("verb", "words"), [("note", "DECISION.md and README.md"), ("template", "{% generation %}"), ("render", "JSONL")]
)
def test_names_in_help_keep_their_letters(verb: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in help_of(capsys, verb)


@pytest.mark.parametrize(
    ("word", "hint"), [("chek", " (did you mean 'check'?)"), ("xyzzy", ": choose one of init, pin, doctor, check")]
)
def test_an_unknown_verb_is_bad_usage_with_a_suggestion(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([word, "recipe.yaml"])
    assert f"unknown verb {word!r}{hint}" in capsys.readouterr().err


def test_no_verb_is_bad_usage_and_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "check recipes and their rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (
            ["check", "spm-v3", "--tokeniser", "x"],
            "unrecognized arguments: --tokeniser x (did you mean '--tokenizer'?)",
        ),
        (["stats", "rows.jsonl", "--jsn"], "unrecognized arguments: --jsn (did you mean '--json'?)"),
        (["rules", "--qqqqq=1"], "unrecognized arguments: --qqqqq=1"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["stats", "x", "--processes", "0"], "argument --processes: '0'; expected a whole number, 1 or more"),
        (["audit", "x", "--show", "-1"], "argument --show: '-1'; expected a whole number, 0 or more"),
        (["audit", "x", "--time-limit", "nan"], "--time-limit: 'nan'; expected a number of seconds, more than 0"),
        (["chat", "x", "--seed", "9" * 30], "expected a whole number, 0 or more"),
        (["render", "x", "--json", "--no-ids"], "argument --no-ids: not allowed with argument --json"),
    ],
)
def test_an_option_that_cannot_be_used_is_bad_usage_with_the_usage_of_its_verb(
    words: list[str], end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    err = capsys.readouterr().err
    assert err.startswith(f"usage: mistral-lora {words[0]} ")
    assert err.endswith(f"{end}\n")


_OF_FOLDERS = (["verify"], ["smoke"], ["note"], ["chat", "--prompt", "hi"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["check", "spm-v3x"], "spm-v3x: no such file or folder (did you mean 'spm-v3'?)"),
        (["check", "{here}/recpie.yaml"], "recpie.yaml: no such file or folder (did you mean 'recipe.yaml'?)"),
        (["serve-check", "lamacpp=http://127.0.0.1:1", "--tokenizer", "spm-v3"], "(did you mean 'llamacpp'?)"),
        *(([*words, "{here}/lora-oot"], "no such folder (did you mean 'lora-out'?)") for words in _OF_FOLDERS),
        (["merge", "{here}/lora-oot", "{here}/merged"], "(did you mean 'lora-out'?)"),
        (["train", "{here}/recpie.yaml"], "recpie.yaml: No such file (did you mean 'recipe.yaml'?)"),
        (["train", "rows.jsonl"], "Write a recipe for it: mistral-lora init rows.jsonl --base OWNER/NAME"),
        (["serve-check", "vllm", "--tokenizer", "spm-v3"], "vllm: no address of a server"),
        (["check", "rows.jsonl", "--tokenizer", "a/b"], "Print the commit: mistral-lora pin a/b"),
        (["check", "spm-v3", "--xfails", "nope.txt"], "--xfails: nope.txt cannot be read: No such file or directory"),
        (
            ["check", "spm-v3", "--base", "{here}"],
            "--base is the base of an adapter or a merged model, and no path is one",
        ),
        (["smoke", "{here}/recipe.yaml"], "recipe.yaml: a file; expected the folder of an adapter"),
        (["export", "{here}/lora-oot", "--to", "vllm", "--output", "x"], "(did you mean 'lora-out'?)"),
        (["check", "{here}/link"], "link: no such file or folder\n"),
        (["template", "--tokenizer", "a" * 300], "error: File name too long: 'aaa"),
        (["audit", "rows.jsonl", "--tokenizer", "spm-v3", "--config", "x"], "--config is for the rows of --runner"),
        (["smoke", "{here}/lora-out", "--check", "json"], "--check is recorded with the answers"),
        (["serve-check", "http://[::1", "--tokenizer", "spm-v3"], "http://[::1: no address of a server"),
        (["serve-check", "vllm=http://127.0.0.1:99999", "--tokenizer", "spm-v3"], "99999: no address of a server"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_right_one(
    words: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "lora-out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert main([word.format(here=tmp_path) for word in words]) == 2
    assert found in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pytest_mistral_lora.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    print('modules:', *sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in result.stdout.partition("modules:")[2].split()}
    assert "pytest_mistral_lora" in names
    heavy = {"torch", "transformers", "numpy", "pydantic", "jinja2", "mistral_common", "rich", "yaml", "pytest"}
    assert not names & heavy


def raised(error: BaseException) -> Callable[[object], int]:
    def run(args: object) -> int:
        raise error

    return run


def torch_out_of_memory(args: object) -> int:
    """Run out of the host's memory as torch itself does: 2 ** 60 bytes."""
    return len(torch.empty(1 << 60, dtype=torch.uint8))


def signalled(number: int) -> Callable[[object], int]:
    def run(args: object) -> int:
        signal.raise_signal(number)
        time.sleep(10)
        return 0

    return run


ENDS: dict[str, tuple[Callable[[object], int], int, str]] = {
    "bad input": (raised(InputError("a bad key", place="recipe.yaml")), 2, "error: recipe.yaml: a bad key\n"),
    "no such file": (raised(FileNotFoundError(2, "No such file or directory", "x.jsonl")), 2, "'x.jsonl'"),
    "a path that the system refuses": (
        raised(OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300)),
        2,
        f"error: File name too long: '{'a' * 300}'\n",
    ),
    "a full disk": (
        raised(OSError(errno.ENOSPC, "No space left on device", "x.html")),
        1,
        "error: No space left on device: 'x.html'\n",
    ),
    "may not": (
        raised(PermissionError(13, "Permission denied", "x.html")),
        2,
        "error: Permission denied: 'x.html'\n",
    ),
    "failed": (raised(MergeError("another answer")), 1, "error: another answer\n"),
    "host memory": (raised(MemoryError()), 3, "error: out of memory\n"),
    "torch's host memory": (torch_out_of_memory, 3, "error: out of memory: "),
    "device memory": (raised(torch.OutOfMemoryError("CUDA out of memory.")), 3, "error: out of memory: CUDA out of"),
    "interrupted": (raised(KeyboardInterrupt()), 130, "error: interrupted\n"),
    "terminated": (raised(Terminated()), 143, "error: terminated\n"),
    "SIGINT": (signalled(signal.SIGINT), 130, "error: interrupted\n"),
    "SIGTERM": (signalled(signal.SIGTERM), 143, "error: terminated\n"),
    "finding": (lambda args: 1, 1, ""),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("verb", VERB_OF)
def test_every_verb_ends_with_the_code_of_the_table(
    verb: str, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, code, message = ENDS[end]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(VERB_OF[verb], "run", run)
    assert main([verb, *WORDS[verb]]) == code
    assert message in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_memory_that_runs_out_comes_with_the_advice_of_the_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, option in (("smoke", "--device cpu"), ("merge", "--dtype"), ("verify", "--rerun")):
        monkeypatch.setattr(VERB_OF[verb], "run", torch_out_of_memory)
        assert main([verb, *WORDS[verb]]) == 3
        assert option in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VERB_OF["rules"], "run", raised(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["rules"])


FORKED = """
import os, signal, sys, time
from pytest_mistral_lora import cli

def run(args):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(reading, 1)  # Python drops signals that reach a child before it has begun
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

cli.rules.VERB.run = run
sys.exit(cli.main(["rules"]))
"""


def test_a_forked_child_is_terminated_quietly() -> None:
    result = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (143, "", "")


def test_a_locale_without_the_characters_or_a_closed_stream_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "usér", "content": "x"}]}\n', encoding="utf-8")
    words = ["check", str(file), "--tokenizer", "spm-v3"]
    printed = io.BytesIO()
    # as Python opens it under LC_ALL=C, and on Windows in a pipe
    for given in (
        io.TextIOWrapper(printed, "ascii", errors="surrogateescape"),
        io.TextIOWrapper(io.BytesIO(), "cp1252"),
        None,
    ):
        monkeypatch.setattr(sys, "stdout", given)
        assert main(words) == 1
        if given is None:
            sys.stdout.close()
    assert b"messages[0].role: 'us\\xe9r'" in printed.getvalue()


CLOSED = """
import json, os, sys, tempfile
from pytest_mistral_lora import cli

ends = []
for verb, words in json.loads(sys.argv[1]).items():
    for size in (1, 100_000):
        with tempfile.TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                reading, writing = os.pipe()
                os.close(reading)
                os.dup2(writing, 1)
                os.dup2(errors.fileno(), 2)
                for group in cli.VERBS.values():
                    for one in group.values():
                        one.run = lambda args: int(bool(print("x" * size)))
                sys.exit(cli.main([verb, *words]))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            ends.append([verb, size, code, errors.read().decode()])
print(json.dumps(ends))
"""


def test_a_closed_pipe_is_no_traceback() -> None:
    # each verb in a copy of one process, which ends as a process of its own does
    command = [sys.executable, "-c", CLOSED, json.dumps(WORDS)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[verb, size, 1, ""] for verb in WORDS for size in (1, 100_000)]


@pytest.mark.parametrize("words", [("--help",), ("rules",), ("rules", "--json"), ("runner", "list")])
def test_a_real_pipe_that_is_closed(words: tuple[str, ...], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "MISTRAL_LORA_CACHE": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, argparse itself passes over the error
    result = subprocess.run(cli(*words), stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full, on Linux")
def test_an_output_on_a_full_disk_is_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(cli("rules"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.parametrize("words", [["nope.yaml"], []])
def test_the_module_that_launchers_start_is_the_verb_train(words: list[str], tmp_path: Path) -> None:
    results = [
        subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        for command in (cli("train", *words), [sys.executable, "-m", "pytest_mistral_lora.training", *words])
    ]
    assert [one.returncode for one in results] == [2, 2]
    assert results[0].stderr == results[1].stderr != ""
