"""The jobs that `init` writes, the action and the hooks: each is valid for its service, and its commands are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from cut_sentencepiece import cut_v3

from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import VERBS, main
from pytest_mistral_lora.report.compare_reports import MARK
from pytest_mistral_lora.starter import record_missing, write_plan
from pytest_mistral_lora.starter.constraints import CONSTRAINTS
from pytest_mistral_lora.starter.plan import GITLAB, PACKAGE, WORKFLOW, installed_requirement, plan_start

ROOT = Path(__file__).parents[2]
RunVerb = Callable[..., subprocess.CompletedProcess[str]]
RunPytest = Callable[..., pytest.RunResult]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository without data, guarded by `init`, whose own tests cannot be imported."""
    folder = tmp_path_factory.mktemp("guarded")
    write_tiny_base(folder / "models" / "base", cut_v3())
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\ntestpaths = ['mine']\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "test_mine.py").write_text("import no_such_package\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        patch.chdir(folder)
        write_plan(plan_start(Path(), [], "models/base"))
        assert record_missing(Path(), "recipe.yaml")[1] == []
    return folder


def of_main_branch(steps: list[Any]) -> list[Any]:
    """Return the steps of GitHub that keep the report of the main branch, or compare with it."""
    return [step for step in steps if isinstance(step, dict) and "mistral-lora.main.json" in json.dumps(step)]


def commands(steps: list[Any]) -> Iterator[list[str]]:
    """Yield the words of each command of a job that judges; of a step of GitHub, of those that are no action."""
    for step in steps:
        if step in of_main_branch(steps):
            continue
        script = step.get("run", "") if isinstance(step, dict) else step
        for line in script.splitlines():
            words = shlex.split(line)
            # what no token of the base is given to
            yield words[3:] if words[:2] == ["env", "-u"] else words


def without_outputs(words: list[str]) -> list[str]:
    """Return a command without the options that name its outputs: each service shows other files."""
    kept = [word for word in words if not word.startswith(("--junitxml=", "--mistral-report="))]
    for option in ("--report", "--output-format"):
        while option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    return kept


def run_command(words: list[str], folder: Path, run_verb: RunVerb, run_pytest: RunPytest) -> None:
    if words[0] == "mistral-lora":
        done = run_verb(*words[1:], folder=folder)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    else:
        assert words[0] == "pytest"
        assert run_pytest(*words[1:]).ret == 0, words


def job(folder: Path, name: str) -> list[Any]:
    """Return the steps of a job."""
    if name.startswith("github"):
        return yaml.safe_load((folder / WORKFLOW).read_text())["jobs"][name.partition(" ")[2]]["steps"]
    return yaml.safe_load((folder / GITLAB).read_text())[name.partition(" ")[2]]["script"]


def packages(folder: Path, name: str) -> list[str]:
    """Return the packages that the variables of a job name: the light one, and the one that trains."""
    if name.startswith("github"):
        variables = yaml.safe_load((folder / WORKFLOW).read_text())["env"]
    else:
        variables = yaml.safe_load((folder / GITLAB).read_text())[".mistral-lora"]["variables"]
    return [variables["PACKAGE"], variables["TRAIN_PACKAGE"]]


@pytest.mark.parametrize(
    "name",
    [
        "github check",
        pytest.param("github train", marks=pytest.mark.slow),
        pytest.param("gitlab mistral-lora", marks=pytest.mark.slow),
        pytest.param("gitlab mistral-lora-train", marks=pytest.mark.slow),
    ],
)
def test_the_commands_of_a_job_are_green_as_they_stand(
    name: str, guarded: Path, tmp_path: Path, mistral_lora: RunVerb, run_pytest: RunPytest
) -> None:
    shutil.copytree(guarded, tmp_path, dirs_exist_ok=True)
    install, *words = commands(job(guarded, name))
    light, train, _ = installed_requirement()
    assert install == ["pip", "install", "$CONSTRAINTS", "$TRAIN_PACKAGE" if name.endswith("train") else "$PACKAGE"]
    assert packages(guarded, name) == [light, train]
    assert words
    for command in words:
        # no GPU is here; else the command is as it stands
        run_command([word if word != "cuda" else "cpu" for word in command], tmp_path, mistral_lora, run_pytest)
    assert [path for path in outputs(guarded, name) if not (tmp_path / path).is_file()] == []


def outputs(folder: Path, name: str) -> list[str]:
    """Return the files that a green job hands to its service."""
    if name == "github check":
        [uploaded] = [step["with"]["path"] for step in job(folder, name) if "upload-artifact" in step.get("uses", "")]
        files = uploaded.split()
    elif name == "gitlab mistral-lora":
        artifacts = yaml.safe_load((folder / GITLAB).read_text())["mistral-lora"]["artifacts"]
        files = [*artifacts["paths"], artifacts["reports"]["junit"]]
    else:
        files = []
    return [file for file in files if file != "mistral-lora.rows.html"]  # for failed rows


COMMANDS = {
    ("github check",): [
        "pip install $CONSTRAINTS $PACKAGE",
        "mistral-lora check recipe.yaml --rules 0.1",
        "pytest --mistral-golden -o testpaths= -k own-",
    ],
    ("gitlab mistral-lora",): [
        "pip install $CONSTRAINTS $PACKAGE",
        "pytest --mistral-golden --mistral-no-train --mistral-recipe recipe.yaml --mistral-rules 0.1 "
        "--noconftest -o addopts= -o testpaths=",
    ],
    ("github train", "gitlab mistral-lora-train"): [
        "pip install $CONSTRAINTS $TRAIN_PACKAGE",
        "pytest --mistral-golden --mistral-device cuda -o testpaths= -m mistral_training",
    ],
}
"""The commands of the jobs with the same task, without the options that name outputs."""


@pytest.mark.parametrize(("names", "expected"), COMMANDS.items(), ids=" and ".join)
def test_both_services_run_the_same_commands(names: tuple[str, ...], expected: list[str], guarded: Path) -> None:
    for name in names:
        assert [" ".join(without_outputs(words)) for words in commands(job(guarded, name))] == expected


def test_the_pinned_versions_are_installed_on_each_day_but_monday(guarded: Path) -> None:
    assert (guarded / CONSTRAINTS).is_file()
    pinned = f"-c {CONSTRAINTS.as_posix()}"
    variable = yaml.safe_load((guarded / WORKFLOW).read_text())["env"]["CONSTRAINTS"]
    # GitHub's expression for "if … then … else": `condition && value || other`
    assert variable == f"${{{{ github.event_name != 'schedule' && '{pinned}' || '' }}}}"
    jobs = yaml.safe_load((guarded / GITLAB).read_text())
    assert jobs[".mistral-lora"]["variables"]["CONSTRAINTS"] == pinned
    for name in ("mistral-lora", "mistral-lora-train"):
        [scheduled] = [rule for rule in jobs[name]["rules"] if "variables" in rule]
        assert scheduled == {"if": '$CI_PIPELINE_SOURCE == "schedule"', "variables": {"CONSTRAINTS": ""}}
    # nobody finds the schedule of GitLab in the file, where GitHub has it
    assert "Pipeline schedules" in (guarded / GITLAB).read_text()


@pytest.mark.parametrize("path", [WORKFLOW, "action.yml"])
def test_each_action_is_named_by_its_commit(path: str, guarded: Path) -> None:
    text = ((guarded if path == WORKFLOW else ROOT) / path).read_text()
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []


@pytest.mark.usefixtures("data_alone")
def test_both_services_are_red_at_the_same_row(
    guarded: Path, tmp_path: Path, mistral_lora: RunVerb, run_pytest: RunPytest
) -> None:
    shutil.copytree(guarded, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "bot", "content": "x"}]}\n')
    (tmp_path / "conftest.py").write_text("raise SystemExit(0)\n")
    _, check, *_ = commands(job(guarded, "github check"))
    done = mistral_lora(*check[1:], folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"^::error .*file=rows\.jsonl,line=6", done.stdout, flags=re.MULTILINE), done.stdout
    _, judge = commands(job(guarded, "gitlab mistral-lora"))
    assert run_pytest(*judge[1:]).ret == pytest.ExitCode.TESTS_FAILED
    cases = [*ElementTree.parse(tmp_path / "mistral-lora.xml").iter("testcase")]
    # the goldens are judged in the same run
    assert any("own-" in str(case.get("name")) for case in cases)
    failed = [case for case in cases if case.find("failure") is not None]
    assert {one.get("value") for case in failed for one in case.iter("property") if one.get("name") == "line"} == {"6"}


