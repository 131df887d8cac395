"""Run the reproduction of each known fault with the newest release of its program: `python scripts/field_run.py`.

For each fact with a script, an environment gets the newest release of the program and of the libraries that the script
needs, from pip's index, for a CPU. The table says whether the fault is still true, no longer true, or could not be run,
and `facts.patch` has the edit of the files of facts that follows: `git apply field-run/facts.patch`.

The exit code is 1 if a fault is no longer true, has come back, or a script could not be run.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from pytest_mistral_lora.programs.facts import Fact, read_facts, read_folders
from pytest_mistral_lora.programs.facts.entries import printed_versions, release_of
from pytest_mistral_lora.programs.facts.reading import REPRODUCTIONS, folders
from pytest_mistral_lora.records.files import write_text

Result = Literal["still true", "no longer true", "could not run"]
_INSTALL_SECONDS = 900
_TITLES = ("fact", "versions", "result", "evidence", "edit")


@dataclass(frozen=True)
class Seen:
    """The result of one reproduction.

    Attributes:
        fact: The fault.
        result: Whether it is there.
        evidence: What the script saw, or why it could not be run.
        versions: The installed version of each program of the fact; empty if nothing was installed.
    """

    fact: Fact
    result: Result
    evidence: str
    versions: Mapping[str, str]

    @property
    def edit(self) -> dict[str, str]:
        """The changed fields of the fact, as TOML; empty if it stays as it is."""
        if self.result == "could not run" or self.fact.until:
            return {}
        newer = {name: self.versions[name] for name, seen in self.fact.seen_with.items() if self._is_newer(name, seen)}
        if not newer:
            return {}
        if self.result == "still true":
            return {"seen_on": date.today().isoformat(), "seen_with": _table({**self.fact.seen_with, **newer})}
        program = self.fact.program.program
        # the first version that was seen without it; an older one may have been the first
        return {"until": _table({program: newer[program]})} if program in newer else {}

    def _is_newer(self, name: str, seen: str) -> bool:
        running, known = release_of(self.versions[name]), release_of(seen)
        return running is not None and known is not None and running > known

    @property
    def is_as_the_fact_says(self) -> bool:
        """Whether an open fault is still there, and one that has ended is not."""
        return self.result == ("no longer true" if self.fact.until else "still true")

    @property
    def remark(self) -> str:
        """The last cell of its line: the edit, or why there is none."""
        if self.edit:
            return ", ".join(f"{key} = {value}" for key, value in self.edit.items())
        if not self.fact.reproduction.script:
            return ""
        if self.result == "could not run":
            return "look at the script"
        if self.is_as_the_fact_says:
            return "none: as the fact says"
        return f"none: {'it had ended' if self.fact.until else 'seen with this version'}; look at it"

    @property
    def line(self) -> tuple[str, ...]:
        """Its line of the table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items()) or "-"
        return (self.fact.id, versions, self.result, self.evidence, self.remark)


def _table(versions: Mapping[str, str]) -> str:
    quoted = (name if re.fullmatch(r"[\w-]+", name) else f'"{name}"' for name in versions)
    pairs = (f'{name} = "{version}"' for name, version in zip(quoted, versions.values(), strict=True))
    return f"{{ {', '.join(pairs)} }}"


class Environments:
    """The environments of a run: facts that need the same share one.

    Args:
        folder: The folder to make them in.
        pins: Requirements in place of the newest release, such as `transformers==5.23.0`.
    """

    def __init__(self, folder: Path, pins: Iterable[str] = ()) -> None:
        self._folder = folder
        self._pins = {Requirement(pin).name: pin for pin in pins}
        self._made: dict[tuple[str, ...], Path | str] = {}

    def python_for(self, fact: Fact) -> Path | str:
        """Return the Python of the environment of a fact, or the last line of pip if it cannot be made."""
        names = (*([fact.program.program] if fact.program.in_pip else []), *fact.reproduction.needs)
        wanted = tuple(sorted(self._pins.get(name, name) for name in names))
        if wanted not in self._made:
            self._made[wanted] = self._make(wanted, self._folder / str(len(self._made)))
        return self._made[wanted]

    def _make(self, wanted: Sequence[str], folder: Path) -> Path | str:
        print(f"installing {' '.join(wanted)}", file=sys.stderr, flush=True)
        venv.create(folder)
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # the pip of this environment installs into the other one
        command = [sys.executable, "-I", "-m", "pip", "--python", str(python), "install", "--quiet", *wanted]
        failed = _failure(_run(command, _INSTALL_SECONDS))
        return failed or python


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str] | None:
    """Run a command; None if it does not end in time."""
    here = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=here)
    except subprocess.TimeoutExpired:
        return None


