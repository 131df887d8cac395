"""`mistral-lora check` in this process, and rows of which the third can be made to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_mistral_lora.cli import main


def rows(folder: Path, third: str) -> None:
    lines = [[("user", f"Question {n}"), ("assistant", f"Answer {n}")] for n in range(2)]
    lines.append([("user", "Question"), (third, "Answer")])
    data = [{"messages": [{"role": role, "content": text} for role, text in line]} for line in lines]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


def check(capsys: Any, *words: str) -> tuple[int, str]:
    code = main(["check", *words, "--examples", "1"])
    return code, capsys.readouterr().out
