"""Outputs that are inputs, by chance: verbs, paths and their spellings are drawn, and no byte may change.

It runs for `fuzzing.SECONDS`; the seed goes on from case to case.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import SECONDS

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.report.pages import is_report_page, is_tokens_page

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
# each reads IN and writes OUT; a third word of a path is read, too
COMMANDS = (
    "check IN --tokenizer spm-v3 --examples 1 --report OUT",
    "check IN --tokenizer spm-v3 --examples 1 --report OUT --report OUT2",
    "check IN --tokenizer spm-v3 --examples 1 --write-xfails OUT",
    "check IN --tokenizer spm-v3 --examples 1 --xfails IN2 --report OUT",
    "check IN --base IN2 --report OUT",
    "render IN --tokenizer spm-v3 --html OUT",
    "render IN --tokenizer IN2 --html OUT",
    "render IN --tokenizer spm-v3 --compare IN2 --html OUT",
    "template --tokenizer spm-v3 --output OUT",
    "template --tokenizer IN --output OUT",
    "template --tokenizer spm-v3 --json --output OUT",
    "import IN --to OUT",
    "import IN IN2 --to OUT --lossy bad-records",
    "check --runner IN --tokenizer spm-v3 --dataset IN2 --output OUT",
    "merge IN OUT",
    "merge IN OUT --base IN2",
    "export IN --to trl --output OUT",
    "export IN --to vllm --output OUT --base IN2",
    "smoke IN --rows IN2 --record OUT",
    "serve-check IN=http://127.0.0.1:9 --tokenizer spm-v3 --rows IN2 --report OUT",
)


def make(folder: Path) -> None:
    """Make the files of a user: data, a recipe, the folder of an adapter, a checkpoint, and links to them."""
    for name in ("rows.jsonl", "rows.json", "data/train.jsonl", "data/more/rows.json", "page.html", "Rows.JSONL"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ROW) + "\n")
    base = {"path": "base", "weights_sha256": "0" * 64}
    recipe = {
        "base": base,
        "data": {"train": ["rows.json", "data/train.jsonl"]},
        "training": {"epochs": 1},
        "output": "out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for name in ("adapter/adapter_config.json", "adapter/manifest.json", "adapter/notes.html", "base/config.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (folder / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "known.txt").write_text("ML617  # of the source\n")
    (folder / "run.py").write_text("raise SystemExit(1)\n")
    for number, target in enumerate(("rows.json", "data", "adapter", "base/config.json", "page.html")):
        (folder / f"link{number}").symlink_to(folder / target)
    (folder / "link.json").symlink_to("rows.json")
    (folder / "link.html").symlink_to("data/../page.html")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "gone.json").symlink_to("nowhere.json")
    os.link(folder / "rows.json", folder / "hard.json")
    os.link(folder / "adapter" / "manifest.json", folder / "hard2.json")
    os.mkfifo(folder / "pipe.json")


def spelled(path: str, folder: Path, chance: random.Random) -> str:
    """Spell a path in one of the ways that lead to the same file, or nearly."""
    way = chance.randrange(9)
    head, _, tail = path.rpartition("/")
    spellings = (
        path, path, str(folder / path), f"./{path}", f"data/../{path}", f"link1/../{path}", path.upper(),
        f"{head or '.'}/../{head if head else folder.name}/{tail}", f"{path}/",
    )  # fmt: skip
    return spellings[way]


NEW = (
    "new.json",
    "new.html",
    "data/new.json",
    "adapter/new.json",
    "base/new.jinja",
    "link1/new.json",
    "out",
    "out/x.json",
)
NEW += ("adapter/transcripts", "no/such/x.json", ".", "..", "/dev/null", "x.rows.html", "rows.rows.html", "a\0b.json")


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ours(path: Path) -> bool:
    """Whether a new file is one that a command says that it writes."""
    if path.suffix == ".html":
        return is_report_page(path) or is_tokens_page(path)
    return path.stat().st_size > 0


def command(chance: random.Random, folder: Path) -> list[str]:
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_fifo())
    words = []
    for word in chance.choice(COMMANDS).split():
        if word.startswith("IN"):
            _, equals, rest = word.partition("=")
            words.append(spelled(chance.choice(there), folder, chance) + equals + rest)
        elif word.startswith("OUT"):
            # mostly the input itself, or a file that is there
            given = [one for one in words[1:] if "/" in one or "." in one]
            chosen = chance.choice(
                (chance.choice(given or ["rows.json"]), chance.choice(there), chance.choice(NEW), "pipe.json")
            )
            words.append(chosen if chance.random() < 0.5 else spelled(chosen, folder, chance))
        else:
            words.append(word)
    return words


def cases(seconds: float) -> Iterator[random.Random]:
    """Yield a source of chance for each case, until the time is over."""
    end, seed = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield random.Random(seed)
        seed += 1


def test_no_bytes_of_an_input_change(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: dict[int, int] = {}
    for number, chance in enumerate(cases(SECONDS)):
        folder = tmp_path_factory.mktemp(f"case{number}")
        make(folder)
        monkeypatch.chdir(folder)
        before, words = state(folder), command(chance, folder)
        try:
            code = main(words)
        except SystemExit as error:
            code = int(str(error.code))
        codes[code] = codes.get(code, 0) + 1
        out, err = capfd.readouterr()
        after = state(folder)
        where = f"case {number}: {words}"
        assert code in (0, 1, 2), where
        assert "Traceback" not in out + err, (where, err)
        changed = {name for name, data in before.items() if after.get(name) != data}
        # a checkpoint's own template is what `template` writes
        allowed = {name for name in changed if words[0] == "template" and name.endswith(".jinja")}
        assert changed == allowed, where
        assert Path("/dev/null").is_char_device(), where
        assert (folder / "pipe.json").is_fifo(), where
        for name in after.keys() - before.keys():
            # only pages and reports have a mark of ours; other outputs may have any name
            assert not {"--report", "--html"} & {*words} or ours(folder / name), (where, name)
            assert ".unfinished" not in name, where
    assert codes.keys() >= {2}, codes
    if SECONDS > 60:
        with capfd.disabled():
            os.write(1, f"\noutputs: {sum(codes.values())} commands, by exit code {codes}\n".encode())
