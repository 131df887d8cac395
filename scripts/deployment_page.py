"""Run the commands of docs/deployment.md, and write what they print into it: `python scripts/deployment_page.py`.

The page shows each output below its commands. They run in the folder of the demo, whose runs are made shorter here.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.cli.verb import PROGRAM
from pytest_mistral_lora.records.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
BLOCKS = re.compile(r"(```console\n)(.*?)(```\n)(?:(\n```text\n)(.*?)(```\n))?", flags=re.DOTALL)
"""Commands, and their output if the page shows it."""

SHORTER = {"epochs: 40": "epochs: 2", "generations: 4": "generations: 2\n  max_new_tokens: 4"}
"""Changes to the recipe of the demo: the page is about its folders, and not about its answers."""


def prepare(folder: Path) -> None:
    """Make the demo in a folder."""
    run("mistral-lora init --demo --ci none", folder)
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    recipe.write_text(text, encoding="utf-8")


def run(command: str, folder: Path) -> str:
    """Run a command in a folder, and return what it prints; a verb runs in this process, which takes less time."""
    verb, _, rest = command.partition(" | ")
    words = shlex.split(verb)
    if words[0] != PROGRAM:
        return _shell(command, folder, "")
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(words[1:])
    if code and not rest:
        raise RuntimeError(f"{command}: exit code {code}\n{output.getvalue()}{errors.getvalue()}")
    return _shell(rest, folder, output.getvalue()) if rest else output.getvalue()


def _shell(command: str, folder: Path, given: str) -> str:
    # grep returns 1 if it counts nothing
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, input=given, capture_output=True, text=True, check=False, timeout=60
    )
    if done.stderr:
        raise RuntimeError(f"{command}: {done.stderr}")
    return done.stdout


def made(text: str, folder: Path) -> str:
    """Return the text of the page with the outputs of its commands, run in the folder of a demo."""

    def filled(block: re.Match[str]) -> str:
        printed = "".join(run(line.removeprefix("$ "), folder) for line in block[2].splitlines())
        if block[4] is None:
            return block[0]
        return f"{block[1]}{block[2]}{block[3]}{block[4]}{printed}{block[6]}"

    return BLOCKS.sub(filled, text)


def write() -> None:
    """Write the page with its outputs."""
    os.environ |= {"COLUMNS": "100"}
    os.environ.pop("CI", None)
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        write_text(PAGE, made(PAGE.read_text(encoding="utf-8"), Path(temporary)))


if __name__ == "__main__":
    write()
