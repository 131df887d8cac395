"""The weekly run: real environments, real installs and scripts, with a toy program from a folder of wheels."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import field_run
import pytest

from pytest_mistral_lora.programs.facts import read_facts

Run = Callable[..., tuple[int, list[list[str]], str]]
SCRIPT = """
import toy
print("noise")
print(f"{'still true' if toy.IS_BROKEN else 'no longer true'}: toy.IS_BROKEN is {toy.IS_BROKEN}")
"""


def write_wheel(folder: Path, version: str, *, broken: bool) -> None:
    info = f"toy-{version}.dist-info"
    with zipfile.ZipFile(folder / f"toy-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy.py", f"IS_BROKEN = {broken}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"toy.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def fault(id_: str, *, until: str = '"open"', reproduction: str = '{ script = "see.py" }') -> str:
    return f"""
[[fault]]
id = "{id_}"
seen_on = 2026-11-24
seen_with = {{ toy = "1.1" }}
until = {until}
proof = "run"
symptom = "it breaks"
way_out = "none"
source = "a page"
reproduction = {reproduction}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the reproductions of some facts in a repository, with a folder of wheels in place of an index."""
    facts, wheels = tmp_path / "facts", tmp_path / "wheels"
    (facts / "reproductions").mkdir(parents=True)
    wheels.mkdir()
    (tmp_path / ".git").mkdir()
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(wheels)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)

    def run_facts(
        *entries: str, options: tuple[str, ...] = (), program: str = "toy"
    ) -> tuple[int, list[list[str]], str]:
        (facts / "reproductions" / "see.py").write_text(SCRIPT, encoding="utf-8")
        header = f'# a comment\nprogram = "{program}"\ntitle = "Toy"\nkind = "library"\n'
        header += f"in_pip = {str(program == 'toy').lower()}\n"
        (facts / "toy.toml").write_text(header + "".join(entries), encoding="utf-8")
        output = tmp_path / "out"
        code = field_run.main(["--facts", str(facts), "--output", str(output), *options])
        table = capsys.readouterr().out
        assert (output / "table.md").read_text(encoding="utf-8") == table
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
        return code, rows, (output / "facts.patch").read_text(encoding="utf-8")

    return run_facts


def applied(folder: Path) -> Path:
    """Apply the patch of the run, as git does, and return the file of facts."""
    command = ["git", "apply", "--verbose", str(folder / "out" / "facts.patch")]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={"GIT_DIR": "/dev/null"}
    )
    assert done.returncode == 0, done.stderr
    return folder / "facts" / "toy.toml"


def test_a_newer_release_that_still_has_the_fault_moves_its_versions(run: Run, tmp_path: Path) -> None:
    for version in ("1.1", "1.3"):
        write_wheel(tmp_path / "wheels", version, broken=True)
    code, [[name, versions, result, evidence, edit]], _ = run(fault("a-fault"))
    assert (code, name, versions, result) == (0, "a-fault", "toy 1.3", "still true")
    assert evidence == "toy.IS_BROKEN is True"
    assert edit == f'seen_on = {date.today()}, seen_with = {{ toy = "1.3" }}'
    [after] = read_facts(applied(tmp_path)).faults
    assert (dict(after.seen_with), after.seen_on, dict(after.until)) == ({"toy": "1.3"}, date.today(), {})


def test_a_newer_release_that_mended_the_fault_ends_it(run: Run, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "1.2", broken=False)
    code, rows, _ = run(fault("a-fault"), fault("another", reproduction='{ not_run = "it needs a GPU" }'))
    assert code == 1
    assert [row[2] for row in rows] == ["no longer true", "could not run"]
    assert rows[1][1:4] == ["-", "could not run", "it needs a GPU"]
    first, other = read_facts(applied(tmp_path)).faults
    assert (dict(first.until), dict(first.seen_with)) == ({"toy": "1.2"}, {"toy": "1.1"})
    assert dict(other.until) == {}


@pytest.mark.parametrize(
    ("broken", "code", "result", "edits"),
    [
        (True, 1, "still true", ["none: as the fact says", "none: it had ended; look at it"]),
        (False, 1, "no longer true", ["none: seen with this version; look at it", "none: as the fact says"]),
    ],
)
def test_the_release_that_the_fact_names_changes_nothing(
    broken: bool, code: int, result: str, edits: list[str], run: Run, tmp_path: Path
) -> None:
    write_wheel(tmp_path / "wheels", "1.1", broken=broken)
    found, rows, patch = run(fault("open-fault"), fault("ended-fault", until='{ toy = "1.2" }'))
    assert (found, [row[2] for row in rows], patch) == (code, [result, result], "")
    assert [row[4] for row in rows] == edits


def test_a_script_that_says_nothing_could_not_run(run: Run, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "1.2", broken=True)
    scripts = {
        "a": ("import absent", "ModuleNotFoundError: No module named 'absent'"),
        "b": ("import time; time.sleep(60)", "it did not end in time"),
        "c": ("", "it printed nothing"),
        "d": ("print('perhaps')", "perhaps"),
        "e": ("print('still true: x'); raise SystemExit(3)", "exit code 3"),
    }
    for name, (script, _) in scripts.items():
        (tmp_path / "facts" / "reproductions" / f"{name}.py").write_text(script, encoding="utf-8")
    entries = [fault(name, reproduction=f'{{ script = "{name}.py" }}') for name in scripts]
    code, rows, patch = run(*entries, options=("--seconds", "2"))
    assert (code, patch) == (1, "")
    assert [row[1:4] for row in rows] == [["toy 1.2", "could not run", evidence] for _, evidence in scripts.values()]


def test_a_script_names_the_version_of_a_program_that_pip_does_not_know(run: Run, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "9.0", broken=True)
    scripts = {"said": "print('version: a.program 1.2')\nprint('still true: x')", "unsaid": "print('still true: x')"}
    entries = []
    for name, script in scripts.items():
        (tmp_path / "facts" / "reproductions" / f"{name}.py").write_text(script, encoding="utf-8")
        entry = fault(name, reproduction=f'{{ script = "{name}.py", needs = ["toy"] }}')
        entries.append(entry.replace("{ toy = ", '{ "a.program" = '))
    code, rows, patch = run(*entries, program="a.program")
    assert [row[1:4] for row in rows] == [
        ["a.program 1.2", "still true", "x"],
        ["-", "could not run", "it printed no version of a.program"],
    ]
    assert (code, '+seen_with = { "a.program" = "1.2" }' in patch) == (1, True)


def test_a_program_that_cannot_be_installed_could_not_run(run: Run) -> None:
    code, [row], _ = run(fault("a-fault"))
    assert (code, row[1:3]) == (1, ["-", "could not run"])
    assert "No matching distribution found for toy" in row[3]


def test_another_release_can_be_named_and_a_misspelled_fact_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path / "wheels", "1.1", broken=True)
    write_wheel(tmp_path / "wheels", "1.2", broken=False)
    code, [row], _ = run(fault("a-fault"), fault("b-fault"), options=("b-fault", "--pin", "toy==1.1"))
    assert (code, row[0:3]) == (0, ["b-fault", "toy 1.1", "still true"])
    with pytest.raises(SystemExit):
        run(fault("a-fault"), options=("c-fault",))
    assert "there is no fact c-fault; expected some of a-fault" in capsys.readouterr().err
