from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from plugin_rows import ROW

from pytest_mistral_lora.conformance.checks import SUBJECTS, Settings
from pytest_mistral_lora.conformance.collection import NamedPaths, collect
from pytest_mistral_lora.conformance.server_target import ServerChoice
from pytest_mistral_lora.conformance.targets import EMBEDDED, RunnerChoice

Run = Callable[..., pytest.RunResult]
OwnRows = Callable[..., Path]

MINE = "def test_mine(): pass"
OTHERS = len(EMBEDDED) - 1
RECIPE = f"""\
base: {{path: base, weights_sha256: {"a" * 64}}}
data: {{train: [rows.jsonl]}}
training: {{steps: 1}}
output: out
"""


@pytest.fixture
def two_failures(own_rows: OwnRows) -> tuple[str, ...]:
    folder = own_rows({**ROW, "name": "one"}, {**ROW, "name": "two"})
    return f"--mistral-golden-dir={folder}", "-k", "spm-v1::template::own-"


def _ids(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if re.fullmatch(r"\S+::\S+", line)]


def test_without_path_and_testpaths_only_the_suite_is_collected(
    golden: Run, pytester: pytest.Pytester, every_id: list[str]
) -> None:
    pytester.makepyfile(test_mine=MINE)
    assert _ids(golden("--collect-only", "-q")) == every_id


def test_the_default_has_every_target_and_subject_and_unique_ids(every_id: list[str]) -> None:
    assert len(every_id) == len(set(every_id))
    parts = [tuple(nodeid.split("::")) for nodeid in every_id]
    assert {len(part) for part in parts} == {4}
    assert {part[1] for part in parts} == set(EMBEDDED)
    assert {part[2] for part in parts} == {"tokenizer", "template", "mask", "train"}


def test_named_targets_have_the_subjects_of_their_kind(tmp_path: Path) -> None:
    settings = Settings(1, None, "cpu", False, (), False, tmp_path)
    paths = {name: tmp_path / name for name in ("tokenizers", "recipes", "datasets", "adapters", "encoded", "ggufs")}
    paths["recipes"].write_text(RECIPE)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "model.safetensors").touch()
    targets = NamedPaths(
        tokenizers=[paths["tokenizers"]],
        recipes=[paths["recipes"]],
        datasets=[paths["datasets"]],
        adapters=[paths["adapters"], merged],
        encoded=[paths["encoded"]],
        runners=[RunnerChoice("trl")],
        ggufs=[paths["ggufs"]],
        servers=[ServerChoice("vllm", "http://127.0.0.1:1")],
        server_answers=True,
    ).targets()
    subjects = {target.name: {c.subject for c in collect([target], settings)} for target in targets}
    judged = {"tokenizer", "template", "mask", "train"}
    assert subjects == {
        "tokenizers": judged,
        "recipes": judged | {"dataset"},
        "datasets": {"dataset"},
        "adapters": {"adapter", "manifest", "transcript"},
        "merged": {"merged", "manifest", "transcript"},
        "encoded": {"encoded"},
        "trl-datasets": {"runner"},
        "trl-recipes": {"runner"},
        "ggufs": {"gguf"},
        # what a server makes of answers depends on no adapter
        "vllm-127.0.0.1-1-adapters": {"server", "answer"},
        "vllm-127.0.0.1-1-merged": {"server"},
    }
    assert set.union(*subjects.values()) == set(SUBJECTS)
    (tmp_path / "out").mkdir()
    [recipe] = NamedPaths(recipes=[paths["recipes"]]).targets()
    others = {"encoded", "merged", "runner", "gguf", "server", "answer"}
    assert {check.subject for check in collect([recipe], settings)} == set(SUBJECTS) - others


def test_the_summary_names_the_tests_that_were_left_out(golden: Run, pytester: pytest.Pytester) -> None:
    chosen = ("-k", "spm-v1::tokenizer::file")
    assert not _left_out(golden(*chosen))
    pytester.makepyfile(test_mine=MINE)
    [line] = _left_out(golden(*chosen))
    assert "(test_mine.py)" in line
    assert f"pytest --mistral-golden {' '.join(chosen)} . " in line
    for name in ("below", "venv", "build", "ours"):
        pytester.mkdir(name).joinpath("test_one.py").write_text(MINE)
    (pytester.path / "ours" / "pyvenv.cfg").touch()
    [line] = _left_out(golden(*chosen))
    assert line.startswith("your tests (2 files) were not collected")
    # whoever names a path, or asks for the suite alone, knows
    assert not _left_out(golden(*chosen, "test_mine.py"))
    assert not _left_out(golden(*chosen, "-o", "testpaths="))


