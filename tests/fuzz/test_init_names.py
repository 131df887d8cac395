"""Hostile names of bases, data and folders through `init`: a name is a name in the files, or nothing is written.

Seeded, and bounded by `fuzzing.SECONDS`. A failure names its seed.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import SECONDS

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.training.recipe import load_recipe

LONGEST_S = 30.0
ROW = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
FOREIGN = json.dumps([{"instruction": "Add", "input": "1 2", "output": "3"}])
HOOKS = ".pre-commit-config.yaml"
JOBS = (".github/workflows/mistral-lora.yml", ".gitlab-ci.yml")
PARTS = [
    *("\n", "\r", "\t", "\0", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff", "\u00a0"),
    *(
        "- touch PWNED",
        "#",
        " #",
        ": ",
        "- ",
        "? ",
        "|",
        ">",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a",
        "*a",
        "!!x",
        "%",
        "@",
        "`",
    ),
    *(
        "$(touch PWNED)",
        "`touch PWNED`",
        "${{ secrets.X }}",
        "$HOME",
        "~",
        "~root",
        ";",
        "&&",
        "'",
        '"',
        "\\",
        "\\n",
        "--",
    ),
    *(
        "null",
        "true",
        "0x1",
        "1e3",
        "2026-01-01",
        "<<",
        "=",
        "§recipe",
        "TO DO",
        "\udcff",
        "é",
        "東京",
        "🙂",
        " ",
        ".",
        "a",
    ),
]
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def name_of(chance: random.Random) -> str:
    """Return a name that a file can have, or one with a NUL."""
    name = "".join(chance.choice(PARTS) for _ in range(chance.randrange(1, 5)))
    # half of them are names that are written
    name = CONTROL.sub("", name) if chance.random() < 0.5 else name
    return "a" if name in ("", ".", "..") else name


def seeds() -> Iterator[int]:
    end, seed = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        start = time.process_time()
        yield seed
        assert time.process_time() - start < LONGEST_S, f"seed {seed} takes {time.process_time() - start:.0f} s"
        seed += 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    write_tiny_base(folder, shipped_tokenizer("spm-v3"))
    return folder


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of plain names."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CI", "true")  # goldens are recorded elsewhere
        words = words_for(folder, base, "plain", "plain", ROW, is_folder=False)
        assert main(["init", *words]) == 1
    return files_of(folder)


def words_for(folder: Path, base: Path, name: str, data: str, content: str, *, is_folder: bool) -> list[str]:
    """Make a base and data of these names, as far as a file can have them, and return the words that name them."""
    for part in ("models", "data"):
        (folder / part).mkdir()
    if "\0" not in name:
        (folder / "models" / name).symlink_to(base)
    if "\0" not in data:
        path = folder / "data" / data
        if is_folder:
            path.mkdir()
            path /= "rows.jsonl"
        path.write_text(f"{content}\n")
    return [f"data/{data}", f"--base=models/{name}", "--ci=both"]


def files_of(folder: Path) -> dict[str, str]:
    """Return the files that were written, without those that `words_for` made."""
    written = (path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != "data")
    kept = (path for path in written if path.relative_to(folder).parts[0] != "models")
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in kept}


def structure(value: Any) -> Any:
    """Return keys and places of a document, without its texts."""
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    return [structure(item) for item in value] if isinstance(value, list) else type(value)


@pytest.mark.parametrize("dry_run", [True, False], ids=["--dry-run", "written"])
def test_a_name_is_a_name_or_is_refused(
    dry_run: bool,
    base: Path,
    plain: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CI", "true")
    ends = Counter[str]()
    for seed in seeds():
        chance = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        name, data, is_folder = name_of(chance), name_of(chance), chance.random() < 0.3
        content = FOREIGN if chance.random() < 0.3 and not is_folder else ROW
        case = f"seed {seed}: base {name!a}, data {data!a}"
        try:
            words = words_for(folder, base, name, data, content, is_folder=is_folder)
            code = main(["init", *words, *(["--dry-run"] if dry_run else [])])
        except SystemExit as error:  # a word that argparse refuses: with a null character
            code = error.code
        except Exception as error:
            pytest.fail(f"{case}: {type(error).__name__}: {error}")
        output = capsys.readouterr()
        assert "Traceback" not in output.err, case
        written = files_of(folder)
        if CONTROL.search(name + data):
            assert (code, written) == (2, {}), case
            ends["refused"] += 1
        elif code == 2:
            # a name that says that it is something else, such as `x.yaml`
            assert written == {}, case
            ends["other error"] += 1
        elif dry_run:
            assert written == {}, case
            ends["printed"] += 1
        else:
            judge(folder, written, plain, name, data, case, is_converted=content == FOREIGN)
            ends["written"] += 1
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    assert ends["refused"]
    assert ends["printed" if dry_run else "written"]
    print(f"\ninit: {dict(ends)}")  # noqa: T201, the counts of a longer run


def judge(
    folder: Path, written: dict[str, str], plain: dict[str, str], name: str, data: str, case: str, *, is_converted: bool
) -> None:
    """Compare the files of hostile names with those of plain ones."""
    assert not list(folder.rglob("*PWNED*")) or "PWNED" in name + data, case
    for job in (*JOBS, "pytest.ini"):
        assert written[job] == plain[job], case
    # the recipe and the hook differ in the names alone
    recipe, before = yaml.safe_load(written["recipe.yaml"]), yaml.safe_load(plain["recipe.yaml"])
    [entry] = recipe["data"].pop("train")
    before["data"].pop("train")
    assert structure(recipe) == structure(before), case
    if is_converted:
        assert (entry.keys(), entry["format"]) == ({"path", "format"}, "alpaca"), case
    read = load_recipe(folder / "recipe.yaml")
    assert (read.base.path, read.data.paths) == (folder / "models" / name, (folder / "data" / data,)), case
    hooks, others = yaml.safe_load(written[HOOKS]), yaml.safe_load(plain[HOOKS])
    [hook], [other] = hooks["repos"][0]["hooks"], others["repos"][0]["hooks"]
    assert re.search(hook.pop("files"), f"data/{data}"), case
    other.pop("files")
    assert hooks == others, case
