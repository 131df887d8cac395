"""Plan the files that guard a repository: from a base and data, or from an existing recipe."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.chat.reading import open_regular, opened
from pytest_mistral_lora.conformance.rule_set import newest_rules
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.extras import PACKAGE
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import json_text
from pytest_mistral_lora.records.git import ask_git
from pytest_mistral_lora.records.manifest import DEPLOYMENT, MANIFEST, load
from pytest_mistral_lora.starter.constraints import CONSTRAINTS, constraints_text
from pytest_mistral_lora.starter.files import GOLDENS, StartPlan
from pytest_mistral_lora.starter.inputs import (
    ROWS,
    base_of_recipe,
    choose_base,
    example_rows,
    example_text,
    look_at,
    seen_rows,
)
from pytest_mistral_lora.starter.names import require_plain, yaml_text
from pytest_mistral_lora.starter.own_tests import folders_with_tests
from pytest_mistral_lora.starter.settings import (
    ExtendedFile,
    Value,
    ignore_settings,
    pre_commit_settings,
    pytest_settings,
)

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe.declared import Deployment

Ci = Literal["github", "gitlab"]
CI: tuple[Ci, ...] = ("github", "gitlab")
"""The services that get jobs."""

RECIPE = "recipe.yaml"
SCHEMA = ".mistral-lora/recipe.schema.json"
WORKFLOW = ".github/workflows/mistral-lora.yml"
WATCH = ".github/workflows/mistral-lora-watch.yml"
_WATCHES: Mapping[Ci, tuple[str, str]] = {
    "github": (WATCH, "GitHub"),
    "gitlab": (".gitlab/mistral-lora-watch.yml", "GitLab"),
}
GITLAB, GITLAB_INCLUDED = ".gitlab-ci.yml", ".gitlab/mistral-lora.yml"
_TEXTS = Path(__file__).parent / "texts"
_ENOUGH_TO_HOLD_OUT = 100
_NOTHING = "\0"
_CONVERTED = "  # another format: converted while it is read"
_FETCH = f"# TO DO: fetch the base model, whose folder {RECIPE} names, unless it is in the repository"
# without a golden, -k would select nothing, which is an error in pytest
_GOLDENS_COMMAND = "pytest --mistral-golden -o testpaths= -k own-"
_INSTALLABLE = re.compile(r" @ [a-z]+\+[A-Za-z0-9._~:/@+%-]+")
"""A place to install from, without a variable that GitHub, GitLab or a shell would expand."""
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".jsonl.gz")


class _Text(Template):
    # GitHub and GitLab expand `$` and `{{`
    delimiter = "§"


_TRAINING = {"epochs": "2", "learning_rate": "2e-4"}


def plan_start(
    folder: Path,
    rows: Sequence[Path],
    base: str | None,
    ci: Collection[Ci] | None = None,
    *,
    training: Mapping[str, str] = _TRAINING,
) -> StartPlan:
    """Plan the files that guard a repository; nothing is written.

    Args:
        folder: The repository.
        rows: Data files, folders or configurations that declare data; empty for `rows.jsonl`, or else example rows.
        base: A checkpoint folder, or `OWNER/NAME[@BRANCH]`. None for the existing recipe.
        ci: The services that get jobs; None for the service of the repository's remote, or else all.
        training: The values of `epochs` and `learning_rate` in a new recipe.

    Raises:
        InputError: If there is neither a base nor a recipe, a path is not data, or the base cannot be used.
    """
    recipe = folder / RECIPE
    if base is None and not rows and recipe.exists():
        plan = _around_recipe(folder, recipe)
    elif base is None:
        raise InputError(
            "no base model is named",
            place="--base",
            expected="a repository of the Hub, or a checkpoint folder",
            next_step="For example: mistral-lora init rows.jsonl --base mistralai/Mistral-7B-Instruct-v0.3",
        )
    else:
        plan = _with_new_recipe(folder, rows, base, training)
    _add_tests(plan)
    _add_ignored(plan)
    _add_constraints(plan)
    here = folder.resolve()
    # the root of the git repository, or else the folder itself
    root = next((parent for parent in (here, *here.parents) if (parent / ".git").exists()), here)
    _add_jobs(plan, _services(root) if ci is None else ci)
    _add_hook(plan)
    if root != here:
        below = here.relative_to(root).as_posix()
        plan.to_do.append(
            f"Run init in {root}, the root of your repository, with the paths from there. Jobs and hooks are read at "
            f"the root alone: in {below}, they never run"
        )
    return plan


def _around_recipe(folder: Path, path: Path) -> StartPlan:
    from pytest_mistral_lora.training.recipe import load_recipe
    from pytest_mistral_lora.training.recipe.reading import below

    recipe = load_recipe(path)
    require_plain(str(recipe.base.name or recipe.base.repo), Place.of(path) / "base")
    try:
        files = recipe.files()
        for file in files:
            require_plain(str(file.path), Place.of(path) / "data")
        seen = [seen_rows(recipe.name_of(file.path), "rows", [file]) for file in files]
    except InputError as error:
        raise RecipeError(error.found, place=below(Place.of(path), error.place), next_step=error.next_step) from error
    plan = StartPlan(folder, base_of_recipe(recipe), seen)
    output = recipe.output.absolute()
    if output.is_relative_to(folder.absolute()):
        plan.output = output.relative_to(folder.absolute()).as_posix()
    plan.deployment = recipe.deployment
    plan.notes.append(f"{RECIPE} is there, and stays as it is")
    _add_faults(plan)
    return plan


def _with_new_recipe(folder: Path, rows: Sequence[Path], base: str, training: Mapping[str, str]) -> StartPlan:
    from pytest_mistral_lora.training.recipe import Recipe

    rows = rows or _own_rows(folder)
    seen = [look_at(path, folder) for path in rows] or [example_rows()]
    plan = StartPlan(folder, choose_base(base, folder), seen)
    if not rows or any(map(_has_examples, rows)):
        plan.add(ROWS, example_text(), "example rows, to be replaced by yours")
        plan.notes.append(f"{ROWS} has example rows: remove it, then mistral-lora import YOUR_DATA --to {ROWS}")
    backend = f"\nbackend: {plan.base.backend}  # no Mistral tokenizer: its own template renders the rows\n"
    few = "  # held_out: 0.05  # with more rows: a part that is never trained on, to measure the loss on it"
    enough = "  held_out: 0.05  # never trained on: the loss on this part tells you about new conversations"
    values = {
        "recipe": RECIPE,
        "base": "\n".join(plan.base.lines),
        "backend": backend if plan.base.backend == "chat-template" else "",
        "train": "\n".join(f"    - {yaml_text(data.entry)}{_CONVERTED * data.converted}" for data in seen),
        **training,
        "held_out": enough if sum(data.count for data in seen) >= _ENOUGH_TO_HOLD_OUT else few,
    }
    plan.add(RECIPE, _text("recipe.yaml.txt", values), "base, rows, adapter and training")
    plan.add(SCHEMA, json_text(Recipe.json_schema), "lists every key of the recipe to your editor")
    _add_faults(plan)
    return plan


def _has_examples(path: Path) -> bool:
    """Return whether a path is the file of example rows."""
    examples = example_text().encode()
    if not path.is_file() or path.stat().st_size != len(examples):
        return False
    with open_regular(path) as file:
        return file.read() == examples


def _own_rows(folder: Path) -> list[Path]:
    """Return the default rows of a repository; empty if it has no data.

    Raises:
        InputError: If there are data files; then the user has to choose.
    """
    if (folder / ROWS).is_file():
        return [folder / ROWS]
    files = sorted({*folder.glob("*"), *(folder / "data").glob("*")})
    found = [
        file.relative_to(folder).as_posix() for file in files if file.name.endswith(_DATA_SUFFIXES) and file.is_file()
    ]
    if found:
        more = "" if len(found) == 1 else f" (or {', '.join(found[1:4])})"
        raise InputError(
            f"no rows are named, and there is {found[0]}{more}",
            expected="the data to train on",
            next_step=f"Name it: mistral-lora init {shlex.quote(found[0])} --base BASE",
        )
    return []


def _add_faults(plan: StartPlan) -> None:
    base = plan.base
    if not base.pinned:
        plan.to_do.append(f"Pin the base, online: mistral-lora pin {RECIPE}. Not done here: {base.missing}")
    elif base.missing:
        plan.to_do.append(f"Fetch the base, without whose tokenizer nothing can be judged: {base.missing}")
    for data in plan.rows:
        if data.bad:
            counted = f"{data.bad} of {data.bad + data.count} rows of {data.name} cannot be used"
            shown = "".join(f"\n    {error}" for error in data.errors)
            more = f"\n    … and {data.bad - len(data.errors)} more" if data.bad > len(data.errors) else ""
            plan.to_do.append(f"Mend the data: {counted}.{shown}{more}")


def has_goldens(plan: StartPlan) -> bool:
    """Return whether golden rows exist or are planned."""
    planned = any(file.name.startswith(f"{GOLDENS.as_posix()}/") for file in plan.files)
    return plan.base.backend != "chat-template" and (planned or any((plan.folder / GOLDENS).glob("*.jsonl")))


def _add_tests(plan: StartPlan) -> None:
    """Add golden rows, if there are none and the base allows them, and the settings by which pytest finds all files."""
    samples = [row for data in plan.rows for row in data.samples][:5]
    if plan.base.backend == "chat-template":
        plan.notes.append("no goldens: they record mistral-common's ids, and this base has no Mistral tokenizer")
    elif any((plan.folder / GOLDENS).glob("*.jsonl")):
        plan.notes.append(f"{GOLDENS.as_posix()} has rows already, and stays as it is")
    elif samples:
        text = "".join(f"{row.to_jsonl()}\n" for row in samples)
        plan.add((GOLDENS / "rows.jsonl").as_posix(), text, "a few rows, whose tokens are recorded")
    values: dict[str, Value] = {"mistral_recipes": [RECIPE]}
    if has_goldens(plan):
        values["mistral_golden_dirs"] = [GOLDENS.as_posix()]
    # else the suite would run alone, without the repository's own tests
    tests = folders_with_tests(plan.folder)
    # a newer version is your decision: an existing one stays
    defaults: dict[str, Value] = {**({"testpaths": tests} if tests else {}), "mistral_rules": newest_rules()}
    made = pytest_settings(plan.folder, values, defaults)
    _add_extended(plan, made, "what `pytest --mistral-golden` checks")


def _add_ignored(plan: StartPlan) -> None:
    """Keep what train, merge and export write out of the repository: gigabytes, made again from recipe and rows."""
    made = ignore_settings(plan.folder, [f"{plan.output}/", "*.work/", "merged/", "served/"])
    _add_extended(plan, made, "keeps the outputs of train, merge and export out of Git")


def _add_constraints(plan: StartPlan) -> None:
    """Add the versions that the jobs install; an existing file stays, because `pin --upgrade` moves it."""
    if (plan.folder / CONSTRAINTS).is_file():
        plan.notes.append(f"{CONSTRAINTS.as_posix()} stays as it is: mistral-lora pin --upgrade moves its versions")
    else:
        plan.add(CONSTRAINTS.as_posix(), constraints_text(), "versions of the libraries that decide ids, for the jobs")


def _add_extended(plan: StartPlan, made: ExtendedFile, purpose: str) -> None:
    if made.text is None:
        plan.by_hand[f"{made.name}, {made.section}"] = made.lines
    else:
        plan.add(made.name, made.text, purpose, extends=True)


def _services(root: Path) -> Collection[Ci]:
    """Return the service of a repository's remote; all services if the remote is on another."""
    try:
        with opened(root / ".git" / "config") as file:
            text = file.read().decode()
    except (InputError, OSError, UnicodeError):
        return CI
    urls = " ".join(re.findall(r"^\s*url\s*=\s*(.*)$", text, flags=re.MULTILINE))
    return [service for service in CI if service in urls] or CI