def _failure(done: subprocess.CompletedProcess[str] | None) -> str:
    if done is None:
        return "it did not end in time"
    return "" if done.returncode == 0 else (_last_line(done.stderr) or f"exit code {done.returncode}")


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def reproduce(fact: Fact, script: Path, environments: Environments, seconds: float) -> Seen:
    """Run the reproduction of a fact.

    Args:
        fact: The fault.
        script: Its script.
        environments: The environments of the run.
        seconds: The limit of the script.
    """
    python = environments.python_for(fact)
    if isinstance(python, str):
        return Seen(fact, "could not run", python, {})
    of_pip = [name for name in fact.seen_with if fact.program.in_pip or name != fact.program.program]
    asked = f"from importlib.metadata import version; print(*map(version, {of_pip!r}))"
    found = _run([str(python), "-I", "-c", asked], 60)
    if found is None or found.returncode:
        return Seen(fact, "could not run", _failure(found), {})
    versions = dict(zip(of_pip, found.stdout.split(), strict=True))
    done = _run([str(python), "-I", str(script)], seconds)
    if failed := _failure(done):
        return Seen(fact, "could not run", failed, versions)
    output = done.stdout if done is not None else ""
    versions = {name: {**versions, **printed_versions(output)}.get(name, "") for name in fact.seen_with}
    last = _last_line(output)
    if unknown := [name for name, version in versions.items() if not version]:
        return Seen(fact, "could not run", f"it printed no version of {', '.join(unknown)}", {})
    for result in ("still true", "no longer true"):
        if last.startswith(f"{result}: "):
            return Seen(fact, result, last.removeprefix(f"{result}: "), versions)
    return Seen(fact, "could not run", last or "it printed nothing", versions)


def patch_of(seen: Iterable[Seen], facts: Path, root: Path) -> str:
    """Return the edit of the files of facts as a patch of the repository; empty if nothing changes."""
    changes: dict[str, dict[str, dict[str, str]]] = {}
    for one in seen:
        if one.edit:
            changes.setdefault(one.fact.program.program, {})[one.fact.id] = one.edit
    text = ""
    for path in sorted(facts.glob("*.toml")):
        of_file = changes.get(read_facts(path).program, {})
        before = after = path.read_text(encoding="utf-8")
        for id_, fields in of_file.items():
            after = _edited(after, id_, fields)
        name = path.resolve().relative_to(root.resolve()).as_posix()
        lines = (side.splitlines(keepends=True) for side in (before, after))
        text += "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))
    return text


def _edited(text: str, id_: str, fields: Mapping[str, str]) -> str:
    """Return a file of facts with other values of the fields of a fact; each stands on a line of its own.

    Raises:
        ValueError: If a field has no line.
    """
    begin = text.index(f'id = "{id_}"')
    end = text.find("\n[[", begin)
    entry = text[begin : end if end >= 0 else len(text)]
    changed = entry
    for key, value in fields.items():
        changed, count = re.subn(rf"^{key} = .*$", lambda _, new=f"{key} = {value}": new, changed, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{id_}: {count} lines begin with {key!r}; expected one")
    return text[:begin] + changed + text[begin + len(entry) :]


def table_of(seen: Iterable[Seen]) -> str:
    """Return the results as a table of Markdown."""
    rows = [_TITLES, tuple("---" for _ in _TITLES), *(one.line for one in seen)]
    return "".join(f"| {' | '.join(_cell(cell) for cell in row)} |\n" for row in rows)


def _cell(text: str) -> str:
    return re.sub(r"([\\|])", r"\\\1", text if len(text) <= 160 else f"{text[:157]}…")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the reproductions, print the table, and write it and the patch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="FACT", help="ids of facts; by default each with a script")
    parser.add_argument("--facts", type=Path, default=folders()[0], help="the folder of facts")
    parser.add_argument(
        "--output", type=Path, default=Path("field-run"), help="the folder for table.md and facts.patch"
    )
    parser.add_argument(
        "--pin", action="append", default=[], metavar="NAME==VERSION", help="in place of the newest release"
    )
    parser.add_argument("--seconds", type=float, default=300, help="the limit of each script")
    given = parser.parse_args(argv)
    known = {fault.id: fault for program in read_folders([given.facts]).values() for fault in program.faults}
    if unknown := [name for name in given.ids if name not in known]:
        parser.error(f"there is no fact {', '.join(unknown)}; expected some of {', '.join(known)}")
    seen = []
    with tempfile.TemporaryDirectory(prefix="field-run-") as folder:
        environments = Environments(Path(folder), given.pin)
        for fault in [known[name] for name in given.ids] or known.values():
            script, reason = fault.reproduction.script, fault.reproduction.not_run
            if script:
                seen.append(reproduce(fault, given.facts / REPRODUCTIONS / script, environments, given.seconds))
            else:
                seen.append(Seen(fault, "could not run", reason, {}))
    given.output.mkdir(parents=True, exist_ok=True)
    table = table_of(seen)
    write_text(given.output / "table.md", table)
    write_text(given.output / "facts.patch", patch_of(seen, given.facts, _root(given.facts)))
    print(table, end="")
    return int(any(one.fact.reproduction.script and not one.is_as_the_fact_says for one in seen))


def _root(folder: Path) -> Path:
    """Return the repository that a folder is in, or the folder."""
    return next((above for above in folder.resolve().parents if (above / ".git").exists()), folder)


if __name__ == "__main__":
    sys.exit(main())