@pytest.mark.usefixtures("data_alone")
def test_a_pull_request_is_compared_with_the_main_branch(guarded: Path, tmp_path: Path, mistral_lora: RunVerb) -> None:
    shutil.copytree(guarded, tmp_path, dirs_exist_ok=True)
    _, check, *_ = commands(job(guarded, "github check"))
    restore, compare, keep, save = of_main_branch(job(guarded, "github check"))
    # a run on the main branch keeps its report under a key that a pull request finds
    assert mistral_lora(*check[1:], folder=tmp_path).returncode == 0
    run_script(keep["run"], tmp_path)
    assert restore["with"]["path"] == save["with"]["path"] == "mistral-lora.main.json"
    assert save["with"]["key"] == "mistral-lora-report-${{ github.sha }}"
    assert save["with"]["key"].startswith(restore["with"]["restore-keys"])
    assert "'pull_request'" in restore["if"]
    assert all("'push'" in step["if"] for step in (keep, save))
    # the change breaks a row
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "bot", "content": "x"}]}\n')
    assert mistral_lora(*check[1:], folder=tmp_path).returncode == 1
    shown = run_script(compare["run"], tmp_path, GITHUB_STEP_SUMMARY="summary.md")
    assert shown.startswith("1 new, 0 fixed")
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith(MARK)
    assert "| new | " in summary
    assert "Correct the row" in summary