def _add_jobs(plan: StartPlan, services: Collection[Ci]) -> None:
    light, train, note = installed_requirement()
    if services and note:
        plan.notes.append(note)
    base = plan.base
    values = {
        "recipe": RECIPE,
        "package": yaml_text(light),
        "train_package": yaml_text(train),
        "rules": newest_rules(),
    }
    if base.local and services:
        plan.notes.append(f"your jobs need {base.name}, which is large: fetch it where the files have the words TO DO")
    # a job's steps are indented by two more columns on GitHub
    step = f"    {_FETCH}" if base.local else _NOTHING
    if "github" in services:
        values["fetch_base"] = f"  {step}" if base.local else _NOTHING
        steps = [
            "      - name: Compare with the goldens",
            "        if: success() || failure()",
            f"        run: {_GOLDENS_COMMAND}",
        ]
        values["golden_step"] = "\n".join(steps) if has_goldens(plan) else _NOTHING
        text = _text("github.yml.txt", values)
        plan.add(WORKFLOW, text, "jobs for GitHub: a check on each change, a train on a GPU")
    if plan.deployment is not None and services:
        values |= _watch_values(plan, plan.deployment, services)
        for service, (name, title) in _WATCHES.items():
            if service in services:
                text = _text(f"{service}_watch.yml.txt", values)
                plan.add(name, text, f"a job for {title}: each week, what is deployed is asked")
    if "gitlab" in services:
        values["fetch_base"] = step
        text = _text("gitlab.yml.txt", values)
        name = GITLAB
        existing = (plan.folder / GITLAB).read_bytes() if (plan.folder / GITLAB).is_file() else b""
        if existing not in (b"", text.encode()) and not existing.startswith(text.encode().partition(b"\n")[0]):
            name = GITLAB_INCLUDED
            if GITLAB_INCLUDED.encode() not in existing:
                plan.by_hand[f"{GITLAB}, include"] = f"include:\n  - local: {GITLAB_INCLUDED}\n"
        plan.add(name, text, "jobs for GitLab: a check on each change, a train on a GPU")


