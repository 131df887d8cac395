from __future__ import annotations

import io
import json
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.escaping import SafeStream, own_stream, printable, safe_json, safe_streams, safe_text

COMMANDS = ("::error::x", " \t::set-output name=a::b", "::stop-commands::x", "a ##[error]x", "##vso[task.x]y")
COMMANDS += ("##VSO[task.x]y", "##teamcity[x]", "\u3000::add-mask::x", "a\n\n ::error::x")


def test_every_character_that_is_obeyed_or_hidden_is_spelled_out() -> None:
    kept = {"\n", "\t"}
    for number in range(sys.maxunicode + 1):
        letter = chr(number)
        category = unicodedata.category(letter)
        if category != "Cn":  # a later Python may know what it is
            hidden = category in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in kept
            assert (printable(letter) != letter) == hidden, f"U+{number:04X}"
    assert printable("a\x1b[31m\x9b\r\x7f\u202e\u200b\ud800 b\n\tc") == (
        "a\\x1b[31m\\x9b\\r\\x7f\\u202e\\u200b\\ud800 b\n\tc"
    )
    assert printable("a\nb\tc", lines=False) == "a\\nb\\tc"
    assert printable(printable("\x1b\u202e")) == "\\x1b\\u202e"


def test_joiners_stay_where_they_are_a_part_of_the_spelling() -> None:
    for text in ("👩\u200d💻", "👩🏽\u200d💻", "🏳️\u200d🌈", "क्\u200dष", "\u0645\u06cc\u200c\u062e"):
        assert printable(text) == text
    for text in ("admin\u200d", "\u200dadmin", "ad\u200cmin", "👩\u200d", "\u200d💻"):
        assert "\\u200" in printable(text), text


@pytest.mark.parametrize("text", COMMANDS)
def test_no_line_is_a_command_of_a_ci_system(text: str) -> None:
    assert safe_text(text) != text
    assert safe_text(safe_text(text)) == safe_text(text)
    for end in range(1, len(text)):  # in two parts, wherever it is cut
        stream = io.StringIO()
        safe = SafeStream(stream)
        assert safe.write(text[:end]) + safe.write(text[end:]) == len(text)
        assert safe_text(stream.getvalue()) == stream.getvalue(), end
    assert safe_text("std::string, a: b; # [x] ## y") == "std::string, a: b; # [x] ## y"


def test_a_line_stays_the_same_line_however_it_is_cut() -> None:
    text = "a" * 30 + " :: b\n" + " " * 40 + ": c ## d [\n: e\n"
    for step in (1, 2, 7):
        stream = io.StringIO()
        SafeStream(stream).writelines(text[start : start + step] for start in range(0, len(text), step))
        assert stream.getvalue() == text


@pytest.mark.parametrize("indent", [None, 2])
def test_json_reads_back_as_the_same_text(indent: int | None) -> None:
    data = {"a\x9b": ["\\\x1b\u202e\u2028\U000e0041\x7f", *COMMANDS], "👩\u200d💻": "é\u00a0\u3000"}
    text = safe_json(data, indent=indent)
    assert json.loads(text) == data
    assert "👩\u200d💻" in text
    assert "é" in text
    assert safe_text(text) == text
    assert json.loads(safe_json({"path": Path("a\x1b")})) == {"path": "a\x1b"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_of_another_library_is_drawn_anew_on_a_terminal_alone() -> None:
    parts = ("\ra  1%\x1b[31m", "\n\n\x1b[A", "\x1b[A", "\r", "a\rb", "c")
    for stream, expected in (
        (Terminal(), "\ra  1%\\x1b[31m\n\n\x1b[A\x1b[A\ra\\rbc"),
        (io.StringIO(), "\\ra  1%\\x1b[31m\n\n\\x1b[A\\x1b[A\\ra\\rbc"),
    ):
        safe = SafeStream(stream, redraws=True)
        safe.writelines(parts)
        assert stream.getvalue() == expected
    shown = Terminal()
    SafeStream(shown).write("\ra")
    assert shown.getvalue() == "\\ra"


def test_both_streams_are_safe_within_a_command_and_an_error_leaves_them_so(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with safe_streams():
        sys.stderr.write("\x1b\n")
        sys.stdout.write("::error::x\n")
        own_stream(sys.stdout).write("::notice::y\n")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == (":\\x3aerror::x\n::notice::y\n", "\\x1b\n")
    with pytest.raises(SystemExit), safe_streams():
        sys.exit(2)
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(ZeroDivisionError), safe_streams():
        _ = 1 / 0
    # the interpreter prints the traceback after the command
    assert isinstance(sys.stderr, SafeStream)
    sys.stdout, sys.stderr = before
    assert own_stream(cast("io.TextIOWrapper", before[0])) is before[0]


def test_usage_that_is_wrong_is_printed_safely(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["check", "--x\x1b[31m\u202e"], ["\x1b]0;x\x07"], ["rules", "\x9b31m"], ["render", "a\n::error::b"]):
        with suppress(SystemExit):
            assert main(words) == 2
        out, err = capsys.readouterr()
        assert safe_text(out + err) == out + err


def test_a_place_is_one_line() -> None:
    error = InputError("two\nlines", place="a\nerror: all is well", expected="\x1b", next_step="\u202e")
    assert str(error) == "a\\nerror: all is well: two\n  lines; expected \\x1b. \\u202e"
