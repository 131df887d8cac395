"""The weekly watch that `init` writes: valid, written once, and its commands are run on a tiny adapter."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from committed import commit_all
from local_server import Behaviour, serving
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS, load_folder
from pytest_mistral_lora.report.compare_reports import MARK
from pytest_mistral_lora.starter.constraints import CONSTRAINTS
from pytest_mistral_lora.starter.plan import WATCH

REPORT, LAST = "mistral-lora-watch.json", "last-watch"
URL = "https://models.example.org"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a recipe, and the adapter of its run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("CI", raising=False)
        assert main(["init", "--demo", "--ci", "none"]) == 0
        recipe = Path("recipe.yaml").read_text()
        Path("recipe.yaml").write_text(
            recipe.replace("generations: 4", "generations: 2\n  max_new_tokens: 40").replace("epochs: 40", "epochs: 20")
        )
        assert main(["train", "recipe.yaml"]) == 0
    return folder


@pytest.fixture
def repository(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def declare(deployment: str) -> None:
    """Write a deployment into the recipe, and record it in the folder of the run."""
    with Path("recipe.yaml").open("a") as file:
        file.write(f"deployment: {deployment}\n")
    assert main(["note", "lora-out", "--recipe", "recipe.yaml"]) == 0


def watch() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(WATCH).read_text())
    return found


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = watch()["jobs"]["watch"]["steps"]
    return found


def named(name: str) -> dict[str, Any]:
    [found] = [step for step in steps() if step.get("name") == name]
    return found


def ask() -> int:
    return run_question(watch()["jobs"]["watch"]["env"], named("Ask what is deployed")["run"])


def run_question(variables: Mapping[str, str], command: str) -> int:
    """Run the question of a job in this process, with the variables of the job."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        program, *words = shlex.split(os.path.expandvars(command))
    assert program == "mistral-lora"
    return main(words)


def run_step(name: str, **values: str) -> str:
    """Run a step as GitHub does; it must not fail."""
    return run_script(named(name)["run"], **values)


def run_script(script: str, **values: str) -> str:
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, env=os.environ | values, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_deployment_there_is_no_watch(repository: Path) -> None:
    assert main(["init", "--ci", "github"]) == 0
    assert not Path(WATCH).exists()