def _left_out(result: pytest.RunResult) -> list[str]:
    assert result.ret == 0
    return [line for line in result.outlines if line.startswith("your tests")]


@pytest.mark.parametrize("argument", ["test_mine.py", ".", "test_mine.py::test_mine"])
def test_with_a_path_the_suite_is_collected_beside_it(
    argument: str, golden: Run, pytester: pytest.Pytester, every_id: list[str]
) -> None:
    pytester.makepyfile(test_mine=MINE)
    assert _ids(golden("--collect-only", "-q", argument)) == ["test_mine.py::test_mine", *every_id]


def test_with_testpaths_the_suite_is_collected_beside_them(
    golden: Run, pytester: pytest.Pytester, every_id: list[str]
) -> None:
    pytester.makeini("[pytest]\ntestpaths = mine")
    pytester.mkdir("mine").joinpath("test_mine.py").write_text(MINE)
    pytester.makepyfile(test_other=MINE)
    assert _ids(golden("--collect-only", "-q")) == ["mine/test_mine.py::test_mine", *every_id]


def test_without_the_option_only_the_users_tests_run(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=MINE)
    result = pytester.runpytest_inprocess("--collect-only", "-q")
    assert _ids(result) == ["test_mine.py::test_mine"]


def test_collection_shows_the_suite_as_a_tree(golden: Run) -> None:
    result = golden("--collect-only", "-k", "spm-v1::tokenizer::file")
    result.stdout.fnmatch_lines(["<SuiteCollector mistral-golden>", "  <CheckItem spm-v1::tokenizer::file>"])
    assert result.ret == 0


def test_k_chooses_by_any_part_of_the_node_id(golden: Run, every_id: list[str]) -> None:
    chosen = _ids(golden("--collect-only", "-q", "-k", "spm-v3::tokenizer and not file"))
    assert chosen == [name for name in every_id if "spm-v3::tokenizer::" in name and "file" not in name]
    assert len(chosen) > 5


def test_a_whole_name_chooses_one_check(golden: Run, every_id: list[str]) -> None:
    result = golden("-v", "-k", "spm-v1::tokenizer::file")
    result.assert_outcomes(passed=1, deselected=len(every_id) - 1)
    result.stdout.fnmatch_lines(["mistral-golden::spm-v1::tokenizer::file PASSED*"])


def test_k_that_matches_nothing_is_not_a_success(golden: Run) -> None:
    assert golden("-k", "no-such-check").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_training_marker_chooses_the_train_alone(golden: Run, every_id: list[str]) -> None:
    trains = [nodeid for nodeid in every_id if "::train::" in nodeid]
    assert trains
    assert _ids(golden("--collect-only", "-q", "--strict-markers", "-m", "mistral_training")) == trains
    others = _ids(golden("--collect-only", "-q", "-m", "mistral_golden and not mistral_training"))
    assert others == [nodeid for nodeid in every_id if nodeid not in trains]


def test_skip_training_leaves_the_train_out(golden: Run, every_id: list[str]) -> None:
    left = _ids(golden("--collect-only", "-q", "--mistral-no-train"))
    assert left == [nodeid for nodeid in every_id if "::train::" not in nodeid]


def test_the_markers_are_registered(pytester: pytest.Pytester) -> None:
    text = pytester.runpytest_inprocess("--markers").stdout.str()
    for marker in ("mistral_golden", "mistral_training", "mistral_gpu"):
        assert f"@pytest.mark.{marker}: " in text


def test_x_stops_at_the_first_failure_and_says_what_did_not_run(
    golden: Run, two_failures: tuple[str, ...], every_id: list[str]
) -> None:
    golden(*two_failures).assert_outcomes(failed=2, deselected=len(every_id) + 2 * OTHERS)
    result = golden("-x", *two_failures)
    result.assert_outcomes(failed=1, deselected=len(every_id) + 2 * OTHERS)
    result.stdout.fnmatch_lines(["*1 check not run"])


