"""No input is ever an output: each verb declares what it reads and writes, and one function keeps them apart."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from verb_words import VERB_OF, WORDS

from pytest_mistral_lora.cli import main, program
from pytest_mistral_lora.cli.verb import PathArgument, whole_number
from pytest_mistral_lora.plugin.options import OPTIONS, WRITTEN
from pytest_mistral_lora.records.files import clash

# every argument that takes a word and names no path, with the verb; a new one is added here, or is a PathArgument
NO_PATHS = {
    ("pin", "--branch"),
    ("check", "--device-memory"),
    ("check", "--task"),
    ("check", "--time-limit"),
    ("rules", "ids"),
    ("rules", "--search"),
    *((verb, "--objective") for verb in ("check", "render", "stats")),
    *((verb, "--rules") for verb in ("check", "verify", "smoke", "serve-check")),
    ("check", "--fail-on"),
    *((verb, option) for verb in ("import", "stats") for option in ("--lossy", "--dataset")),
    ("chat", "--prompt"),
    ("chat", "--system"),
    ("serve-check", "--model"),
    ("export", "--name"),
}


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from arguments(child)
        elif action.nargs != 0 and action.choices is None:
            yield action


@cache
def of_verbs() -> tuple[tuple[str, str, argparse.Action], ...]:
    [verbs] = [one for one in program._parser()._actions if isinstance(one, argparse._SubParsersAction)]
    assert list(verbs.choices) == [name for one in VERB_OF.values() for name in (one.name, one.alias) if name]
    return tuple(
        (verb, (action.option_strings or [action.dest])[0], action)
        for verb in VERB_OF
        for action in arguments(verbs.choices[verb])
    )


def test_every_argument_is_declared() -> None:
    undeclared = set()
    for verb, name, action in of_verbs():
        is_number = action.type is float or getattr(action.type, "func", action.type) is whole_number
        if not isinstance(action.type, PathArgument) and not is_number:
            undeclared.add((verb, name))
    assert undeclared == NO_PATHS
    written = {(verb, name) for verb, name, one in of_verbs() if getattr(one.type, "role", "") == "written"}
    assert written == {
        *((verb, option) for verb in JUDGING for option in ("--write-xfails", "--report")),
        ("check", "--output"),
        ("render", "--html"), ("import", "--to"),
        ("smoke", "--record"), ("merge", "output"), ("serve-check", "--report"), ("serve-check", "--kept"),
        ("export", "--output"),
        ("template", "--output"),
    }  # fmt: skip


RECIPE = f"""\
base: {{path: base, weights_sha256: "{"0" * 64}"}}
data: {{train: [rows.json]}}
training: {{epochs: 1}}
output: out
"""
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
JUDGING = ("check", "verify", "smoke")
ENDING = {(verb, "--report"): ".json" for verb in (*JUDGING, "serve-check")}
CASES = [
    (verb, output, given)
    for verb, output, one in of_verbs()
    if getattr(one.type, "role", "") == "written"
    for other, given, two in of_verbs()
    if other == verb and getattr(two.type, "role", "") == "read"
]


REFUSED = ("which this command reads", "and was not written by this command", "not allowed with argument --record")


def words(verb: str, output: str, given: str, path: str, target: str) -> list[str]:
    """A command line that reads `path` by one argument and writes `target` by another one."""
    values = {output: target, given: path}
    found = [verb]
    needed = [name for own, name, one in of_verbs() if own == verb and (one.required or not one.option_strings)]
    others = {"--tokenizer": "spm-v3", "--to": "trl", "--output": "other-output", "server": "openai=http://127.0.0.1:9"}
    if (verb, given) == ("check", "--runner"):
        needed.remove("paths")
    for name in dict.fromkeys([*needed, output, given]):
        value = values.get(name, others.get(name, "other.jsonl"))
        found += [name, value] if name.startswith("--") else [value]
    if verb == "export":
        found += ["--to", "vllm" if given == "--base" else "trl"]
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ends(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Run a command that has to end as bad usage or input, and return its error."""
    try:
        code = main(command)
    except SystemExit as error:
        code = int(str(error.code))
    err = capsys.readouterr().err
    assert code == 2, (command, err)
    assert "Traceback" not in err
    return err