# GitHub's expression for "if … then … else": `condition && value || other`
_GPU_OR_CPU = """${{ vars.MISTRAL_LORA_GPU == 'true' && fromJSON('["self-hosted", "gpu"]') || 'ubuntu-latest' }}"""
# a second index for every name could give any package: this one gives PyTorch alone, and PyPI what it needs
_TORCH_FOR_CPUS = """\
      # PyTorch's wheels for CPUs, which are a tenth of those for GPUs
      - if: vars.MISTRAL_LORA_GPU != 'true'
        run: pip install $CONSTRAINTS --no-deps --index-url https://download.pytorch.org/whl/cpu torch"""
_MERGED = "merged"
"""The folder of the merged model that production serves, unless a folder of the repository says that it is one."""


def _watch_values(plan: StartPlan, deployment: Deployment, services: Collection[Ci]) -> dict[str, str]:
    """Return the values of the jobs that ask each week what is deployed: a server, or else the folder.

    Args:
        plan: The plan, which gets a note for each thing that the jobs need.
        deployment: What production serves.
        services: The services that get such a job.
    """
    server, light = deployment.server, _requirement("serving" if deployment.server else "train")
    golden = deployment.served_as == "merged" and server is None
    folder = _merged_folder(plan) if golden else plan.output
    needed = [folder, plan.output] if golden else [folder]
    absent = [name for name in needed if not _is_tracked(plan.folder, name)]
    key = (server and server.key_env) or ""
    if absent:
        plan.notes.append(f"the weekly watch needs {' and '.join(absent)}: fetch it where its job has the words TO DO")
    if key and "github" in services:
        plan.notes.append(f"the weekly watch reads the server's key from the secret {key} of the repository")
    if key and "gitlab" in services:
        plan.notes.append(f"the weekly watch reads the server's key from the variable {key} of the project")
    return {
        "watch_package": yaml_text(light),
        "runs_on": "ubuntu-latest" if server else _GPU_OR_CPU,
        "folder": yaml_text(folder),
        "golden": f"GOLDEN: {yaml_text(f'{plan.output}/transcripts')}" if golden else _NOTHING,
        "key": f"          {key}: ${{{{ secrets.{key} }}}}" if key else _NOTHING,
        "torch": _TORCH_FOR_CPUS if server is None else _NOTHING,
        "fetch_served": _FETCH if plan.base.local and server is None and not golden else _NOTHING,
        "command": _asks(deployment),
    }


