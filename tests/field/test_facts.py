"""Facts are data: every shipped one is whole and honest, a bad file is a clear error, and versions decide."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from sampling import sampled_case

from pytest_mistral_lora.conformance.checks import SUBJECTS
from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.environment import installed_versions
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.programs.facts import (
    Fact,
    Symptom,
    facts,
    programs,
    read_facts,
    read_folders,
    remark_of_program,
)
from pytest_mistral_lora.programs.facts.entries import printed_versions
from pytest_mistral_lora.programs.facts.reading import REPRODUCTIONS, folders
from pytest_mistral_lora.runners.extract import Extraction

FOLDER = folders()[0]
ENTRIES = [entry for program in programs().values() for entry in program.entries]
SHIPPED = list(facts())
SCRIPTS = [known for known in SHIPPED if known.reproduction.script]
LONG_RUNS = (
    "grammar-refuses-call-ids",
    "merges-by-id",
    "legacy-adds-a-space",
    "fim-suffix-cut",
    "template-writes-html",
)
"""Facts whose reproduction takes more than a second: the weekly run has them, too."""
PRESENT = 'program = "x"\ntitle = "X"\nkind = "library"\n'
FAULT = {
    "id": '"a-fault"',
    "seen_on": "2026-11-30",
    "seen_with": '{ x = "1.2" }',
    "until": '"open"',
    "proof": '"run"',
    "symptom": '"it breaks"',
    "way_out": '"another one"',
    "source": '"a page"',
    "reproduction": '{ not_run = "nobody has it" }',
}
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a file of one fault, with changed fields; None leaves a field out."""

    def write(header: str = PRESENT, name: str = "x.toml", **changes: str | None) -> Path:
        fields = {key: value for key, value in (FAULT | changes).items() if value is not None}
        lines = "\n".join(f"{key} = {value}" for key, value in fields.items())
        path = tmp_path / name
        path.write_text(f"{header}\n[[fault]]\n{lines}\n", encoding="utf-8")
        return path

    return write


def one(path: Path) -> Fact:
    [known] = read_facts(path).faults
    return known


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_a_shipped_fact_names_a_past_day(entry: Fact) -> None:
    assert date(2026, 11, 24) <= entry.seen_on <= date.today()


@pytest.mark.parametrize("known", SHIPPED, ids=lambda known: known.id)
def test_a_shipped_fact_names_rules_and_checks_that_there_are(known: Fact) -> None:
    assert all(rule in RULES or RULES.has_name(rule) for rule in known.rules)
    assert set(known.checks) <= {case for rule in RULES.of("answer") for case in rule.cases}
    # it would be taken for one of these in a list of known deviations
    assert known.id not in SUBJECTS


def test_a_file_is_named_for_its_program_and_each_script_has_a_fact() -> None:
    files = {path.stem for path in FOLDER.glob("*.toml")}
    assert files == {name.replace("-", "_").replace(".", "") for name in programs()}
    scripts = {path.name for path in (FOLDER / REPRODUCTIONS).glob("*.py")}
    assert scripts == {known.reproduction.script for known in SCRIPTS}


