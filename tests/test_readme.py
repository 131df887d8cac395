"""What the README says is true: its output is made again, its files are read, its commands are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny import write_tiny_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.fault_classes import CLASSES
from pytest_mistral_lora.conformance.mask.laws import LAWS
from pytest_mistral_lora.plugin.xfails import read as read_xfails
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder
from pytest_mistral_lora.records.identity import base_weights_sha256
from pytest_mistral_lora.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLEAN = {key: value for key, value in os.environ.items() if key != "CI"}


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=CLEAN, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "checkpoints" / "my-mistral"
    source = shipped_tokenizer("spm-v3")
    CheckpointTokenizer(source).fast.save_pretrained(folder)
    shutil.copy(source, folder / "tokenizer.model.v3")
    return folder


def test_the_failing_output_is_what_a_broken_template_prints(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "my-mistral"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- '[INST] ' }}", "{{- '[INST]' }}"))
    command = [sys.executable, "-m", "pytest", "--mistral-golden", "--mistral-tokenizer", "my-mistral"]
    process = run(*command, "-k", "template::single", folder=tmp_path)
    assert process.returncode == 1
    [shown] = re.findall(r"<!-- failure: start -->\n```text\n(.*?)```\n<!-- failure: end -->", README, flags=re.DOTALL)
    versions = re.compile(r"^  (recorded|running): .*$", flags=re.MULTILINE)
    printed = process.stdout.replace(str(tmp_path) + "/", "")
    assert versions.sub("", shown) in versions.sub("", printed)


def test_the_figures_are_right() -> None:
    count = sum(len(golden_paths(goldens_folder() / "templates" / name)) for name in SHIPPED)
    assert f"{count} recorded conversations" in README
    assert len(LAWS) == 19
    assert "nineteen laws" in README
    assert f"one of {len(CLASSES)} classes" in README
    assert [CLASSES[rule] for rule in ("ML546", "ML525", "ML545")] == [
        "eos-masked",
        "system-prompt-dropped",
        "first-token-masked",
    ]


def test_a_fresh_clone_has_one_line_for_the_suite_and_one_for_the_tests() -> None:
    # .ci/run takes the two lines of a clone from here, and runs them as they stand
    lines = re.findall(r"^\$ (pip install .*&& pytest.*)$", README, flags=re.MULTILINE)
    assert lines == [
        "pip install -e . && pytest --mistral-golden",
        "pip install pytest-mistral-lora && pytest --mistral-golden  # once released",
        'pip install -e ".[dev]" && pytest -n 2 tests',
    ]


def test_the_line_for_the_suite_runs_no_test_of_the_clone() -> None:
    process = run(sys.executable, "-m", "pytest", "--mistral-golden", "--collect-only", "-q", folder=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    ids = [line for line in process.stdout.splitlines() if "::" in line]
    assert ids
    assert [name for name in ids if not name.startswith("mistral-golden::")] == []


def test_an_example_that_needs_xdist_installs_it_first() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            before, parallel, _ = block.partition(" -n 2")
            if parallel and "pytest" in before.splitlines()[-1]:
                assert re.search(r"pip install .*(pytest-xdist|\[dev\])", before), (page.name, block)


def test_the_configuration_and_the_tests_of_a_repository_work(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "checkpoints")
    (tmp_path / "tests" / "goldens").mkdir(parents=True)
    [toml] = fences("toml")
    (tmp_path / "pyproject.toml").write_text(toml)
    [python] = fences("python")
    (tmp_path / "tests" / "test_mine.py").write_text(python)
    process = run(sys.executable, "-m", "pytest", "tests", "-q", folder=tmp_path)
    assert process.returncode == 0, process.stdout
    assert "3 passed" in process.stdout
    rows = tmp_path / "tests" / "goldens" / "rows.jsonl"
    rows.write_text(
        '{"name": "mine", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    command = (sys.executable, "-m", "pytest", "--mistral-golden", "-k", "own-mine")
    assert run(*command, folder=tmp_path).returncode == 1
    assert run(*command, "--mistral-golden-update", folder=tmp_path).returncode == 0
    assert run(*command, folder=tmp_path).returncode == 0


def test_the_recipe_is_read_as_it_stands(tmp_path: Path) -> None:
    [recipe] = fences("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.base.revision
    assert loaded.training.batch_size == 32


def test_the_recipe_trains_on_a_local_base(tmp_path: Path) -> None:
    [recipe] = fences("yaml")
    write_tiny_base(tmp_path / "base", shipped_tokenizer("spm-v3"))
    data = yaml.safe_load(recipe)
    data["base"] = {"path": "base", "weights_sha256": base_weights_sha256(tmp_path / "base")}
    data["data"]["held_out"] = 0.0
    data["training"] |= {"epochs": 1, "batch_size": 4, "device": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", tmp_path / "rows.jsonl")
    for line in "\n".join(fences("console")).splitlines():
        words = line.split("#")[0].split()
        if words[1:2] != ["mistral-lora"] or words[2] not in ("train", "verify", "smoke", "merge"):
            continue
        process = run(sys.executable, "-m", "pytest_mistral_lora.cli", *words[2:], folder=tmp_path)
        assert process.returncode == 0, process.stderr
        if words[2] == "train":
            assert re.search(r"^step \d/\d: eval_format/eos ", process.stderr, flags=re.MULTILINE)
            assert re.search(r"^step 1/\d: loss \d+\.\d+, grad_norm ", process.stderr, flags=re.MULTILINE)
    left = {path.name for path in (tmp_path / "lora-out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "DECISION.md"} <= left


def test_render_shows_what_is_trained_on(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", tmp_path / "rows.jsonl")
    command = ("render", "rows.jsonl", "--tokenizer", checkpoint)
    process = run(sys.executable, "-m", "pytest_mistral_lora.cli", *command, folder=tmp_path)
    assert process.returncode == 0
    assert "   10-12    train  turn 1 assistant   text       ▁Paris ." in process.stdout


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_audit_and_check_work_as_shown(checkpoint: Path, tmp_path: Path) -> None:
    cli = (sys.executable, "-m", "pytest_mistral_lora.cli")
    shutil.copytree(checkpoint.parent, tmp_path / "checkpoints")
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", tmp_path / "rows.jsonl")
    encoded = run(*cli, "render", "rows.jsonl", "--tokenizer", checkpoint, "--json", folder=tmp_path).stdout
    (tmp_path / "encoded.jsonl").write_text(encoded)
    [line] = [line for line in "\n".join(fences("console")).splitlines() if "mistral-lora audit encoded" in line]
    assert run(*cli, *line.split()[2:], folder=tmp_path).returncode == 0
    (tmp_path / "encoded.jsonl").write_text("".join(encoded.splitlines(keepends=True)[1:]))
    assert "ML502" in run(*cli, *line.split()[2:], folder=tmp_path).stdout
    assert "`mistral-lora check recipe.yaml`" in README
    assert run(*cli, "check", "checkpoints/my-mistral", "--examples", "1", folder=tmp_path).returncode == 0


def test_the_list_of_known_deviations_can_be_read(tmp_path: Path) -> None:
    [shown] = [text for text in fences("text") if text.startswith("ML204 ")]
    (tmp_path / "known.txt").write_text(shown)
    known = read_xfails(tmp_path / "known.txt")
    assert [one.id for one in known] == ["ML204", "mistral-golden::my-mistral::template::trailing-spaces"]
    assert "trailing-spaces" in {path.stem for path in golden_paths(goldens_folder() / "templates" / "spm-v3")}


def test_every_page_that_is_named_is_there() -> None:
    for page in re.findall(r"\]\((?!https)([^)#]+)\)", README):
        assert (ROOT / page).exists(), page
