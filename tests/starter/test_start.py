"""`mistral-lora init` as a newcomer runs it: without data, with bad data and with good data, once and again."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.starter.plan import WORKFLOW, plan_start
from pytest_mistral_lora.training.recipe import load_recipe

RunVerb = Callable[..., subprocess.CompletedProcess[str]]
RunPytest = Callable[..., pytest.RunResult]

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
OTHER = [{"role": "system", "content": "Be kind."}, *TALK]
WRITTEN = {
    "recipe.yaml",
    ".mistral-lora/recipe.schema.json",
    "tests/goldens/rows.jsonl",
    "tests/goldens/templates/recipe.yaml/rows-1.json",
    "tests/goldens/templates/recipe.yaml/rows-2.json",
    "pytest.ini",
    ".github/workflows/mistral-lora.yml",
    ".gitlab-ci.yml",
    ".pre-commit-config.yaml",
    ".gitignore",
    ".mistral-lora/constraints.txt",
}


@pytest.fixture
def repository(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model, in which the test works."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    return tmp_path


def write_rows(path: Path, *talks: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def files_of(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "models" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def init(folder: Path, run: RunVerb, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run("init", *words, folder=folder)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


def test_a_repository_is_guarded_and_a_second_run_changes_nothing(
    repository: Path, mistral_lora: RunVerb, run_pytest: RunPytest
) -> None:
    write_rows(repository / "rows.jsonl", TALK, OTHER, TALK)
    done = init(repository, mistral_lora, "rows.jsonl", "--base", "models/base")
    assert "3 rows" in done.stdout
    assert "to do" not in done.stdout
    after = files_of(repository)
    assert after.keys() == WRITTEN | {"rows.jsonl"}
    assert all(f" {name}" in done.stdout for name in WRITTEN)
    recipe = load_recipe(repository / "recipe.yaml")
    assert recipe.base.weights_sha256 == BaseFolder(repository / "models" / "base").weights_sha256
    first = after["recipe.yaml"].splitlines()[0]
    schema = json.loads((repository / first.partition("$schema=")[2]).read_text())
    data = yaml.safe_load(after["recipe.yaml"])
    data["training"]["learning_rate"] = 2e-4  # PyYAML reads YAML 1.1, in which 2e-4 is a text; editors read YAML 1.2
    jsonschema.validate(data, schema)
    for words in ([], ["rows.jsonl", "--base", "models/base"]):
        again = init(repository, mistral_lora, *words)
        assert "created" not in again.stdout
        assert files_of(repository) == after
    # the goldens that were recorded guard: they are compared, and a change is found
    command = ("--mistral-golden", "-o", "testpaths=", "-k", "own-")
    run_pytest(*command).assert_outcomes(passed=2)
    golden = repository / "tests/goldens/templates/recipe.yaml/rows-1.json"
    golden.write_text(golden.read_text().replace("Hello", "Hallo"))
    assert run_pytest(*command).ret == 1


def test_the_suite_runs_beside_the_tests_of_the_repository(repository: Path, mistral_lora: RunVerb) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    for name in ("checks/test_mine.py", "tests/deep/mine_test.py", "docs/conf.py"):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text("def test_mine(): pass\n")
    init(repository, mistral_lora, "rows.jsonl", "--base", "models/base")
    settings = (repository / "pytest.ini").read_text()
    assert "testpaths =\n    checks\n    tests\n" in settings
    (repository / "pytest.ini").write_text(settings.replace("    tests\n", ""))
    init(repository, mistral_lora)
    assert "    tests\n" not in (repository / "pytest.ini").read_text()


@pytest.mark.parametrize("stated", [False, True], ids=["none", "--dry-run"])
def test_without_data_there_are_example_rows(stated: bool, repository: Path, mistral_lora: RunVerb) -> None:
    done = init(repository, mistral_lora, "--base", "models/base", *(["--dry-run"] if stated else []))
    # import replaces no file
    assert "example rows: remove it, then mistral-lora import" in done.stdout
    if stated:
        assert done.stdout.endswith("next: the same command without --dry-run\n")
        assert files_of(repository) == {}
        for text in (
            "yaml-language-server",
            "mistral_recipes =",
            "runs-on: ubuntu-latest",
            "artifacts:",
            "repo: local",
        ):
            assert text in done.stdout
        return
    recipe = load_recipe(repository / "recipe.yaml")
    [file] = recipe.files()
    assert file.path.read_text().count("\n") == 5
    assert len(list((repository / "tests/goldens/templates/recipe.yaml").iterdir())) == 5
    assert "example rows: remove it" in init(repository, mistral_lora, "--base", "models/base").stdout


FORMATS: dict[str, tuple[str, Any, str]] = {
    "sharegpt": (
        "talks.json",
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
        "sharegpt",
    ),
    "alpaca": ("al paca: 1, [it's].json", [{"instruction": "Add", "input": "1 2", "output": "3"}], "alpaca"),
    "csv": ("rows.csv", "instruction,input,output\nAdd,1 2,3\n", "alpaca"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_data_of_another_format_is_named_in_the_recipe(name: str, repository: Path) -> None:
    file, content, expected = FORMATS[name]
    (repository / file).write_text(content if isinstance(content, str) else json.dumps(content))
    plan = plan_start(repository, [repository / file], "models/base")
    (repository / "recipe.yaml").write_text(next(one.text for one in plan.files if one.name == "recipe.yaml"))
    recipe = load_recipe(repository / "recipe.yaml")
    [entry] = recipe.data.train
    assert not isinstance(entry, Path)
    assert (entry.path, entry.format) == (repository / file, expected)
    assert (plan.rows[0].count, plan.rows[0].bad) == (1, 0)


@pytest.mark.parametrize(
    ("call_id", "answer", "is_converted"),
    [
        ("call_8tA1", {}, True),
        # it is converted while it is read
        ("abcdefgh1", {"reasoning_content": "because"}, False),
        ("abcdefgh1", {}, False),
        ("abcdefgh1", {"speaker": "me"}, False),
    ],
    ids=["OpenAI's ids", "reasoning", "our rows", "a key that is lost"],
)
def test_messages_of_another_service_are_converted(
    call_id: str, answer: dict[str, str], is_converted: bool, repository: Path
) -> None:
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    result = {"role": "tool", "content": "1", "tool_call_id": call_id}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    row = {"messages": [*asked, result, {"role": "assistant", "content": "1", **answer}], "tools": [tool]}
    (repository / "rows.jsonl").write_text(f"{json.dumps({'messages': TALK})}\n{json.dumps(row)}\n")
    plan = plan_start(repository, [repository / "rows.jsonl"], "models/base")
    [seen] = plan.rows
    assert (seen.converted, seen.bad) == (is_converted, int("speaker" in answer))
    assert seen.entry == ({"path": "rows.jsonl", "format": "messages"} if is_converted else "rows.jsonl")
    changes = is_converted or "reasoning_content" in answer
    assert ("rows.jsonl:2" in seen.conversion, "mistral-lora import" in seen.conversion) == (changes, changes)


def test_a_golden_row_that_cannot_be_recorded_is_left_to_do_with_its_remedy(
    repository: Path, mistral_lora: RunVerb
) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    call = {"id": "call_8tA1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    golden = repository / "tests" / "goldens" / "rows.jsonl"
    golden.parent.mkdir(parents=True)
    golden.write_text(json.dumps({"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]}) + "\n")
    done = init(repository, mistral_lora, "rows.jsonl", "--base", "models/base", code=1)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("to do: ")]
    assert "tests/goldens/rows.jsonl:1: " in line
    assert "'call_8tA1'" in line
    assert "; expected 9 letters or digits" in line
    assert line.endswith(": mistral-lora import tests/goldens/rows.jsonl --to converted.jsonl")


def test_bad_rows_are_listed_and_the_rest_is_set_up(repository: Path, mistral_lora: RunVerb) -> None:
    write_rows(repository / "train.jsonl", TALK, [{"role": "bot", "content": "x"}], TALK)
    done = init(repository, mistral_lora, "train.jsonl", "--base", "models/base", code=1)
    assert "3 rows, 1 of which cannot be used" in done.stdout
    assert re.search("^next: .*pytest --mistral-golden", done.stdout, re.MULTILINE)
    assert "train.jsonl:2, messages[0].role: 'bot'" in done.stdout
    assert (repository / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--base: no base model is named"),
        (["--base", "models/base"], "no rows are named, and there is data.jsonl"),
        (["none.jsonl", "--base", "models/base"], "none.jsonl: no such file"),
        (["data.jsonl", "--base", "models/base"], "data.jsonl:1: none of its first lines is a row"),
        (["models/base", "--base", "models/base"], "models/base: this is a checkpoint folder"),
        (["good.jsonl", "--base", "base"], "--base base: is neither a folder nor the id"),
        (["good.jsonl", "--base", "data.jsonl"], "--base data.jsonl: is a file"),
        (["good.jsonl", "--base", "models"], "models: "),
    ],
)
def test_input_that_cannot_be_used_is_an_error_and_nothing_is_written(
    words: list[str], text: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "data.jsonl").write_text('{"a": 1}\n')
    if words and words[0] == "good.jsonl":
        write_rows(repository / "good.jsonl", TALK)
    before = files_of(repository)
    assert main(["init", *words]) == 2
    assert text in capsys.readouterr().err
    assert files_of(repository) == before


def test_a_recipe_that_is_there_stays_and_a_missing_base_is_told(repository: Path, mistral_lora: RunVerb) -> None:
    text = f"base: {{path: none, weights_sha256: {'ab' * 32}}}\ndata: {{train: [rows.jsonl]}}\n"
    (repository / "recipe.yaml").write_text(f"{text}training: {{steps: 1}}\noutput: out\n")
    missing = mistral_lora("init", folder=repository)
    assert (missing.returncode, "rows.jsonl: cannot be read" in missing.stderr) == (2, True)
    write_rows(repository / "rows.jsonl", TALK)
    before = (repository / "recipe.yaml").read_text()
    done = init(repository, mistral_lora, "--ci", "none", code=1)
    assert (repository / "recipe.yaml").read_text() == before
    assert re.search("to do: Fetch the base, .* no folder none", done.stdout)
    assert not (repository / "tests/goldens/templates").exists()


def test_files_that_are_there_are_refused_kept_or_replaced(repository: Path, mistral_lora: RunVerb) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    words = ["rows.jsonl", "--base", "models/base", "--ci", "github"]
    init(repository, mistral_lora, *words)
    mine = {name: f"{(repository / name).read_text()}# mine\n" for name in ("recipe.yaml", WORKFLOW)}
    for name, text in mine.items():
        (repository / name).write_text(text)
    (repository / "pytest.ini").unlink()
    before = files_of(repository)
    refused = init(repository, mistral_lora, *words, code=2)
    assert refused.stderr.startswith("error: recipe.yaml: exists already")
    assert f" {WORKFLOW};" in refused.stderr
    assert files_of(repository) == before
    shown = init(repository, mistral_lora, *words, "--dry-run")
    assert "-# mine" in shown.stdout
    assert files_of(repository) == before
    kept = init(repository, mistral_lora, *words, "--keep")
    assert "kept       recipe.yaml" in kept.stdout
    assert files_of(repository).keys() - before.keys() == {"pytest.ini"}
    assert {name: (repository / name).read_text() for name in mine} == mine
    replaced = init(repository, mistral_lora, *words, "--force")
    assert f"replaced   {WORKFLOW}" in replaced.stdout
    assert "# mine" not in (repository / WORKFLOW).read_text() + (repository / "recipe.yaml").read_text()


def test_a_second_start_with_other_data_replaces_the_jobs_and_the_hook_of_the_first(
    repository: Path, mistral_lora: RunVerb
) -> None:
    for name in ("first.jsonl", "second.jsonl"):
        write_rows(repository / name, TALK)
    (repository / ".pre-commit-config.yaml").write_text("repos:\n  - {repo: meta, hooks: [{id: identity}]}\n")
    init(repository, mistral_lora, "first.jsonl", "--base", "models/base")
    job = repository / ".gitlab-ci.yml"
    job.write_text(job.read_text().replace("python:3.12", "python:3.13"))
    init(repository, mistral_lora, "second.jsonl", "--base", "models/base", "--force")
    hooks = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["hooks"][0].get("files") for one in hooks] == [r"^(recipe\.yaml|second\.jsonl)(/|$)", None]
    assert "python:3.12" in job.read_text()
    assert not (repository / ".gitlab").exists()


def test_lines_for_a_file_that_cannot_be_extended_are_printed(repository: Path, mistral_lora: RunVerb) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    (repository / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmistral_recipes = ['a.yaml']\n")
    (repository / ".gitlab-ci.yml").write_text("stages: [test]\n")
    (repository / ".pre-commit-config.yaml").write_text("repos: []\n")
    before = files_of(repository)
    done = init(repository, mistral_lora, "--base", "models/base", code=1)
    for line in (
        '    mistral_recipes = ["recipe.yaml"]',
        "      - local: .gitlab/mistral-lora.yml",
        "    - repo: local",
    ):
        assert line in done.stdout.splitlines()
    after = files_of(repository)
    assert {name: after[name] for name in before} == before
    assert ".gitlab/mistral-lora.yml" in after


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("https://github.com/a/b", {"github"}),
        ("git@gitlab.com:a/b.git", {"gitlab"}),
        ("/srv/git/b", {"github", "gitlab"}),
        ("", {"github", "gitlab"}),
    ],
)
def test_the_jobs_are_those_of_the_remote(remote: str, expected: set[str], repository: Path) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    if remote:
        subprocess.run(["git", "remote", "add", "origin", remote], cwd=repository, check=True)
    plan = plan_start(repository, [], "models/base")
    names = {one.name for one in plan.files}
    assert {name for name, file in (("github", WORKFLOW), ("gitlab", ".gitlab-ci.yml")) if file in names} == expected


@pytest.mark.parametrize("is_local", [True, False])
def test_a_job_is_told_to_fetch_a_local_base_and_no_base_of_the_hub(is_local: bool, repository: Path) -> None:
    """The jobs download a base of the Hub by themselves."""
    write_rows(repository / "rows.jsonl", TALK)
    [text] = [one.text for one in plan_start(repository, [], "models/base").files if one.name == "recipe.yaml"]
    recipe = yaml.safe_load(text)
    if not is_local:
        recipe["base"] = {"repo": "mistralai/Mistral-7B-Instruct-v0.3", "revision": "0" * 40}
    (repository / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = plan_start(repository, [], None)
    texts = {one.name: one.text for one in plan.files}
    for name in (WORKFLOW, ".gitlab-ci.yml"):
        assert ("TO DO: fetch the base" in texts[name]) is is_local
        yaml.safe_load(texts[name])
    assert any("fetch it where" in note for note in plan.notes) is is_local


def test_below_the_root_of_a_repository_the_jobs_would_never_run(
    repository: Path,
) -> None:
    folder = repository / "part"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", TALK)
    assert plan_start(folder, [], "models/base").to_do == []
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    [to_do] = plan_start(folder, [], "models/base").to_do
    assert "in part, they never run" in to_do
    write_rows(repository / "rows.jsonl", TALK)
    assert plan_start(repository, [], "models/base").to_do == []


def test_a_base_without_a_mistral_tokenizer_goes_by_its_template(repository: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    folder = tmp_path / "other"
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_rows(repository / "rows.jsonl", TALK)
    with pytest.raises(InputError, match="no Mistral tokenizer, and no chat template"):
        plan_start(repository, [], str(folder))
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    plan = plan_start(repository, [], str(folder))
    texts = {one.name: one.text for one in plan.files}
    assert yaml.safe_load(texts["recipe.yaml"])["backend"] == "chat-template"
    # mistral-common's ids are what goldens record
    assert "tests/goldens/rows.jsonl" not in texts
    assert "mistral_golden_dirs" not in texts["pytest.ini"]
    assert "own-" not in texts[WORKFLOW]


def test_in_ci_no_golden_is_recorded(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(repository / "rows.jsonl", TALK)
    monkeypatch.setenv("CI", "true")
    assert main(["init", "--base", "models/base"]) == 1
    assert not (repository / "tests/goldens/templates").exists()


def test_the_hook_runs_on_changes_of_the_recipe_and_the_data(repository: Path) -> None:
    import re

    (repository / "a+b.json").write_text(json.dumps(FORMATS["sharegpt"][1]))
    (repository / "shards").mkdir()
    write_rows(repository / "shards" / "train.jsonl", TALK)
    plan = plan_start(repository, [repository / "a+b.json", repository / "shards"], "models/base")
    [hook] = yaml.safe_load(next(one.text for one in plan.files if one.name.startswith(".pre")))["repos"][0]["hooks"]
    names = ("recipe.yaml", "a+b.json", "shards/train.jsonl", "aab.json", "x/a+b.json", "recipe.yaml2")
    assert [name for name in names if re.search(hook["files"], name)] == [*names[:3]]
    assert hook["entry"] == "mistral-lora check recipe.yaml --rules 0.1"
