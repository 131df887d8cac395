from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from converted import converted_tokenizer
from derived_tekken import write_derived

from pytest_mistral_lora.chat.oracle import shipped_tokenizer

Run = Callable[..., pytest.RunResult]
FILE = "mistral_instruct_tokenizer_240323.model.v3"


def _copy(name: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(shipped_tokenizer(name), target)


def _targets(golden: Run, *paths: Path | str) -> list[str]:
    result = golden("--collect-only", "-q", *(f"--mistral-tokenizer={path}" for path in paths))
    ids = [line.split("::") for line in result.outlines if line.startswith("mistral-golden::")]
    assert {len(parts) for parts in ids} == {4}
    assert len({tuple(parts) for parts in ids}) == len(ids)
    return list(dict.fromkeys(parts[1] for parts in ids))


def test_a_single_file_replaces_the_default_and_is_judged_by_the_packaged_ids(golden: Run, tmp_path: Path) -> None:
    file = _copy("spm-v3", tmp_path / FILE)
    assert _targets(golden, file) == [FILE]
    result = golden(f"--mistral-tokenizer={file}", "-k", "tokenizer::file or template::single", "-v")
    result.assert_outcomes(passed=2, deselected=_checks(golden, file) - 2)
    result.stdout.fnmatch_lines([f"mistral-golden::{FILE}::template::single PASSED*"])


def _checks(golden: Run, path: Path) -> int:
    result = golden("--collect-only", "-q", f"--mistral-tokenizer={path}")
    return sum(line.startswith("mistral-golden::") for line in result.outlines)


def test_a_given_target_also_gets_the_train(golden: Run, tmp_path: Path) -> None:
    file = _copy("spm-v3", tmp_path / FILE)
    result = golden("--collect-only", "-q", f"--mistral-tokenizer={file}", "-m", "mistral_training")
    result.stdout.fnmatch_lines([f"mistral-golden::{FILE}::train::learned-by-heart"])


def test_a_folder_with_tekken_is_a_target(golden: Run, tmp_path: Path) -> None:
    folder = tmp_path / "nemo"
    folder.mkdir()
    write_derived("derived-v11", folder, words=2000)
    result = golden(f"--mistral-tokenizer={folder}", "-k", "nemo::tokenizer::file or mask::bos-once", "-v")
    result.assert_outcomes(passed=2, deselected=_checks(golden, folder) - 2)
    result.stdout.fnmatch_lines(["mistral-golden::nemo::mask::bos-once PASSED*"])


def test_equal_names_get_numbers_in_the_order_given(golden: Run, tmp_path: Path) -> None:
    folders = [_copy("spm-v3", tmp_path / parent / "model" / FILE).parent for parent in "abc"]
    assert _targets(golden, *folders) == ["model", "model-2", "model-3"]


def test_a_number_that_is_a_folders_own_name_is_not_given_again(golden: Run, tmp_path: Path) -> None:
    names = ("a/model-2", "b/model", "c/model", "d/model-x", "e/model")
    folders = [_copy("spm-v3", tmp_path / name / FILE).parent for name in names]
    assert _targets(golden, *folders) == ["model-2", "model", "model-3", "model-x", "model-4"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my model (v3)", "my-model-v3"),
        ("a::b", "a-b"),
        pytest.param("modèle", "modèle", marks=pytest.mark.slow),
        ("not", "not"),
        pytest.param("v0.3+lora", "v0.3+lora", marks=pytest.mark.slow),
        pytest.param("[x]", "x", marks=pytest.mark.slow),
        ("'", "target"),
    ],
)
def test_a_name_is_a_word_that_k_can_choose(folder: str, name: str, golden: Run, tmp_path: Path) -> None:
    path = _copy("spm-v3", tmp_path / folder / FILE).parent
    assert _targets(golden, path) == [name]
    result = golden(f"--mistral-tokenizer={path}", "-k", f"{name}::tokenizer::file", "-v")
    result.assert_outcomes(passed=1, deselected=_checks(golden, path) - 1)
    result.stdout.fnmatch_lines([f"mistral-golden::{name}::tokenizer::file PASSED*"])


