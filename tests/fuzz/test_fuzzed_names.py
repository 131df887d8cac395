"""Names of files and texts in them, by chance: nothing that a verb prints is obeyed, hidden or a line of its own.

It runs for `fuzzing.SECONDS`; the seed goes on from case to case.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from fuzzing import SECONDS

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.escaping import safe_text

PIECES = (
    *("a", " ", "::error::x", "##[error]x", "##vso[x]", "::", ":", "#", "\n", "\r", "\t", "\x1b[31m", "\x1b]0;x\x07"),
    *(
        "\x9b2J",
        "\x85",
        "\u202e",
        "\u2066",
        "\u2028",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\udcff",
        "\U000e0041",
        "\x7f",
        "\x00",
    ),
    *(
        "[/red]",
        "[bold]",
        "{x}",
        "%0A",
        "'",
        '"',
        "\\",
        "`",
        "|",
        "<b>",
        "]]>",
        "&",
        "é",
        "漢",
        "👩",
        "\nFORGED!",
        "*",
        "?",
        "-",
    ),
    *("--json", "=", "~", "$HOME", ",", "1"),
)
VERBS = (
    "check NAME.jsonl --tokenizer spm-v3 --examples 1 --output-format FORMAT",
    "check NAME.jsonl --tokenizer spm-v3 --examples 1 --report NAME.json --report NAME.html",
    "check NAME --output-format FORMAT",
    "check NAME.enc.jsonl --tokenizer spm-v3 --output-format FORMAT",
    "render NAME.jsonl --tokenizer spm-v3",
    "render NAME.jsonl --tokenizer spm-v3 --json",
    "render NAME.jsonl --tokenizer spm-v3 --html NAME.html",
    "import NAME.jsonl --to NAME.to --lossy bad-records",
    "import NAME.jsonl --to NAME.to --json",
    "stats NAME.jsonl --tokenizer spm-v3",
    "verify NAME",
    "diff NAME NAME",
    "note NAME",
    "init NAME.jsonl --base NAME --dry-run",
    "pin NAME",
    "train NAME.yaml",
    "rules TEXT",
    "template --tokenizer NAME",
    "serve-check NAME --tokenizer spm-v3",
)
FORMATS = ("text", "json", "github")


def text_of(chance: random.Random, most: int) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randrange(1, most)))


def name_of(chance: random.Random) -> str:
    """A name that a file system takes; a byte that is no UTF-8 among its letters."""
    name = text_of(chance, 6).replace("\0", "").replace("/", "").lstrip("-") or "a"
    return name if name not in (".", "..") else "a"


def write(folder: Path, name: str, chance: random.Random) -> None:
    def text() -> str:
        return text_of(chance, 12).replace("\udcff", "\ud800" if chance.random() < 0.5 else "")

    def message() -> dict[str, Any]:
        role = chance.choice(("user", "assistant", "system", "tool", text()))
        return {"role": role, "content": text(), **({text(): text()} if chance.random() < 0.2 else {})}

    rows = [{"messages": [message() for _ in range(chance.randrange(1, 4))], text(): text()} for _ in range(4)]
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    encoded = [{**row, "input_ids": [1, 3, 2], "labels": [-100, 3, chance.choice((2, text()))]} for row in rows]
    (folder / f"{name}.enc.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in encoded))
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": text(), text(): text()}))
    (folder / name / "manifest.json").write_text(json.dumps({"kind": text(), text(): text()}))
    (folder / f"{name}.yaml").write_text(json.dumps({text(): text(), "output": text()}))


def test_nothing_that_is_printed_is_obeyed(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end, number, codes = time.monotonic() + SECONDS, 0, dict[int, int]()
    while time.monotonic() < end:
        chance, folder = random.Random(number), tmp_path_factory.mktemp(f"case{number}")
        name = name_of(chance)
        write(folder, name, chance)
        monkeypatch.chdir(folder)
        output_format = chance.choice(FORMATS)
        values = {"NAME": name, "FORMAT": output_format, "TEXT": text_of(chance, 9)}
        words = chance.choice(VERBS).split()
        for mark, value in values.items():
            words = [word.replace(mark, value) for word in words]
        try:
            code = main(words)
        except SystemExit as error:
            code = int(str(error.code))
        codes[code] = codes.get(code, 0) + 1
        out, err = capfd.readouterr()
        where = ascii(f"case {number}: {words}")
        assert code in (0, 1, 2), where
        assert "Traceback (most recent" not in err, (where, err)
        lines = [*out.split("\n"), *err.split("\n")]
        if output_format == "github":
            lines = [line for line in lines if not line.startswith(("::error ", "::notice ")) or "title=ML" not in line]
        for line in lines:
            assert safe_text(line) == line, (where, ascii(line))
            assert not line.startswith("FORGED!"), (where, ascii(line))
        number += 1
    assert codes.keys() >= {1, 2}, codes
    if SECONDS > 60:
        with capfd.disabled():
            os.write(1, f"\nnames: {number} commands, by exit code {codes}\n".encode())