def run_script(script: str, folder: Path, **values: str) -> str:
    """Run a script as GitHub does, and return its output; it must not fail."""
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", **values}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_secret_reaches_a_runner_of_your_own_with_code_of_others(guarded: Path) -> None:
    text = (guarded / WORKFLOW).read_text()
    workflow = yaml.safe_load(text)
    # YAML 1.1, which PyYAML reads, takes `on` for true
    assert {"pull_request", "push", "schedule"} <= workflow[True].keys()
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert jobs["check"]["runs-on"] == "ubuntu-latest"
    assert jobs["train"]["runs-on"] == ["self-hosted", "gpu"]
    assert [name for name, job in jobs.items() if "permissions" in job] == []
    assert "github.event_name != 'pull_request'" in jobs["train"]["if"]
    assert "pull_request_target" not in text
    # an input of somebody else is never a part of a script
    assert not re.search(r"run:.*\$\{\{", text)
    # a second index could give any package
    assert "PIP_EXTRA_INDEX_URL" not in text + (guarded / GITLAB).read_text() + (ROOT / "action.yml").read_text()


def test_the_token_of_the_base_is_given_to_what_reads_the_base_alone(guarded: Path) -> None:
    workflow = yaml.safe_load((guarded / WORKFLOW).read_text())
    token = {"HF_TOKEN": "${{ secrets.HF_TOKEN }}"}
    assert "HF_TOKEN" not in json.dumps([workflow["env"], *(job.get("env", {}) for job in workflow["jobs"].values())])
    with_token = {
        name: [step["run"].split()[:2] for step in workflow["jobs"][name]["steps"] if step.get("env") == token]
        for name in ("check", "train")
    }
    # a test of a pull request is in no job that has it: `train` is left out there
    assert with_token == {"check": [["mistral-lora", "check"]], "train": [["pytest", "--mistral-golden"]]}
    jobs = yaml.safe_load((guarded / GITLAB).read_text())
    install, judge = jobs["mistral-lora"]["script"]
    assert install.startswith("env -u HF_TOKEN ")
    # no code of the repository runs in this step
    assert {"--noconftest", "addopts=", "testpaths="} <= {*judge.split()}
    assert jobs["mistral-lora-train"]["script"][0].startswith("env -u HF_TOKEN pip install")