def _asks(deployment: Deployment) -> str:
    """Return the command that asks what is deployed, by the variables of the job."""
    if deployment.server is not None:
        return 'mistral-lora serve-check "$FOLDER"'
    golden = ' --golden "$GOLDEN"' if deployment.served_as == "merged" else ""
    return f'mistral-lora smoke "$FOLDER"{golden}'


def _merged_folder(plan: StartPlan) -> str:
    """Return the folder of the repository that says that it is the served merged model."""
    for file in sorted(plan.folder.glob(f"*/{MANIFEST}")):
        try:
            data = load(file).data
        except InputError:
            continue
        if data["kind"] == "merged" and (data.get(DEPLOYMENT) or {}).get("as") == "merged":
            return file.parent.name
    return _MERGED


def _is_tracked(folder: Path, name: str) -> bool:
    """Return whether the manifest of a folder is in the repository, so that a job finds the folder."""
    try:
        return bool(ask_git(folder, "ls-files", "--", f"{name}/{MANIFEST}"))
    except (OSError, subprocess.SubprocessError):
        return False


def _text(name: str, values: Mapping[str, str]) -> str:
    """Return a text with its values; a line with an empty value is left out.

    Args:
        name: The text.
        values: Fixed text, or a name from `yaml_text`. Names never go into a comment or another value, where their text
            could have a meaning.
    """
    text = _Text((_TEXTS / name).read_text(encoding="utf-8")).substitute(values)
    return re.sub(rf"^ *{_NOTHING}\n", "", text, flags=re.MULTILINE)