def test_the_current_folder_has_a_name(golden: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _copy("spm-v3", tmp_path / "model" / FILE).parent
    monkeypatch.chdir(folder)
    assert _targets(golden, ".") == ["model"]


def test_a_linked_file_keeps_its_own_name(golden: Run, tmp_path: Path) -> None:
    blob = _copy("spm-v3", tmp_path / "blobs" / "9addc8bd")
    link = tmp_path / FILE
    link.symlink_to(blob)
    assert _targets(golden, link) == [FILE]


def test_a_target_that_is_no_tokenizer_fails_one_check_and_its_others_are_not_checked(
    golden: Run, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tekken.json").write_text("{}")
    result = golden(f"--mistral-tokenizer={tmp_path / 'broken'}")
    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"failed", "skipped", "passed"}  # what is seen of the files alone is sound
    text = result.stdout.str()
    assert text.count("\nML201 ") == 2  # the finding, and its line in the short summary
    assert outcomes["failed"] == 1
    others = outcomes["skipped"] - 10  # ten name a template or another file that is missing
    assert f"broken::tokenizer::decoding failed (ML201) ({others})" in text
    assert "Traceback" not in text
    assert "pytest_mistral_lora/" not in text


def test_a_checkpoint_without_a_mistral_tokenizer_is_not_checked_against_it(golden: Run, tmp_path: Path) -> None:
    folder = tmp_path / "derived"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    target = (f"--mistral-tokenizer={folder}", "--mistral-oracle=none")
    result = golden(*target, "-k", "mask", "-v")
    assert result.parseoutcomes().keys() == {"skipped", "deselected"}
    result.stdout.fnmatch_lines(["*no Mistral tokenizer file, *none*tekken.json*"])
    assert golden(*target, "-k", "mask", "--mistral-fail-on=note,not-checked").ret == 1


def test_a_checkpoint_without_mistrals_own_file_is_judged_by_the_tokenizer_that_it_was_made_from(
    golden: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "derived"
    converted_tokenizer("spm-v1").fast.save_pretrained(folder)
    result = golden(f"--mistral-tokenizer={folder}", "-k", "oracle or bos-once or single")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*oracle of derived: *spm-v1: 32,000 of 32,000 ids*"])
    other = golden(f"--mistral-tokenizer={folder}", "--mistral-oracle=spm-v2", "-k", "oracle or bos-once or single")
    assert other.parseoutcomes() == {"failed": 1, "skipped": 2, "deselected": other.parseoutcomes()["deselected"]}
    assert "\nML230 " in other.stdout.str()
    refused = golden(f"--mistral-tokenizer={folder}", "--mistral-oracle=spm-v33")
    assert refused.ret == 4
    refused.stderr.fnmatch_lines(["*--mistral-oracle: spm-v33: *expected spm-v1, *"])


def test_the_rerun_command_of_a_failure_finds_the_same_failure(golden: Run, tmp_path: Path) -> None:
    import shlex

    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "tekken.json").write_text("{}")
    first = golden(f"--mistral-tokenizer={tmp_path / 'my model'}", "-k", "mask::bos-once", "--mistral-seed", "3")
    first.assert_outcomes(failed=1, deselected=_checks(golden, tmp_path / "my model") - 1)
    line = next(line for line in first.outlines if line.startswith("rerun:"))
    program, *arguments = shlex.split(line.removeprefix("rerun:"))
    assert program == "pytest"
    assert "--mistral-seed 3" in line
    again = golden(*arguments[1:])
    assert [line for line in again.outlines if line.startswith(("ML201", "rerun:"))] == [
        line for line in first.outlines if line.startswith(("ML201", "rerun:"))
    ]


@pytest.mark.parametrize("recipe", ["base: {", None])
def test_a_recipe_without_a_base_or_that_cannot_be_read_leaves_the_users_own_tests_alone(
    golden: Run, pytester: pytest.Pytester, recipe: str | None
) -> None:
    pytester.makepyfile("def test_own(): pass")
    text = recipe or (
        f"base: {{path: missing, weights_sha256: {'a' * 64}}}\n"
        "data: {train: [rows.jsonl]}\ntraining: {steps: 1}\noutput: out\n"
    )
    (pytester.path / "recipe.yaml").write_text(text)
    result = golden("--mistral-recipe=recipe.yaml", ".")
    outcomes = result.parseoutcomes()
    assert (result.ret, outcomes["failed"], outcomes["passed"]) == (1, 1, 1)
    assert set(outcomes) == {"failed", "passed", "skipped"}
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    result.stdout.fnmatch_lines(["test_*.py .*", "ML640 *" if recipe else "ML208 *"])
