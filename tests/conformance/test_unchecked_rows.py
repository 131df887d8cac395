"""A row with media whose tokens are not known is not checked, by name, on every road and in a mixed file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toys import Data, with_ids, write_lines

from pytest_mistral_lora import audit, judge
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.checks import check_dataset
from pytest_mistral_lora.judging import Verdict

TOKENIZER = "spm-v7m1"
MEDIA: dict[str, Data] = {
    "image": {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    "audio": {"type": "input_audio", "input_audio": "UklGRg=="},
    "video": {"type": "video_url", "video_url": {"url": "a.mp4"}},
}
"""A chunk of each medium, of which neither the size nor the length is known."""

REASONS = {"image": "image of unknown size", "audio": "audio", "video": "video"}


def talk(content: object) -> Data:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A red square."}]}


def rows_of(medium: str, *, mixed: bool) -> list[Data]:
    row = talk([{"type": "text", "text": "What is this?"}, MEDIA[medium]])
    return [talk("What is a square?"), row] if mixed else [row]


def with_any_ids(rows: list[Data]) -> list[Data]:
    """Return rows with ids beside their messages: those of the text alone."""
    texts = [talk("What is this?") if isinstance(row["messages"][0]["content"], list) else row for row in rows]
    encoded = with_ids(Oracle.load(TOKENIZER), texts)
    return [{**ids, **row} for ids, row in zip(encoded, rows, strict=True)]


def unchecked(verdict: Verdict, check: str) -> str:
    assert verdict.findings == ()
    [reason] = [reason for name, reason in verdict.not_checked.items() if name.endswith(check)]
    return reason


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("medium", MEDIA)
def test_a_row_with_media_is_not_checked(medium: str, mixed: bool, tmp_path: Path) -> None:
    rows = rows_of(medium, mixed=mixed)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    encoded = write_lines(tmp_path / "encoded.jsonl", with_any_ids(rows))
    of_files = {
        "::rows-are-valid": judge(path, tokenizer=TOKENIZER),
        "::file": audit(encoded, tokenizer=TOKENIZER),
    }
    for check, verdict in of_files.items():
        assert f"{REASONS[medium]} in 1 row: " in unchecked(verdict, check)
        assert f":{len(rows)}, messages[0].content[1]" in unchecked(verdict, check)
        # a file of which nothing was judged does not pass
        assert verdict.ok is mixed
    in_memory = audit(with_any_ids(rows), tokenizer=TOKENIZER)
    assert unchecked(in_memory, "::file").startswith(f"{REASONS[medium]} in 1 row: ")
    for file in (path, encoded):
        assert main(["check", str(file), "--tokenizer", TOKENIZER, "--fail-on", "not-checked", "--no-cache"]) == 1
        assert main(["check", str(file), "--tokenizer", TOKENIZER, "--no-cache"]) == (0 if mixed else 1)


def test_pytest_fails_for_a_row_that_is_not_checked(
    tmp_path: Path, run_pytest: Callable[..., pytest.RunResult]
) -> None:
    rows = rows_of("image", mixed=True)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    encoded = write_lines(tmp_path / "encoded.jsonl", with_any_ids(rows))
    words = (f"--mistral-dataset={path}", f"--mistral-encoded={encoded}", f"--mistral-tokenizer={TOKENIZER}")
    for strict, expected in ((), {"skipped": 2}), (("--mistral-fail-on=not-checked",), {"failed": 2}):
        result = run_pytest("--mistral-golden", *words, *strict, "-k", "rows-are-valid or encoded::file")
        outcomes = result.parseoutcomes()
        outcomes.pop("deselected")
        assert outcomes == expected


def test_a_recipe_with_such_a_row_is_not_checked_and_not_trained(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", Oracle.load(TOKENIZER).path)
    write_lines(tmp_path / "rows.jsonl", rows_of("image", mixed=True))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{path: base, weights_sha256: {BaseFolder(base).weights_sha256}}}\ndata: {{train: [rows.jsonl]}}\n"
        "training: {steps: 1, dry_run: false, device: cpu}\noutput: out\n"
    )
    results = check_dataset(recipe)
    assert [finding for result in results.values() for finding in result.findings] == []
    assert results["rows-are-valid"].not_checked.startswith("image of unknown size in 1 row: ")
    assert main(["train", str(recipe)]) == 2
    assert not (tmp_path / "out").exists()
