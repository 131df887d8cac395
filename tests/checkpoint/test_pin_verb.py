"""`mistral-lora pin` and `init`, against a Hub on 127.0.0.1: one process online and one offline, as each is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Repository, serve

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe import pin_recipe

REPO = "tiny/mistral"
CALLS = """
import contextlib, io, json, sys
from pytest_mistral_lora.cli import main
done = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        done.append((main(words), out, err))
print(json.dumps([[code, out.getvalue(), err.getvalue()] for code, out, err in done]))
"""
RECIPE = """\
# a run of ours
base:
  repo: tiny/mistral   # the base
  revision: main       # to be pinned
data: {train: [rows.jsonl]}
training: {epochs: 1}
output: lora-out
"""
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

Call = Callable[..., list[tuple[int, str, str]]]


@pytest.fixture
def repository() -> Repository:
    files = {
        "config.json": b'{"model_type": "mistral"}',
        "tokenizer.model.v3": shipped_tokenizer("spm-v3").read_bytes(),
    }
    made = Repository()
    made.commit({**files, "config.json": b'{"model_type": "mistral", "x": 1}'}, branch="old")
    made.commit(files)
    return made


@pytest.fixture
def call(repository: Repository, tmp_path: Path) -> Iterator[Call]:
    """Run verbs in one new process, as huggingface_hub reads its environment once."""
    hub = Hub({REPO: repository})

    def run(*verbs: list[str], offline: bool = False) -> list[tuple[int, str, str]]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "CI"))}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": str(int(offline))}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CALLS, json.dumps(verbs)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [(code, out, err) for code, out, err in json.loads(done.stdout)]

    with serve(hub):
        yield run


@pytest.mark.slow
def test_the_commit_of_a_branch_is_printed_and_written_and_init_pins_it(
    call: Call, repository: Repository, tmp_path: Path
) -> None:
    main, old = repository.branches["main"], repository.branches["old"]
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    done = call(
        ["pin", REPO],
        ["pin", f"{REPO}@old"],
        ["pin", f"{REPO}@nope"],
        ["pin", "tiny/absent"],
        ["pin", "mine.yaml"],
        ["pin", "mine.yaml"],
        ["init", "--base", f"{REPO}@nope"],
        ["init", "--base", REPO],
    )
    assert [one[0] for one in done] == [0, 0, 2, 2, 0, 0, 2, 0], done
    assert (done[0][1], done[1][1]) == (f"{main}\n", f"{old}\n")
    assert f"{REPO} has no branch or tag nope. main is {main} now" in done[2][2]
    assert "no repository at" in done[3][2]
    assert (tmp_path / "mine.yaml").read_text() == RECIPE.replace("revision: main ", f"revision: {main} ")
    assert f"base.revision is {main} already" in done[5][1]
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert f"  revision: {main}  # main, when this file was written\n" in recipe
    # the tokenizer was fetched, so that the first golden is recorded, and no weights
    assert (tmp_path / "tests/goldens/templates/recipe.yaml/rows-1.json").is_file()
    [moved] = call(["pin", "mine.yaml", "--branch", "old"])
    assert f"base.revision is {old} now (before: {main})" in moved[1]
    assert f"revision: {old} " in (tmp_path / "mine.yaml").read_text()


def test_offline_the_recipe_names_the_branch_and_train_tells_what_to_fill_in(call: Call, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    unknown, started, refused, pinned = call(
        ["pin", f"{REPO}@v1"], ["init", "--base", REPO], ["train", "recipe.yaml"], ["pin", "recipe.yaml"], offline=True
    )
    assert unknown[0] == 2
    assert f"HF_HUB_OFFLINE=0 mistral-lora pin {REPO}@v1" in unknown[2]
    assert "commit from http://" in unknown[2]
    assert started[0] == 1
    assert "to do: Pin the base, online: mistral-lora pin recipe.yaml" in started[1]
    assert "  revision: main  # TO DO: its commit" in (tmp_path / "recipe.yaml").read_text()
    assert refused[0] == 2
    assert "recipe.yaml:6, base.revision: 'main': a branch or tag" in refused[2]
    assert "Write it: mistral-lora pin recipe.yaml" in refused[2]
    assert pinned[0] == 2
    assert "HF_HUB_OFFLINE=0 mistral-lora pin recipe.yaml" in pinned[2]
    # what was fetched before is enough
    commit = "ab" * 10 + "cd" * 10
    refs = tmp_path / "home" / "hub" / "models--tiny--mistral" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    pinned, again, started = call(
        ["pin", "recipe.yaml"], ["pin", f"{REPO}@{commit}"], ["init", "--base", REPO, "--force"], offline=True
    )
    assert pinned[1] == f"recipe.yaml: base.revision is {commit} now (before: main)\n"
    [note] = pinned[2].splitlines()
    assert note.startswith("note: ")
    assert "main" in note
    assert again[:2] == (0, f"{commit}\n")
    [note] = again[2].splitlines()
    assert note.startswith("note: the Hub was not asked")
    assert started[0] == 1
    assert "to do: Fetch the base," in started[1]
    assert "to do: Record the goldens then" in started[1]
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert f"  revision: {commit}  # of your branch or tag" in recipe


BASES: dict[str, tuple[str, Any]] = {
    "in a block": (
        "base:\n  path: base  # mine\n  oracle: spm-v3\n",
        "base:\n  path: base  # mine\n  weights_sha256: {}\n",
    ),
    "in braces": ("base: {path: base, oracle: spm-v3}\n", "base: {path: base, weights_sha256: {}, oracle: spm-v3}\n"),
    "an old one": (
        "base:\n  weights_sha256: '" + "0" * 64 + "' # x\n  path: base\n",
        "base:\n  weights_sha256: {} # x\n",
    ),
    "an empty one": ("base:\n  weights_sha256:\n  path: base\n", "base:\n  weights_sha256: {}\n  path: base\n"),
    "in quotes": ('"base": {"path": "base"}\n', '"base": {"path": "base", weights_sha256: {}}\n'),
}


@pytest.mark.parametrize("case", BASES)
def test_the_weights_of_a_local_base_are_pinned_and_nothing_else_changes(case: str, tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    before, begins = BASES[case]
    rest = "data: {train: [rows.jsonl]}  # é\ntraining: {epochs: 1}\noutput: lora-out\n"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(before + rest, encoding="utf-8")
    assert pin_recipe(recipe).value == digest
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith(begins.replace("{}", digest, 1) if "{}" in begins else begins), text
    assert text.endswith(rest)
    assert pin_recipe(recipe).before == digest


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("output: x\n", "base: there is no base to pin"),
        ("base: {path: base}\nnope: 1\n", "nope"),
        (
            "base: {<<: {path: base}}\ndata: {train: [a]}\ntraining: {steps: 1}\noutput: o\n",
            "'path' is not written out",
        ),
        ("[", "not valid YAML"),
    ],
)
def test_a_recipe_with_another_fault_is_not_written(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=found):
        pin_recipe(recipe)
    assert recipe.read_text() == text