def _requirement(extra: str) -> str:
    """Return the requirement of the install with an extra: see `installed_requirement`."""
    light, _, _ = installed_requirement()
    return light.replace(PACKAGE, f"{PACKAGE}[{extra}]", 1)


def installed_requirement() -> tuple[str, str, str]:
    """Return the requirements of the light install and of the training install, and a note for the user.

    If this package was installed from a version control system, the requirements name the same commit.
    """
    try:
        found = distribution(PACKAGE)
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        version = found.version
    except (PackageNotFoundError, ValueError):
        return PACKAGE, f"{PACKAGE}[train]", ""
    # PEP 610: https://packaging.python.org/en/latest/specifications/direct-url/
    origin = origin if isinstance(origin, dict) else {}
    source = origin.get("vcs_info")
    if isinstance(source, dict):
        where = f" @ {source.get('vcs')}+{origin.get('url')}@{source.get('commit_id')}"
        if _INSTALLABLE.fullmatch(where):
            return f"{PACKAGE}{where}", f"{PACKAGE}[train]{where}", ""
    pin, url = f"=={version}", origin.get("url")
    step = f"your jobs look for {version} on an index. If none has it, give PACKAGE in their files an address"
    note = f"{PACKAGE} {version} is installed from {url}: {step}" if url else ""
    return f"{PACKAGE}{pin}", f"{PACKAGE}[train]{pin}", note


def _add_hook(plan: StartPlan) -> None:
    # rows of another format and folders of shards are also data: any change below them runs the check
    names = dict.fromkeys([RECIPE, *(data.name.removeprefix("./") for data in plan.rows)])
    files = f"^({'|'.join(map(re.escape, names))})(/|$)"
    hook = _text("pre_commit_hook.yaml.txt", {"recipe": RECIPE, "rules": newest_rules(), "files": yaml_text(files)})
    _add_extended(plan, pre_commit_settings(plan.folder, hook), "checks recipe and rows before each commit")
