"""The README and the pages behind it are true: their output is made again, their files are read, their commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import write_outputs
import write_picture
import yaml
from forked import run_forked

from pytest_mistral_lora import assertions, plugin, strategies
from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.conformance.known import read_xfails
from pytest_mistral_lora.conformance.mask.checks import LAWS
from pytest_mistral_lora.formats.report import CHANGES, LOSSES
from pytest_mistral_lora.records.goldens import golden_paths, goldens_folder
from pytest_mistral_lora.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SUITE, ROWS, RENDER, IMPORT, TRAINING, RECIPE, RECORDS = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("suite", "rows", "render", "import", "training", "recipe", "records")
)

RunVerb = Callable[..., subprocess.CompletedProcess[str]]
RunPytest = Callable[..., pytest.RunResult]


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def command_lines(page: str, program: str) -> list[list[str]]:
    """Return the words after `program` of each of its command lines on a page."""
    lines = re.findall(rf"^\$ {program} (.*)$", "\n".join(fences(page, "console")), flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outputs.write_checkpoint(tmp_path_factory.mktemp("readme") / "checkpoints" / "my-mistral")


# that of the tour is compared where the tour is taken: test_tour.py
@pytest.mark.parametrize("name", [output.name for output in write_outputs.OUTPUTS if output.name != "tour"])
def test_an_output_is_shown_as_it_is_printed(
    name: str, checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if name == "broken row":
        request.getfixturevalue("data_alone")
    shutil.copytree(checkpoint.parent, tmp_path / "checkpoints")
    [output] = [one for one in write_outputs.OUTPUTS if one.name == name]
    made = output.make(tmp_path)
    assert made.count("\n") > 1
    assert output.shows(made), "Run: python scripts/write_outputs.py"


def test_the_picture_of_a_red_finding_is_what_pytest_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_outputs, "run", run_forked)
    assert write_picture.PICTURE.read_text(encoding="utf-8") == write_picture.picture()
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert write_picture.PICTURE.name in page.read_text(encoding="utf-8")


def test_the_figures_are_right() -> None:
    count = sum(len(golden_paths(goldens_folder() / "templates" / name)) for name in SHIPPED)
    text = " ".join(README.split())
    assert f"{count} recorded conversations" in text
    assert len(LAWS) == 14
    assert "fourteen laws" in text
    assert f"one of {len(RULES.of('encoded'))} classes" in text
    assert f"one of {len(RULES.of('encoded'))} classes" in " ".join(ROWS.split())
    assert [RULES[rule].fault_class for rule in ("ML546", "ML525", "ML545")] == [
        "eos-masked",
        "system-prompt-dropped",
        "first-token-masked",
    ]


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.split()) < 900


def test_the_lines_that_an_audit_reads_are_named_by_their_keys() -> None:
    section = README.partition("\n## Check another trainer")[2].partition("\n## ")[0]
    assert [key for key in ("messages", "input_ids", "labels") if f"`{key}`" not in section] == []


def test_a_fresh_clone_has_one_line_for_the_suite_and_one_for_the_tests() -> None:
    # .ci/run takes the two lines of a clone from here, and runs them as they stand
    lines = re.findall(r"^\$ (pip install .*&& pytest.*)$", README, flags=re.MULTILINE)
    assert lines == [
        'pip install -e ".[train]" && pytest --mistral-golden',
        "pip install dist/*.whl && pytest --mistral-golden",
        'pip install -e ".[dev]" && pytest -n 2 tests',
    ]


def test_the_two_lines_of_the_guard_stand_before_the_first_table() -> None:
    before = README.partition("\n|")[0]
    assert "\nguard(trainer)" in before
    assert before.index("\nguard(trainer)") < README.index("\n## ")


def test_no_page_says_that_the_package_is_on_an_index() -> None:
    # a package of this name on an index is somebody else's until the first release
    pages = [
        ROOT / "action.yml",
        *(path for folder in ("docs", "examples", "pytest_mistral_lora") for path in (ROOT / folder).rglob("*")),
    ]
    words = re.compile(r"once (?:it is )?released|pip install [\"']?pytest-mistral-lora(?:\s|$)")
    found = {
        path.name
        for path in [ROOT / "README.md", *pages]
        if path.suffix in (".md", ".yml", ".txt") and words.search(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_the_line_for_the_suite_runs_no_test_of_the_clone() -> None:
    command = [sys.executable, "-m", "pytest", "--mistral-golden", "--collect-only", "-q"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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


def test_the_configuration_and_the_tests_of_a_repository_work(
    checkpoint: Path, tmp_path: Path, run_pytest: RunPytest
) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "checkpoints")
    (tmp_path / "tests" / "goldens").mkdir(parents=True)
    [toml] = fences(SUITE, "toml")
    assert fences(README, "toml") == [toml]
    (tmp_path / "pyproject.toml").write_text(toml)
    [python] = fences(SUITE, "python")
    (tmp_path / "tests" / "test_mine.py").write_text(python)
    run_pytest("tests").assert_outcomes(passed=3)
    rows = tmp_path / "tests" / "goldens" / "rows.jsonl"
    rows.write_text(
        '{"name": "mine", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    command = ("--mistral-golden", "-k", "own-mine")
    assert run_pytest(*command).ret == 1
    assert any("--mistral-golden-update" in words for words in command_lines(SUITE, "pytest"))
    assert run_pytest(*command, "--mistral-golden-update").ret == 0
    assert run_pytest(*command).ret == 0


def test_the_fixtures_assertions_and_strategies_of_the_page_are_all_that_there_are() -> None:
    tables = {name: set(re.findall(rf"^\| `({name}_\w+)", SUITE, flags=re.MULTILINE)) for name in ("mistral", "assert")}
    assert tables["mistral"] == {name for name in vars(plugin) if name.startswith("mistral_")}
    assert tables["assert"] == {name for name in vars(assertions) if name.startswith("assert_")}
    [named] = re.findall(r"the Hypothesis strategies (.*?)\.", SUITE, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", named)) == {name for name in strategies.__all__ if name.islower()}


@pytest.mark.parametrize("page", [README, TRAINING, RECIPE], ids=["README", "training", "recipe"])
def test_a_recipe_is_read_as_it_stands(page: str, tmp_path: Path) -> None:
    recipe, *changes = fences(page, "yaml")
    sections = yaml.safe_load(recipe)
    parts = [yaml.safe_load(change) for change in changes]
    changed = [sections | {name: sections[name] | values for name, values in part.items()} for part in parts]
    for text in (recipe, *map(yaml.safe_dump, changed)):
        (tmp_path / "recipe.yaml").write_text(text)
        loaded = load_recipe(tmp_path / "recipe.yaml")
        assert loaded.base.revision == "c170c708c41dac9275d15a8fff4eca08d52bab71"
        assert loaded.training.epochs == 2


def test_the_readme_has_a_part_of_the_recipe_and_the_commands_of_the_training_page() -> None:
    short, whole = (yaml.safe_load(fences(page, "yaml")[0]) for page in (README, TRAINING))
    for section, values in short.items():
        keys = values if isinstance(values, dict) else [None]
        assert all(values[key] == whole[section][key] if key else values == whole[section] for key in keys), section
    verbs = ("train", "verify", "smoke", "merge")
    first = [words for words in command_lines(README, "mistral-lora") if words[0] in verbs]
    assert first == [words for words in command_lines(TRAINING, "mistral-lora") if words[0] in verbs][:4]


def test_the_recipe_trains_and_a_changed_row_is_found(tmp_path: Path, mistral_lora: RunVerb) -> None:
    recipe = fences(TRAINING, "yaml")[0]
    write_tiny_base(tmp_path / "base", shipped_tokenizer("spm-v3"))
    data = yaml.safe_load(recipe)
    data["base"] = {"path": "base", "weights_sha256": BaseFolder(tmp_path / "base").weights_sha256}
    data["data"]["held_out"] = 0.0
    data["training"] |= {"epochs": 1, "batch_size": 4, "device": "cpu"}
    data["evaluation"]["max_new_tokens"] = 16  # an untrained model goes on to the limit, in each of the commands
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", tmp_path / "rows.jsonl")
    for words in command_lines(README, "mistral-lora"):
        if words[0] not in ("train", "verify", "smoke", "merge"):
            continue
        process = mistral_lora(*words, folder=tmp_path)
        assert process.returncode == 0, process.stderr
        if words[0] == "train":
            assert re.search(r"^step \d/\d: eval_format/eos ", process.stderr, flags=re.MULTILINE)
            assert re.search(r"^step 1/\d: loss \d+\.\d+, grad_norm ", process.stderr, flags=re.MULTILINE)
    left = {path.name for path in (tmp_path / "lora-out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "DECISION.md"} <= left
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace("Paris", "Lyon"))
    verified = mistral_lora("verify", "lora-out", "--dataset", "rows.jsonl", folder=tmp_path)
    assert verified.returncode == 1
    [shown] = [text for text in fences(RECORDS, "text") if "mismatch       dataset_sha256" in text]
    for line in shown.splitlines():
        assert all(part in verified.stdout for part in line.split("…")), line


def test_the_encoded_row_of_the_page_is_sound(checkpoint: Path, tmp_path: Path, mistral_lora: RunVerb) -> None:
    [encoded] = [text for text in fences(ROWS, "json") if "input_ids" in text]
    (tmp_path / "encoded.jsonl").write_text(encoded)
    process = mistral_lora("check", "encoded.jsonl", "--tokenizer", checkpoint, folder=tmp_path)
    assert process.returncode == 0, process.stdout


def test_the_outputs_are_those_of_the_commands_of_the_page() -> None:
    assert ["render", "rows.jsonl", *write_outputs.TOKENIZER] in command_lines(RENDER, "mistral-lora")
    assert ["import", "sharegpt.json", "--to", "rows.jsonl"] in command_lines(IMPORT, "mistral-lora")


def test_the_python_of_the_import_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_outputs.imported_rows(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    exec("\n".join(fences(IMPORT, "python")), {})
    assert len((tmp_path / "rows.jsonl").read_text("utf-8").splitlines()) == 2


@pytest.mark.parametrize(("title", "kinds"), [("Changes", CHANGES), ("Losses", LOSSES)])
def test_the_page_of_the_import_has_every_kind(title: str, kinds: dict[str, str]) -> None:
    section = IMPORT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", section, flags=re.MULTILINE) == list(kinds)


@pytest.mark.parametrize("page", [README, ROWS], ids=["README", "rows"])
def test_audit_and_check_work_as_shown(page: str, checkpoint: Path, tmp_path: Path, mistral_lora: RunVerb) -> None:
    shutil.copytree(checkpoint.parent, tmp_path / "checkpoints")
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", tmp_path / "rows.jsonl")
    encoded = mistral_lora("render", "rows.jsonl", "--tokenizer", checkpoint, "--json", folder=tmp_path).stdout
    (tmp_path / "encoded.jsonl").write_text(encoded)
    [words] = [words for words in command_lines(page, "mistral-lora") if words[:2] == ["check", "encoded.jsonl"]]
    assert mistral_lora(*words, folder=tmp_path).returncode == 0
    (tmp_path / "encoded.jsonl").write_text("".join(encoded.splitlines(keepends=True)[1:]))
    assert "ML502" in mistral_lora(*words, folder=tmp_path).stdout


@pytest.mark.of_field
def test_the_list_of_known_deviations_can_be_read(tmp_path: Path) -> None:
    [shown] = [text for text in fences(SUITE, "text") if text.startswith("ML204 ")]
    (tmp_path / "known.txt").write_text(shown)
    known = read_xfails(tmp_path / "known.txt")
    assert [one.id for one in known] == [
        "ML204",
        "mistral-golden::my-mistral::template::trailing-spaces",
        "default-system-prompt",
        "llama-tokenizer-merges",
    ]
    [dated] = [text for text in fences(SUITE, "text") if "  # until " in text]
    (tmp_path / "known.txt").write_text(dated)
    assert [str(one.until) for one in read_xfails(tmp_path / "known.txt")] == ["2027-06-30"]
    assert "trailing-spaces" in {path.stem for path in golden_paths(goldens_folder() / "templates" / "spm-v3")}