def test_lf_runs_what_failed_alone(golden: Run, two_failures: tuple[str, ...], every_id: list[str]) -> None:
    golden(*two_failures[:1], "-k", "spm-v1::tokenizer::file or spm-v1::template::own-one").assert_outcomes(
        passed=1, failed=1, deselected=len(every_id) + 2 * OTHERS
    )
    result = golden("--lf", "-v", *two_failures[:1])
    result.assert_outcomes(failed=1, deselected=len(every_id) + 2 * OTHERS + 1)
    result.stdout.fnmatch_lines(["mistral-golden::spm-v1::template::own-one FAILED*"])


def test_lf_finds_the_suites_failure_beside_the_users_tests(
    golden: Run, two_failures: tuple[str, ...], pytester: pytest.Pytester, every_id: list[str]
) -> None:
    pytester.makepyfile(test_mine=MINE)
    golden(*two_failures, "test_mine.py")
    result = golden("--lf", "-v", *two_failures[:1], "test_mine.py")
    result.assert_outcomes(failed=2, deselected=len(every_id) + 2 * OTHERS + 1)


@pytest.mark.parametrize("plugin", ["xdist", "cacheprovider", "junitxml", "hypothesispytest"])
def test_the_suite_needs_no_other_plugin(plugin: str, golden: Run, every_id: list[str]) -> None:
    golden("-p", f"no:{plugin}", "-k", "spm-v1::tokenizer::file").assert_outcomes(
        passed=1, deselected=len(every_id) - 1
    )


def test_a_disabled_plugin_has_no_options_and_no_trace(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=MINE)
    pytester.runpytest_inprocess("-p", "no:mistral_lora").assert_outcomes(passed=1)
    result = pytester.runpytest_inprocess("-p", "no:mistral_lora", "--mistral-golden")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unrecognized arguments: --mistral-golden"])


def test_junit_xml_names_every_check(golden: Run, two_failures: tuple[str, ...], pytester: pytest.Pytester) -> None:
    golden(*two_failures[:1], "-k", "spm-v1::tokenizer::file or spm-v1::template::own-one", "--junitxml", "out.xml")
    cases = {
        (case.get("classname"), case.get("name")): case
        for case in ElementTree.parse(pytester.path / "out.xml").iter("testcase")
    }
    assert list(cases) == [
        ("mistral-golden.spm-v1.tokenizer", "file"),
        ("mistral-golden.spm-v1.template", "own-one"),
    ]
    failure = cases["mistral-golden.spm-v1.template", "own-one"].find("failure")
    assert failure is not None
    assert str(failure.get("message")).startswith("ML007 ")


def test_ids_do_not_depend_on_the_current_folder(
    golden: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, every_id: list[str]
) -> None:
    pytester.makeini("[pytest]\ntestpaths = mine")
    pytester.mkdir("mine").joinpath("test_mine.py").write_text(MINE)
    monkeypatch.chdir(pytester.mkdir("elsewhere"))
    assert _ids(golden("--collect-only", "-q")) == every_id
    golden("-k", "spm-v1::tokenizer::file").assert_outcomes(passed=1, deselected=len(every_id) - 1)


@pytest.mark.slow
def test_the_suite_runs_in_a_process_of_its_own(pytester: pytest.Pytester, every_id: list[str]) -> None:
    result = pytester.runpytest_subprocess("--mistral-golden", "-k", "spm-v1::tokenizer::file", "-W", "error")
    result.assert_outcomes(passed=1, deselected=len(every_id) - 1)
    assert result.stderr.str() == ""


@pytest.mark.slow
def test_two_workers_share_the_suite_and_the_users_tests(
    pytester: pytest.Pytester, two_failures: tuple[str, ...], every_id: list[str]
) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(test_mine=MINE)
    chosen = "test_mine or spm-v1::tokenizer::file or spm-v1::template::own-"
    result = pytester.runpytest_subprocess("--mistral-golden", "-n2", "-v", "-k", chosen, *two_failures[:1], ".")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*PASSED mistral-golden::spm-v1::tokenizer::file *",
            "*FAILED mistral-golden::spm-v1::template::own-one *",
            "*PASSED test_mine.py::test_mine *",
            "ML007 *rows.jsonl:1: the row is not recorded",
            " spm-v1   template         -        2             -",
            f"  {len(every_id) + 2 * OTHERS - 1} checks deselected",
        ]
    )
