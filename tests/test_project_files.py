"""The files around the code: workflows, forms, supported versions, and what a release holds."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import try_wheel
import yaml
from forked import run_forked

from pytest_mistral_lora import __version__

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GPU_WORKFLOW = ROOT / "examples" / "gpu" / "gpu.yml"
WORKFLOWS = [*sorted((GITHUB / "workflows").glob("*.yml")), GPU_WORKFLOW]
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE" / "config.yml"]),
        ("dependabot", [GITHUB / "dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_a_file_for_github_keeps_its_schema(schema: str, files: list[Path]) -> None:
    pytest.importorskip("check_jsonschema")
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_pinned_actions_few_permissions_and_a_limit_of_time(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action)] == []
    loaded = yaml.safe_load(text)
    assert loaded["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in loaded["jobs"].values())
    # a value of somebody else is never a part of a script
    assert not re.search(r"run:.*\$\{\{", text)


def test_the_workflow_for_gpus_never_runs_code_of_pull_requests_and_trains_on_the_gpu(tmp_path: Path) -> None:
    loaded = yaml.safe_load(GPU_WORKFLOW.read_text(encoding="utf-8"))
    assert set(loaded[True]) == {"push", "schedule", "workflow_dispatch"}
    [job] = loaded["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    [command] = [step["run"] for step in job["steps"] if step.get("run", "").startswith("pytest")]
    words = shlex.split(command.replace('--mistral-recipe "$RECIPE"', ""))
    assert "cuda" in words
    # as there, but on the device that every machine has
    chosen = [word.replace("cuda", "cpu") for word in words[1:]]
    done = run_forked([sys.executable, "-m", "pytest", *chosen, "--collect-only", "-q"], cwd=tmp_path)
    items = [line for line in done.stdout.splitlines() if line.startswith("mistral-golden::")]
    assert items
    assert all("::train::" in item for item in items)


def test_a_release_is_published_without_a_password_and_by_one_job_alone() -> None:
    jobs = workflow("release")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert (jobs["publish"]["needs"], jobs["attest"]["needs"]) == ("attest", "build")
    assert jobs["publish"]["environment"]
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")
    steps = {name: " ".join(str(step) for step in job["steps"]) for name, job in jobs.items()}
    assert all(word in steps["build"] for word in ("python -m build", "twine check --strict", "sbom.cdx.json"))
    assert "attest-build-provenance" in steps["attest"]
    assert "sbom.cdx.json" in steps["attest"]


def test_a_release_installs_nothing_where_it_has_an_identity_and_its_tools_by_hash() -> None:
    for job in workflow("release")["jobs"].values():
        if "id-token" in job.get("permissions", ()):
            assert [step for step in job["steps"] if "run" in step] == []
    [install] = [step["run"] for step in workflow("release")["jobs"]["build"]["steps"] if "-r " in step.get("run", "")]
    assert "--require-hashes --no-deps" in install
    lines = (ROOT / install.split("-r ")[1]).read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    pins = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert [line for line in pins if not re.match(r"[\w.-]+==\S+ +--hash=sha256:[0-9a-f]{64}", line)] == []
    tools = {line.partition("==")[0] for line in pins}
    assert {"build", "hatchling", "twine", "cyclonedx-bom"} <= tools
    watched = {(entry["package-ecosystem"], entry["directory"]) for entry in dependabot()["updates"]}
    assert {("github-actions", "/"), ("pip", "/"), ("pip", "/.github/tools")} <= watched


def dependabot() -> dict[str, Any]:
    return yaml.safe_load((GITHUB / "dependabot.yml").read_text(encoding="utf-8"))


def test_a_release_that_is_started_by_hand_publishes_nothing_unless_it_is_asked_to() -> None:
    loaded = workflow("release")
    assert loaded[True]["workflow_dispatch"]["inputs"]["dry_run"] | {"description": ""} == {
        "description": "",
        "type": "boolean",
        "default": True,
    }
    condition = "github.event_name == 'push' || !inputs.dry_run"
    build, publish = loaded["jobs"]["build"], loaded["jobs"]["publish"]
    assert publish["if"] == condition
    # what is published has a tag, also by hand
    assert [step["if"] for step in build["steps"] if "GITHUB_REF_NAME" in step.get("run", "")] == [condition]
    assert build["env"]["MISTRAL_LORA_REPOSITORY"] == "${{ github.server_url }}/${{ github.repository }}"
    local = ConfigParser()
    local.read(ROOT / "tox.ini", encoding="utf-8")
    ours = [
        step["run"] for step in build["steps"] if re.match(r"python (-m build|-m twine|scripts/)", step.get("run", ""))
    ]
    commands = local["testenv:release"]["commands"]
    for run in ours:
        words = run.removeprefix("python -m ").removeprefix("python ").split()
        assert f"{words[0]} {words[1]}" in commands if words[0] == "twine" else words[0] in commands, run
    assert len(ours) == 3


def test_the_lines_of_the_readme_are_tried_with_the_wheel(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    wheel = tmp_path / "a wheel.whl"
    full, light = (try_wheel.with_wheel(line, wheel) for line in try_wheel.readme_lines(readme))
    assert shlex.split(full)[:3] == ["pip", "install", f"{wheel}[train]"]
    assert shlex.split(light)[:3] == ["pip", "install", str(wheel)]
    for line in ('pip install "pytest-mistral-lora[train]" && x', "pip install pytest-mistral-lora && x"):
        assert shlex.split(try_wheel.with_wheel(line, wheel))[2] == f"{wheel}{'[train]' * ('train' in line)}"
    with pytest.raises(ValueError, match="neither a clone"):
        try_wheel.with_wheel("pip install x && pytest --mistral-golden", wheel)
    page = (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    assert "-100" in try_wheel.guard_lines(page, is_sound=False)
    assert "-100" not in try_wheel.guard_lines(page, is_sound=True)


def test_classifiers_tox_and_ci_name_the_same_versions_of_python() -> None:
    classifiers = " ".join(PROJECT["project"]["classifiers"])
    versions = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    tox = ConfigParser()
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    numbers = ",".join(version.replace(".", "") for version in versions)
    assert f"testenv:py{{{numbers}}}" in tox.sections()
    jobs = workflow("ci")["jobs"]
    [everything] = [step["with"] for step in jobs["everything"]["steps"] if "setup-python" in step.get("uses", "")]
    assert [everything["python-version"], *jobs["tests"]["strategy"]["matrix"]["python"]] == versions


def test_a_development_tool_has_an_upper_bound() -> None:
    tools = [name for name in PROJECT["project"]["optional-dependencies"]["dev"] if "pytest-mistral-lora" not in name]
    assert [tool for tool in tools if "<" not in tool] == []


def test_lint_uses_one_version_of_ruff_everywhere() -> None:
    [ruff] = [tool for tool in PROJECT["project"]["optional-dependencies"]["dev"] if tool.startswith("ruff")]
    assert set(re.findall(r"^\s*(?:deps = )?(ruff\S+)$", (ROOT / "tox.ini").read_text(), flags=re.MULTILINE)) == {ruff}


def test_the_archive_of_a_release_has_every_folder_and_file_of_the_repository() -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    tops = {f"/{path.partition('/')[0]}" for path in done.stdout.splitlines()}
    # hatchling adds these by itself
    assert tops - set(included) <= {"/pyproject.toml", "/.gitignore"}
    assert set(included) <= tops


BUILD = """
import os, sys
import hatchling.build as build
made = build.build_sdist(sys.argv[1]) if sys.argv[2] == "sdist" else build.prepare_metadata_for_build_wheel(sys.argv[1])
print(made)
"""


def built(what: str, project: Path, output: Path, repository: str) -> subprocess.CompletedProcess[str]:
    """Have hatchling make the sdist, or the metadata of the wheel, of a project whose repository has an address."""
    output.mkdir()
    return subprocess.run(
        [sys.executable, "-c", BUILD, str(output), what],
        cwd=project,
        env={**os.environ, "MISTRAL_LORA_REPOSITORY": repository},
        capture_output=True,
        text=True,
        check=False,
    )


def addresses(project: Path, output: Path, repository: str) -> dict[str, str]:
    done = built("metadata", project, output, repository)
    assert done.returncode == 0, done.stderr
    [metadata] = output.glob("*.dist-info/METADATA")
    return dict(re.findall(r"^Project-URL: (.*?), (.*)$", metadata.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_the_addresses_of_a_package_are_those_of_the_repository_that_builds_it(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    assert addresses(ROOT, tmp_path / "none", "") == {}
    [plain] = (tmp_path / "none").glob("*/METADATA")
    assert (ROOT / "README.md").read_text(encoding="utf-8") in plain.read_text(encoding="utf-8")
    address = "https://github.com/some-owner/a.name"
    given = addresses(ROOT, tmp_path / "given", f" {address}.git\n")
    assert (given["Repository"], given["Issues"]) == (address, f"{address}/issues")
    assert {name for name, link in given.items() if not link.startswith(address)} == set()
    # an index shows the README, and has none of the files that it links
    metadata = (tmp_path / "given" / f"pytest_mistral_lora-{__version__}.dist-info" / "METADATA").read_text(
        encoding="utf-8"
    )
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"{address}/raw/HEAD/docs/assets/red.svg" in links
    assert f"{address}/blob/HEAD/docs/guard.md" in links


def test_a_wheel_that_is_built_from_the_sdist_has_its_addresses(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = built("sdist", ROOT, tmp_path / "dist", "https://git.example.org:8443/group/part/name/")
    assert done.returncode == 0, done.stderr
    [archive] = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.glob("pytest_mistral_lora-*")
    assert (unpacked / "hatch_build.py").is_file()
    address = "https://git.example.org:8443/group/part/name"
    assert addresses(unpacked, tmp_path / "wheel", "")["Repository"] == address
    [metadata] = (tmp_path / "wheel").glob("*/METADATA")
    assert f"]({address}/blob/HEAD/docs/index.md)" in metadata.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "repository",
    [
        "http://github.com/a/b",
        "https://someone:hunter2@github.com/a/b",
        "https://github.com",
        "https://github.com/a",
        "https://github.com/a/b?token=hunter2",
        "https://github.com/a/../b",
        "https://github.com/a/b\nAuthor: me",
        "github.com/a/b",
    ],
)
def test_a_wrong_address_of_the_repository_is_refused_and_not_printed(repository: str) -> None:
    pytest.importorskip("hatchling")
    with pytest.raises(ValueError, match="MISTRAL_LORA_REPOSITORY is not the address") as caught:
        runpy.run_path(str(ROOT / "hatch_build.py"))["urls"](repository)
    assert "hunter2" not in str(caught.value)


def test_a_wrong_address_of_the_repository_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = built("metadata", ROOT, tmp_path / "none", "http://github.com/a/b")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: MISTRAL_LORA_REPOSITORY ")


def test_the_citation_names_this_version_and_no_person() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], citation["version"]) == (PROJECT["project"]["name"], __version__)
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["abstract"] == PROJECT["project"]["description"]
    assert [set(author) for author in citation["authors"]] == [{"name"}]


def test_every_hook_runs_a_program_of_the_development_tools() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    tools = " ".join(PROJECT["project"]["optional-dependencies"]["dev"])
    for hook in hooks:
        program, *words = hook["entry"].split()
        assert (ROOT / words[0]).is_file() if program == "python" else program in tools, hook["id"]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy"}


def test_no_page_links_to_a_package_index() -> None:
    folders = ("docs", "examples", "benchmarks", "tests", ".github")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    assert [page.name for page in pages if "pypi.org" in page.read_text(encoding="utf-8")] == []
