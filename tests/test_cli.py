"""The help of the command line, and words that it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from verb_words import VERB_OF, WORDS

from pytest_mistral_lora.cli import EXIT_CODES, VERBS, main


@pytest.fixture(autouse=True)
def common_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ("--json", "rules", "ML204"),
        ("rules", "--json", "ML204"),
        ("--search", "pad", "--json", "rules"),
    ],
)
def test_options_may_stand_before_the_verb(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "ML204" in [rule["id"] for rule in json.loads(capsys.readouterr().out)]


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
    assert all(len(line) <= 50 for line in help_of(capsys).splitlines())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="root may write everywhere else")
@pytest.mark.parametrize(
    ("words", "option", "name"),
    [
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--report", "out.html"),
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--report", "out.json"),
        (("check", "rows.jsonl", "--tokenizer", "spm-v3"), "--write-xfails", "known.txt"),
        (("check", "--runner", "trl", "--tokenizer", "spm-v3"), "--output", "rows.jsonl"),
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


@pytest.mark.of_field
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
    ("word", "hint"), [("chek", " (did you mean 'check'?)"), ("xyzzy", ": choose one of init, import, stats, check")]
)
def test_an_unknown_verb_is_bad_usage_with_a_suggestion(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([word, "recipe.yaml"])
    assert f"unknown verb {word!r}{hint}" in capsys.readouterr().err


def test_no_verb_is_bad_usage_and_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "check recipes, rows, ids and labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (
            ["check", "spm-v3", "--tokeniser", "x"],
            "--tokeniser x (did you mean '--tokenizer'?)",
        ),
        (["stats", "rows.jsonl", "--jsn"], "unrecognized arguments: --jsn (did you mean '--json'?)"),
        (["rules", "--qqqqq=1"], "unrecognized arguments: --qqqqq=1"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["stats", "x", "--processes", "0"], "--processes: '0'; expected a whole number, 1 or more"),
        (["check", "x", "--show", "-1"], "argument --show: '-1'; expected a whole number, 0 or more"),
        (["check", "x", "--time-limit", "nan"], "'nan'; expected a number of seconds, more than 0"),
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
    assert f"\n\nusage: mistral-lora {words[0]} " in err
    assert err.partition("\n")[0].endswith(end)


@pytest.mark.parametrize("columns", ["1", "2", "3", "-5"])
def test_any_width_of_a_terminal_shows_the_help(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for words in ((), ("check",)):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        assert "mistral-lora" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["check --tokenizer=--", "rules --search=--", "import rows.jsonl --to=--"])
def test_an_option_without_a_value_is_bad_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(verb.split())
    assert capsys.readouterr().err.startswith(f"mistral-lora: error: {verb.split()[-1]}: expected a value\n")


_OF_FOLDERS = (["verify"], ["smoke"], ["note"], ["chat", "--prompt", "hi"])


@pytest.mark.of_field
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["check", "spm-v3x"], "spm-v3x: no such file or folder (did you mean 'spm-v3'?)"),
        (["check", "{here}/recpie.yaml"], "recpie.yaml: no such file or folder (did you mean"),
        (["serve-check", "lamacpp=http://127.0.0.1:1", "--tokenizer", "spm-v3"], "(did you mean 'llamacpp'?)"),
        *(([*words, "{here}/lora-oot"], "no such folder (did you mean 'lora-out'?)") for words in _OF_FOLDERS),
        (["merge", "{here}/lora-oot", "{here}/merged"], "(did you mean 'lora-out'?)"),
        (["train", "{here}/recpie.yaml"], "recpie.yaml: No such file (did you mean 'recipe.yaml'?)"),
        (["train", "rows.jsonl"], "mistral-lora init rows.jsonl --base OWNER/NAME"),
        (["serve-check", "vllm", "--tokenizer", "spm-v3"], "vllm: no address of a server"),
        (["check", "rows.jsonl", "--tokenizer", "a/b"], "Print the commit: mistral-lora pin a/b"),
        (["check", "spm-v3", "--xfails", "nope.txt"], "--xfails: nope.txt cannot be read: No such file or directory"),
        (
            ["check", "spm-v3", "--base", "{here}"],
            "--base is the base of an adapter",
        ),
        (["smoke", "{here}/recipe.yaml"], "recipe.yaml: a file; expected the folder of an adapter"),
        (["export", "{here}/lora-oot", "--to", "vllm", "--output", "x"], "(did you mean 'lora-out'?)"),
        (["check", "{here}/link"], "link: no such file or folder\n"),
        (["template", "--tokenizer", "a" * 300], "error: File name too long: 'aaa"),
        (["check", "rows.jsonl", "--tokenizer", "spm-v3", "--config", "x"], "--config is for the rows of --runner"),
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
    assert found.format(here=tmp_path) in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "words",
    [
        ["check", "--tokeniser", "x"],
        ["check", "--examples", "none"],
        ["check", "--as", "x"],
        ["chekc"],
        ["check", "--report"],
        ["merge"],
        ["smoke", "x", "--golden", "a", "--record", "b"],
    ],
)
def test_a_wrong_option_is_named_before_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    out, err = capsys.readouterr()
    first, _, rest = err.partition("\n")
    assert out == ""
    assert first.startswith("mistral-lora")
    assert ": error: " in first
    assert rest.lstrip().startswith("usage: ")