def test_the_watch_is_written_once_and_keeps_the_schema_of_github(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--ci", "github"]) == 0
    declare("{as: adapter, name: support}")
    capsys.readouterr()
    assert main(["init", "--ci", "github"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^created +{re.escape(WATCH)} ", out, flags=re.MULTILINE)
    assert "the weekly watch needs lora-out" in out
    written = Path(WATCH).read_bytes()
    # a job finds the folder once it is in the repository
    commit_all(Path(), "lora-out")
    assert main(["init", "--ci", "github"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^unchanged +{re.escape(WATCH)} ", out, flags=re.MULTILINE)
    assert "the weekly watch needs" not in out
    assert Path(WATCH).read_bytes() == written
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", WATCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_watch_has_no_code_of_others_and_its_versions_stay(repository: Path) -> None:
    declare(f"{{as: adapter, name: support, server: {{kind: vllm, url: '{URL}', key_env: MISTRAL_SERVER_KEY_A}}}}")
    main(["init", "--ci", "github"])
    text, job = Path(WATCH).read_text(), watch()["jobs"]["watch"]
    # YAML 1.1, which PyYAML reads, takes `on` for true
    assert watch()[True].keys() == {"schedule", "workflow_dispatch"}
    assert watch()["permissions"] == {"contents": "read", "actions": "read"}
    assert watch()["env"]["CONSTRAINTS"] == f"-c {CONSTRAINTS.as_posix()}"
    assert re.fullmatch(r"pytest-mistral-lora\[serving\](==| @ ).*", watch()["env"]["PACKAGE"])
    assert job["runs-on"] == "ubuntu-latest"
    # no install gets a secret
    secrets = {name: f"${{{{ secrets.{name} }}}}" for name in ("HF_TOKEN", "MISTRAL_SERVER_KEY_A")}
    assert [step["env"] for step in job["steps"] if "secrets." in str(step)] == [secrets]
    assert named("Ask what is deployed")["env"] == secrets
    assert "secrets." not in str(job["env"])
    # an input of somebody else is never a part of a script, and each action is named by its commit
    assert not re.search(r"run:.*\$\{\{", text)
    actions = re.findall(r"uses: (.*)", text)
    assert [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []
    # address and name are read from the folder, so that a swap changes no job
    assert URL not in text
    assert named("Ask what is deployed")["run"].startswith('mistral-lora serve-check "$FOLDER" ')


@pytest.mark.parametrize(
    ("deployment", "folder", "command"),
    [
        ("{as: adapter, name: support}", "lora-out", 'mistral-lora smoke "$FOLDER" '),
        ("{as: merged, name: support}", "merged", 'mistral-lora smoke "$FOLDER" --golden "$GOLDEN" '),
    ],
)
def test_a_folder_is_asked_if_no_server_is_named(deployment: str, folder: str, command: str, repository: Path) -> None:
    declare(deployment)
    main(["init", "--ci", "github"])
    variables = watch()["jobs"]["watch"]["env"]
    assert variables["FOLDER"] == folder
    # the second index gives PyTorch alone
    [torch] = [step for step in watch()["jobs"]["watch"]["steps"] if "--index-url" in step.get("run", "")]
    assert (torch["if"], torch["run"].split()[-1]) == ("vars.MISTRAL_LORA_GPU != 'true'", "torch")
    assert "--no-deps" in torch["run"]
    assert variables.get("GOLDEN", "lora-out/transcripts") == "lora-out/transcripts"
    assert named("Ask what is deployed")["run"].startswith(command)
    assert "[train]" in watch()["env"]["PACKAGE"]
    # the adapter alone needs its base
    assert ("fetch the base model" in Path(WATCH).read_text()) is (folder == "lora-out")


def test_the_job_of_gitlab_says_how_far_the_format_falls_apart(repository: Path) -> None:
    declare("{as: adapter, name: support}")
    assert main(["init", "--ci", "gitlab"]) == 0
    name = ".gitlab/mistral-lora-watch.yml"
    jobs = yaml.safe_load(Path(".gitlab-ci.yml").read_text())
    [job] = yaml.safe_load(Path(name).read_text()).values()
    # the file is included once it is there, so that a deployment may be declared at any time
    assert jobs["include"] == [{"local": name, "rules": [{"exists": [name]}]}]
    assert job["extends"] in jobs
    assert job["rules"] == [{"if": '$CI_PIPELINE_SOURCE == "schedule"'}]
    assert (job["cache"]["paths"][-1], job["cache"]["when"]) == (LAST, "always")
    *_, question = job["script"]
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.gitlab-ci", ".gitlab-ci.yml", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_question(job["variables"], question) == 0
    assert run_script("\n".join(job["after_script"])) == ""
    # the next week, the adapter changes nothing any more
    file = Path("lora-out/adapter_model.safetensors")
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)
    assert run_question(job["variables"], question) == 1
    shown = run_script("\n".join(job["after_script"]))
    assert re.search(r"^moved +\S+::transcript::formats: rate of eos: 2 of 2 → 0 of 2$", shown, flags=re.MULTILINE), (
        shown
    )
    rules = {cause["rule"] for cause in json.loads(Path(LAST, REPORT).read_text())["causes"]}
    assert rules == {"ML804", "ML805"}


def test_the_steps_ask_the_folder_and_say_what_moved(repository: Path, tmp_path: Path) -> None:
    declare("{as: adapter, name: support}")
    main(["init", "--ci", "github"])
    assert ask() == 0
    # the next week: GitHub's program gives the report of the last run
    Path("uploaded").mkdir()
    shutil.move(REPORT, f"uploaded/{REPORT}")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    gh = bin_folder / "gh"
    gh.write_text(
        f'#!/bin/sh\necho "$@" >> calls\ncase "$2" in list) echo 7;; download) cp -r uploaded {LAST};; esac\n'
    )
    gh.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    run_step("Fetch the report of the last run", PATH=path, GH_TOKEN="x", GITHUB_REF_NAME="main")
    listed, fetched = Path("calls").read_text().splitlines()
    assert listed.startswith("run list --workflow mistral-lora-watch.yml --branch main --status completed --limit 1")
    assert fetched == f"run download 7 --name mistral-lora-watch --dir {LAST}"
    [upload] = [step["with"] for step in steps() if "upload-artifact" in step.get("uses", "")]
    assert (upload["name"], upload["path"]) == ("mistral-lora-watch", REPORT)
    # meanwhile, an answer is another one
    file = next(Path("lora-out", TRANSCRIPTS).glob("*.json"))
    data = json.loads(file.read_text())
    asked = data["completion_ids"]
    data["completion_ids"] = [asked[0] + 1 if asked[0] < 30_000 else 5, *asked[1:]]
    file.write_text(json.dumps(data))
    assert ask() == 1
    shown = run_step("Compare with the last run", GITHUB_STEP_SUMMARY="summary.md")
    assert shown.startswith("1 new, 0 fixed; 1 record of answers moved")
    assert re.search(r"^moved +\S+::transcript::\S+: tier: exact → different$", shown, flags=re.MULTILINE), shown
    summary = Path("summary.md").read_text()
    assert summary.startswith(MARK)
    assert "Moved: " in summary


def test_the_steps_ask_the_declared_server(repository: Path) -> None:
    golden = load_folder(Path("lora-out") / TRANSCRIPTS)
    behaviour = Behaviour(Oracle(shipped_tokenizer("spm-v3")), golden=golden, models=({"id": "support"},))
    with serving(behaviour) as url:
        declare(f"{{as: adapter, name: support, server: {{kind: 'llamacpp:fp32', url: '{url}'}}}}")
        main(["init", "--ci", "github"])
        assert ask() == 0
        Path(LAST).mkdir()
        shutil.move(REPORT, f"{LAST}/{REPORT}")
        # the next week, the server has another version, and no adapter
        behaviour.version, behaviour.scale = "b9-test", None
        assert ask() == 1
    report = json.loads(Path(REPORT).read_text())
    assert "ML933" in [cause["rule"] for cause in report["causes"]]
    rates = [check["facts"]["rate of eos"] for check in report["checks"] if check["nodeid"].endswith("::by-ids")]
    assert rates == ["2 of 2"]
    shown = run_step("Compare with the last run", GITHUB_STEP_SUMMARY="summary.md")
    assert re.search(r"^new +ML933 support is served as a whole model", shown, flags=re.MULTILINE), shown
    assert re.search(r"^moved +\S+::server::there: server of: .*0\.0-test.* → .*b9-test", shown, flags=re.MULTILINE)
