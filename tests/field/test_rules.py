from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from package_copy import PACKAGE, copied_without, run_in

from pytest_mistral_lora.conformance.finding import RULES
from pytest_mistral_lora.programs import registry
from pytest_mistral_lora.programs.rules import rule_files

ROOM = PACKAGE / "field" / "rules"

CODE = """
import json
from pytest_mistral_lora.conformance.finding import RULES
ids = list(RULES)
print(json.dumps({"ids": ids, "known": "ML657" in RULES, "number": len(RULES)}))
"""


def test_a_rule_about_a_program_is_one_of_its_subject() -> None:
    assert rule_files("dataset") == [ROOM / "dataset.toml"]
    assert RULES["ML657"].subject == "dataset"
    ids = [rule.id for rule in RULES.of("dataset")]
    assert ids == sorted(ids)
    assert {"ML656", "ML657", "ML658"} <= {*ids}
    listed = list(RULES)
    assert (listed.index("ML657"), len({*listed})) == (listed.index("ML656") + 1, len(RULES))


def test_a_subject_without_rules_about_programs_has_no_file() -> None:
    assert rule_files("manifest") == []


def test_a_rule_in_two_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_mistral_lora.conformance import finding

    (tmp_path / "rules").mkdir()
    shutil.copy(ROOM.parents[1] / "conformance" / "rules" / "manifest.toml", tmp_path / "rules")
    field = registry.own_field()
    assert field is not None
    monkeypatch.setattr(field, "__path__", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"manifest\.toml: ML7\d\d is in two files"):
        finding._read_rules.__wrapped__("manifest")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package without the room."""
    folder = tmp_path_factory.mktemp("without")
    copied_without(folder, "field")
    return folder


def test_without_the_room_there_is_no_rule_about_a_program(without: Path) -> None:
    done = run_in(without, "-c", CODE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["known"], "ML657" in found["ids"]) == (False, False)
    of_programs = {rule for rule in RULES if rule not in found["ids"]}
    assert (found["number"], "ML657" in of_programs) == (len(RULES) - len(of_programs), True)


def test_without_the_room_a_finding_has_the_fix_of_its_rule_alone(without: Path, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    ids = [1, 3, 16127, 4, 23325, 2]
    file = tmp_path / "encoded.jsonl"
    file.write_text(json.dumps({**row, "input_ids": ids, "labels": ids}) + "\n")
    words = ("-m", "pytest_mistral_lora.cli", "check", str(file), "--tokenizer", "spm-v3")
    done = run_in(without, *words)
    lines = done.stdout.splitlines()
    at = lines.index(f"  fix:      {RULES['ML543'].fix}")
    assert (done.returncode, done.stderr, lines[at + 1]) == (1, "", "")
    done = run_in(without, *words, "--output-format=jsonl")
    assert json.loads(done.stdout.splitlines()[-1])["summary"]["fixes"] == {}


def test_without_the_room_an_unknown_runner_is_named_with_what_is_left(without: Path) -> None:
    done = run_in(without, "-m", "pytest_mistral_lora.cli", "check", "--runner", "nope", "--tokenizer", "spm-v3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'nope' is not a runner; expected the path of a script (*.py)" in done.stderr