@pytest.mark.filterwarnings("ignore")  # those of the libraries are no part of the fact
@pytest.mark.parametrize(
    "known", [sampled_case(known, name=known.id, is_kept=known.id not in LONG_RUNS) for known in SCRIPTS]
)
def test_a_reproduction_says_of_the_installed_versions_what_the_fact_says(
    known: Fact, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in known.reproduction.needs:
        pytest.importorskip(name.replace("-", "_").replace("protobuf", "google.protobuf"))
    script = FOLDER / REPRODUCTIONS / known.reproduction.script
    if known.program.kind == "server":
        # its threads are no part of this process: one that does not end would end the run of all tests
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
        output = done.stdout
    else:
        # in this process, which has imported transformers
        runpy.run_path(str(script), run_name="__main__")
        output = capsys.readouterr().out
    last = output.strip().splitlines()[-1]
    standing = known.standing({**installed_versions(), **printed_versions(output)})
    if standing.state == "absent":
        pytest.skip("the installed versions are older than the fault")
    said = last.partition(":")[0]
    assert said in ("still true", "no longer true"), last
    # of versions that nobody has checked, either may be true
    assert standing.state == "unchecked" or (said == "still true") is (standing.state == "present"), last


@pytest.mark.parametrize(
    ("changes", "place", "found"),
    [
        ({"proof": '"rnu"'}, "fault.a-fault.proof", "expected 'run', 'read' or 'reported' (did you mean 'run'?)"),
        ({"proof": None}, "fault.a-fault.proof", "is missing"),
        ({"seen_on": '"2026-11-30"'}, "fault.a-fault.seen_on", "date"),
        ({"seen_with": '{ x = "new" }'}, "fault.a-fault.seen_with.x", "expected a version, such as 5.24.0"),
        ({"seen_with": "{}"}, "fault.a-fault.seen_with", "at least 1"),
        ({"until": '"never"'}, "fault.a-fault.until", "expected open, or a version"),
        ({"until": '{ x = "1.2" }'}, "fault.a-fault", "until of x is 1.2, and it was seen with 1.2"),
        ({"since": '{ x = "1.3" }'}, "fault.a-fault", "since of x is 1.3, and it was seen with 1.2"),
        ({"since": '{ y = "1.1" }'}, "fault.a-fault", "since names y, and seen_with does not"),
        ({"rules": '["ML42"]'}, "fault.a-fault.rules[0]", "ML"),
        ({"words": '"("'}, "fault.a-fault.words", "expected a regular expression"),
        ({"sympton": '"x"'}, "fault.a-fault.sympton", "did you mean 'symptom'?"),
        ({"reproduction": "{}"}, "fault.a-fault.reproduction", "expected either script or not_run"),
        ({"reproduction": '{ script = "absent.py" }'}, "fault.a-fault.reproduction.script", "absent.py"),
        ({"reproduction": '{ script = "../x.py" }'}, "fault.a-fault.reproduction", "'../x.py'"),
        ({"works": '"no-pair"'}, "", "works is 'no-pair'; expected one of none"),
        ({"seen_with": '{ y = "1.2" }'}, "", "a-fault: seen_with lacks x, the program of the file"),
        ({"id": None}, "fault[0].id", "is missing"),
    ],
)
def test_a_bad_fact_is_an_error_with_file_fact_and_field(
    changes: dict[str, str | None], place: str, found: str, written: Written
) -> None:
    path = written(**changes)
    with pytest.raises(InputError) as caught:
        read_facts(path)
    assert str(caught.value.place) == ", ".join(filter(None, (str(path), place)))
    assert found in caught.value.found


def test_each_bad_value_of_a_file_is_named(written: Written) -> None:
    with pytest.raises(InputError, match="2 bad values") as caught:
        read_facts(written(proof='"x"', way_out=None))
    assert ["fault.a-fault." in line for line in caught.value.found.splitlines()] == [False, True, True]


@pytest.mark.parametrize("text", ["program = ", "\ufeff\x00", f"a = {'[' * 5000}{']' * 5000}"], ids=range(3))
def test_a_file_that_is_not_toml_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="not valid TOML"):
        read_facts(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not valid TOML"):
        read_facts(tmp_path / "x.toml")


def test_an_id_belongs_to_one_fact(written: Written, tmp_path: Path) -> None:
    written(name="x.toml")
    header = PRESENT.replace('"x"', '"y"')
    path = written(header, name="y.toml", seen_with='{ y = "1" }')
    with pytest.raises(InputError, match=r"'a-fault' is already in .*x\.toml") as caught:
        read_folders([tmp_path])
    assert str(caught.value.place) == str(path)


def test_an_id_stands_once_in_a_file(written: Written) -> None:
    path = written()
    text = path.read_text(encoding="utf-8")
    path.write_text(text + text[text.index("[[fault]]") :], encoding="utf-8")
    with pytest.raises(InputError, match="'a-fault' is there twice"):
        read_facts(path)


@pytest.mark.parametrize(
    ("running", "state", "remark"),
    [
        ("0.9", "absent", ""),
        ("1.0", "present", ""),
        ("1.2", "present", ""),
        ("1.2.0+cpu", "present", ""),
        ("1.2.0.post1", "present", ""),
        ("1.2.dev3", "present", ""),
        ("1.2.1", "unchecked", "seen with 1.2, you run 1.2.1: not checked"),
        ("1.10", "unchecked", "seen with 1.2, you run 1.10: not checked"),
        ("1.3.0rc1", "unchecked", "seen with 1.2, you run 1.3.0rc1: not checked"),
        ("of my own", "unchecked", "seen with 1.2, you run of my own: not checked"),
        (None, "absent", ""),
    ],
)
def test_an_open_fact_is_not_checked_of_a_newer_version(
    running: str | None, state: str, remark: str, written: Written
) -> None:
    known = one(written(since='{ x = "1.0" }'))
    standing = known.standing({"y": "1.2"} if running is None else {"x": running})
    assert (standing.state, standing.remark) == (state, remark)


@pytest.mark.parametrize(
    ("running", "state"),
    [("0.1", "present"), ("1.2", "present"), ("1.3.9", "present"), ("1.4.dev0", "ended"), ("1.4", "ended")],
)
def test_a_fact_with_an_end_holds_up_to_it(running: str, state: str, written: Written) -> None:
    known = one(written(until='{ x = "1.4" }'))
    assert known.standing({"x": running}).state == state
    assert dict(known.ranges) == {"x": "<1.4"}


def test_a_fact_of_two_programs_asks_for_both(written: Written) -> None:
    known = one(written(seen_with='{ x = "1.2", y = "2.0" }', since='{ y = "2.0" }', until='{ x = "1.4" }'))
    assert known.standing({"x": "1.2"}).state == "absent"
    assert known.standing({"x": "1.2", "y": "1.9"}).state == "absent"
    assert known.standing({"x": "1.2", "y": "2.0"}).state == "present"
    assert known.standing({"x": "1.4", "y": "2.1"}).state == "ended"
    assert known.standing({"x": "1.2", "y": "2.1"}).remark == "y: seen with 2.0, you run 2.1: not checked"


@pytest.mark.parametrize(
    ("server", "state"),
    [
        ("X 1.2, model m", "present"),
        ("X b12, model m", "unchecked"),
        ("X 1.2 (as named), model m", "present"),
        ("X, model m", "present"),
        ("X 0.9, model m", "absent"),
        ("Y 1.2, model m", "absent"),
        ("Xs 1.2, model m", "absent"),
        ("", "absent"),
    ],
)
def test_the_version_of_a_server_decides_and_not_that_of_a_package_here(
    server: str, state: str, written: Written
) -> None:
    header = PRESENT.replace("library", "server")
    known = one(written(header, since='{ x = "1.0" }', rules='["ML919"]'))
    assert known.standing_for(Symptom("ML919", "x", server=server), {"x": "1.2"}).state == state
    assert known.standing_for(Symptom("ML902", "x", server=server), {"x": "1.2"}).state == "absent"


@pytest.mark.parametrize(("server", "state"), [("", "present"), ("OpenAI, model m", "present"), ("X 1.3", "unchecked")])
def test_words_that_one_fault_alone_has_name_it_behind_any_server(server: str, state: str, written: Written) -> None:
    header = PRESENT.replace("library", "server")
    known = one(written(header, rules='["ML919"]', words='"oops"', is_named_by_words="true"))
    assert known.standing_for(Symptom("ML919", "oops!", server=server), {}).state == state
    assert known.standing_for(Symptom("ML919", "x", server=server), {}).state == "absent"


def test_a_trainer_newer_than_every_fact_about_it_is_remarked_where_its_versions_are_named(tmp_path: Path) -> None:
    def ran_under(**environment: str) -> str:
        return Extraction(tmp_path / "x.jsonl", tmp_path / "trl.yaml", environment).ran_under

    assert ran_under(trl="1.17.0", transformers="9.0").endswith("; trl: seen with 1.16.0, you run 1.17.0: not checked")
    assert "not checked" not in ran_under(trl="1.16.0", transformers="9.0", mine="2.0")


def test_a_program_newer_than_every_fact_about_it_is_remarked() -> None:
    assert remark_of_program("vLLM", "0.33.0") == "seen with 0.32.0, you run 0.33.0: not checked"
    assert remark_of_program("llama.cpp", "b11550-8b3f1c2") == "seen with 11549, you run b11550-8b3f1c2: not checked"
    for title, running in (("vLLM", "0.32.0"), ("vLLM", "0.31"), ("vLLM", ""), ("Ollama", "9.0"), ("TRL", "1.16.0")):
        assert remark_of_program(title, running) == ""