@pytest.mark.of_field
@pytest.mark.parametrize(("verb", "output", "given"), CASES)
def test_no_output_is_an_input(
    verb: str, output: str, given: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = ENDING.get((verb, output), ".py" if (verb, given) == ("check", "--runner") else ".jsonl")
    name = f"mine{ending}"
    (place / "data").mkdir()
    (place / "data" / name).write_text(json.dumps(ROW) + "\n")
    (place / f"link{ending}").symlink_to(place / "data" / name)
    os.link(place / "data" / name, place / f"hard{ending}")
    (place / "folder").symlink_to(place / "data")
    before = bytes_of(place)
    # in whatever spelling: `test_paths_meet_on_the_disk`
    for target in (f"folder/{name}", f"hard{ending}"):
        prefix = {"server": "", "--check": "json_schema="}.get(given, "")
        read = f"{prefix}data/{name}" + ("=http://127.0.0.1:9" if given == "server" else "")
        error = ends(capsys, words(verb, output, given, read, target))
        assert any(reason in error for reason in REFUSED), error
        assert bytes_of(place) == before, target


@pytest.mark.of_field
@pytest.mark.parametrize(("verb", "output", "given"), CASES)
def test_no_output_is_inside_a_folder_that_is_read(
    verb: str, output: str, given: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if given == "--xfails" or (verb, given) in {("serve-check", "server"), ("check", "--runner"), ("smoke", "--check")}:
        return  # never a folder
    (place / "read").mkdir()
    (place / "read" / "manifest.json").write_text("{}")
    before = bytes_of(place)
    inside = (verb, output) in {("template", "--output"), ("smoke", "--record")}
    for target in ("read/new.json", "read/manifest.json", "read/../read/new.json"):
        if inside and target != "read/manifest.json":
            continue  # their place is there
        error = ends(capsys, words(verb, output, given, "read", target))
        assert bytes_of(place) == before
        assert "is inside read" in error or "was not written by this command" in error or "--oracle" in error or inside


def test_what_a_recipe_names_is_read_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "base").mkdir()
    (place / "rows.json").write_text(json.dumps(ROW) + "\n")
    (place / "recipe.yaml").write_text(RECIPE)
    for target, found in (("rows.json", "rows.json"), ("base/x.json", "base"), ("out/x.json", "out")):
        if target == "out/x.json":
            (place / "out").mkdir()
        (place / target).touch()
        error = ends(capsys, ["check", "recipe.yaml", "--report", target])
        assert f"{found}, which this command reads" in error or "was not written" in error, error


def test_only_our_own_files_are_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "other.jsonl"
    mine = {"x.json": '{"a": 1}', "x.html": "<p>", "y.rows.html": "<p>", "t.txt": "text", "enc.jsonl": "{}\n"}
    for name, text in mine.items():
        (place / name).write_text(text)
    judged = ["check", rows, "--tokenizer", "spm-v3", "--examples", "1"]
    for command in (
        [*judged, "--report", "x.json"],
        [*judged, "--report", "x.html"],
        [*judged, "--report", "y.json"],
        ["render", rows, "--tokenizer", "spm-v3", "--html", "x.html"],
        ["template", "--tokenizer", "spm-v3", "--output", "t.txt"],
        ["template", "--tokenizer", "spm-v3", "--output", "other.jsonl"],
        ["check", "--runner", "trl", "--tokenizer", "spm-v3", "--output", "enc.jsonl"],
    ):
        assert "was not written by this command" in ends(capsys, command)
    assert {name: (place / name).read_text() for name in mine} == mine
    # an empty file, as `mktemp` makes it, and an earlier output
    for option, name in (("--html", "p.html"), ("--report", "r.json"), ("--report", "r.html"), ("--output", "t.jinja")):
        (place / name).touch()
        command = {"--report": judged, "--html": ["render", rows, "--tokenizer", "spm-v3"]}.get(
            option, ["template", "--tokenizer", "spm-v3"]
        )
        for _ in range(2):
            assert main([*command, option, name]) == 0, name
            assert (place / name).stat().st_size
    # a page of tokens is no report, and the other way round
    assert "was not written" in ends(capsys, [*judged, "--report", "p.html"])
    assert "was not written" in ends(capsys, ["render", rows, "--tokenizer", "spm-v3", "--html", "r.html"])
    assert "is written for --report, too" in ends(capsys, [*judged, "--report", "z.rows.html", "--report", "z.json"])
    assert "is written for --write-xfails, too" in ends(
        capsys, [*judged, "--report", "z.json", "--write-xfails", "z.json"]
    )


def test_the_page_beside_a_report_goes_with_it(place: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    rows = place / "other.jsonl"
    sound = rows.read_text()
    rows.write_text(json.dumps({"messages": [*ROW["messages"], {"role": "tool", "content": "x"}]}) + "\n")
    assert main(["check", "other.jsonl", "--tokenizer", "spm-v3", "--report", "r.json"]) == 1
    rows.write_text(json.dumps(bad) + "\n")
    assert main(["check", "other.jsonl", "--tokenizer", "spm-v3", "--report", "r.json"]) in (0, 1)
    (place / "r.rows.html").write_text(
        '<meta charset="utf-8">\n<meta name="generator" content="pytest-mistral-lora, tokens">'
    )
    rows.write_text(sound)
    assert main(["check", "other.jsonl", "--tokenizer", "spm-v3", "--report", "r.json"]) == 0
    assert not (place / "r.rows.html").exists()


@pytest.mark.parametrize(("verb", "output"), sorted({(verb, output) for verb, output, _ in CASES}))
def test_an_output_is_a_regular_file_or_a_new_folder(
    verb: str, output: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending = ENDING.get((verb, output), ".jsonl")
    os.mkfifo(place / f"pipe{ending}")
    (place / f"folder{ending}").mkdir()
    (place / f"folder{ending}" / "x").touch()
    (place / f"null{ending}").symlink_to("/dev/null")
    null = Path("/dev/null").stat()
    for name in (f"pipe{ending}", f"folder{ending}", f"null{ending}"):
        if (verb, output) == ("smoke", "--record") and name.startswith("folder"):
            continue  # it may hold the transcripts
        ends(capsys, words(verb, output, output, name, name))
    if not ending.endswith(".json"):
        ends(capsys, words(verb, output, output, "/dev/null", "/dev/null"))
    assert stat.S_ISFIFO((place / f"pipe{ending}").stat().st_mode)
    assert (Path("/dev/null").stat().st_mode, Path("/dev/null").stat().st_rdev) == (null.st_mode, null.st_rdev)
    assert bytes_of(place / f"folder{ending}") == {"x": b""}


def test_a_link_that_leads_to_itself_is_no_traceback(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("adapter", "base"):
        (place / name).mkdir()
    (place / "loop").symlink_to("loop")
    for words in (["adapter", "loop", "--base", "base"], ["loop", "out", "--base", "base"]):
        ends(capsys, ["merge", *words])


@pytest.mark.parametrize("verb", VERB_OF)
def test_a_null_character_is_bad_usage(verb: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # one function looks at all words
    options = [[name, "a\0b.json"] for own, name, _ in of_verbs() if own == verb and name.startswith("--")]
    for extra in (["a\0b"], *options[-1:]):
        error = ends(capsys, [verb, *WORDS[verb], *extra])
        assert "null character" in error
        assert "\0" not in error


def test_paths_meet_on_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    os.link(folder / "file", tmp_path / "hard")
    for name, target in (("link", folder), ("loop", "loop"), ("dangling", "gone")):
        (tmp_path / name).symlink_to(target)
    for output, source, expected in (
        ("folder/file", "folder/file", "is"),
        ("hard", "folder/file", "is"),
        ("link/../folder/./file", "hard", "is"),
        ("link/new", "folder", "is inside"),
        ("folder/a/b/c", "link", "is inside"),
        ("folder", "link/file", "holds"),
        ("gone", "dangling", "is"),
        ("new", "new", "is"),
        ("new", "new/file", "holds"),
        ("loop", "folder", ""),
        ("loop", "loop", "is"),
        ("folder-2", "folder", ""),
        ("folder/file2", "folder/file", ""),
        ("a\0b", "folder", ""),
    ):
        try:
            found = clash(tmp_path / output, tmp_path / source)
        except ValueError:
            found = ""
        assert found == expected, (output, source)


READ = [one for one in OPTIONS if one.metavar and one not in WRITTEN and one.metavar not in ("N", "FORMAT", "DEVICE")]


@pytest.mark.usefixtures("suite_libraries")
@pytest.mark.parametrize("option", READ, ids=lambda one: one.flag)
def test_no_report_of_pytest_is_an_input(option: object, pytester: pytest.Pytester) -> None:
    flag, metavar = option.flag, option.metavar  # type: ignore[attr-defined]
    read = pytester.path / "read"
    read.mkdir()
    (read / "x.json").write_text(json.dumps(ROW) + "\n")
    (read / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    value = {"[NAME=]URL": "read/x.json=http://127.0.0.1:9", "NAME[=FILE]": "trl=read/x.json"}.get(
        metavar, "read/x.json"
    )
    folder = flag in ("--mistral-adapter", "--mistral-base", "--mistral-golden-dir")
    before = bytes_of(pytester.path)
    others = ["--mistral-tokenizer=spm-v3", "--mistral-adapter=read", "--mistral-server=openai=http://127.0.0.1:9"]
    words = [f"{flag}={'read' if folder else value}", *(one for one in others if not one.startswith(f"{flag}="))]
    report = "--mistral-report=read/../read/x.json"
    result = pytester.runpytest("--mistral-golden", *words, report, "-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert bytes_of(pytester.path) == before


@pytest.mark.usefixtures("suite_libraries")
@pytest.mark.parametrize("option", [one for one in OPTIONS if one.metavar], ids=lambda one: one.flag)
def test_a_null_character_is_an_error_of_usage_for_pytest(option: object, pytester: pytest.Pytester) -> None:
    flag, ini = option.flag, option.ini  # type: ignore[attr-defined]
    result = pytester.runpytest("--mistral-golden", f"{flag}=a\0b.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "\0" not in result.stderr.str()
    if ini:
        (pytester.path / "pytest.ini").write_bytes(f"[pytest]\n{ini} = a\0b\n".encode())
        result = pytester.runpytest("--mistral-golden")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