SCHEMAS = {
    "github-workflows": WORKFLOW,
    "gitlab-ci": GITLAB,
    "github-actions": "action.yml",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file_keeps_the_schema_of_its_service(schema: str, guarded: Path) -> None:
    pytest.importorskip("check_jsonschema")
    file = ROOT / SCHEMAS[schema] if schema == "github-actions" else guarded / SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def action_steps() -> list[Any]:
    return yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"]


def test_the_script_of_the_action_checks_its_targets(guarded: Path, tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    *_, install, check, _ = action_steps()
    assert install["run"] == 'python -m pip install "$ACTION_PATH"'
    # an input of somebody else is never a part of a script
    assert not re.search(r"run:.*\$\{\{", (ROOT / "action.yml").read_text())
    assert {"targets", "args", "report"} <= action["inputs"].keys()
    # in place of the verb, a program that shows its words
    program(tmp_path / "mistral-lora", "printf '[%s]' \"$@\"\nexit 7")
    values = {"TARGETS": "a.yaml  b.jsonl\n$(x)\n", "ARGS": "--tokenizer *", "REPORT": ""}
    done = run_step(check, tmp_path, values)
    words = f"[--report][{tmp_path}/mistral-lora.json][a.yaml][b.jsonl][$(x)][--tokenizer][*]"
    assert done.stdout == f"[check][--output-format][github]{words}"
    assert done.returncode == 7


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_step(step: dict[str, Any], folder: Path, values: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a step of the action as GitHub does, with programs of a folder before all others."""
    environment = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUNNER_TEMP": str(folder),
        "GITHUB_OUTPUT": str(folder / "outputs"),
        "GITHUB_REPOSITORY": "us/ours",
        "HF_HUB_OFFLINE": "1",
    }
    assert set(step["env"]) == set(values)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(
        command, env=environment | values, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed, which GitHub's runners have")
def test_the_action_has_outputs_and_writes_one_comment(tmp_path: Path) -> None:
    *_, check, compare = action_steps()
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    values = {"TARGETS": "rows.jsonl", "ARGS": "--tokenizer spm-v3", "REPORT": "report.html"}
    done = run_step(check, tmp_path, values)
    assert done.returncode == 1, done.stderr
    assert "::error file=rows.jsonl,line=1" in done.stdout
    outputs = (tmp_path / "outputs").read_text().splitlines()
    assert outputs == ["findings=1", f"report={tmp_path}/mistral-lora.json"]
    assert (tmp_path / "report.html").is_file()
    # in place of GitHub's program, one that shows its words, and knows an earlier comment or none
    shutil.copy(tmp_path / "mistral-lora.json", tmp_path / "main.json")
    given = {"BEFORE": "main.json", "AFTER": "mistral-lora.json", "PULL_REQUEST": "4", "GH_TOKEN": "x"}
    program(tmp_path / "gh", 'echo "$@" >> calls\ncase "$*" in *--jq*) cat earlier;; esac')
    for earlier, call in {"": "api repos/us/ours/issues/4/comments", "7\n8\n": "comments/7"}.items():
        (tmp_path / "earlier").write_text(earlier)
        (tmp_path / "calls").write_text("")
        done = run_step(compare, tmp_path, {**given, "COMMENT": "true"})
        assert (done.returncode, done.stdout.splitlines()[0]) == (0, "0 new, 1 unchanged, 0 fixed"), done.stderr
        assert call in (tmp_path / "calls").read_text().splitlines()[-1]
    assert (tmp_path / "mistral-lora.md").read_text().startswith(MARK)
    (tmp_path / "calls").unlink()
    assert run_step(compare, tmp_path, {**given, "COMMENT": "false"}).returncode == 0
    assert not (tmp_path / "calls").exists()


def test_the_commands_of_the_page_can_be_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "init.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ mistral-lora (.*)$", page, flags=re.MULTILINE)
    assert {line.split()[0] for line in lines} >= {"init", "pin", "check", "train"}
    verbs = {name: verb for group in VERBS.values() for name, verb in group.items()}
    for line in lines:
        words = shlex.split(line, comments=True)
        monkeypatch.setattr(verbs[words[0]], "run", lambda args: 0)
        assert main(words) == 0


def test_the_hook_of_this_repository_calls_a_verb_that_there_is(guarded: Path, mistral_lora: RunVerb) -> None:
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    program, *words = shlex.split(hook["entry"])
    assert (program, words, hook["args"], hook["pass_filenames"]) == ("mistral-lora", ["check"], ["recipe.yaml"], False)
    assert re.search(hook["files"], "data/rows.jsonl")
    assert not re.search(hook["files"], "README.md")


@pytest.mark.parametrize(
    ("origin", "version", "noted"),
    [
        (None, "==1.2", False),
        ({"url": "file:///x", "dir_info": {"editable": True}}, "==1.2", True),
        (
            {"url": "https://example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            " @ git+https://example.com/x.git@ab12",
            False,
        ),
        ({"url": "https://${USER}@example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}, "==1.2", True),
        ({"url": "https://x/`id`${{ secrets.X }}", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}, "==1.2", True),
        ({"url": "https://x/a\n- id", "vcs_info": {"vcs": "git"}}, "==1.2", True),
        ([], "==1.2", False),
    ],
)
def test_a_job_installs_the_package_that_is_installed_here(
    origin: Any, version: str, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pytest_mistral_lora-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.2\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    found = installed_requirement()
    assert found[:2] == (f"{PACKAGE}{version}", f"{PACKAGE}[train]{version}")
    assert bool(found[2]) is noted
