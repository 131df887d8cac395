"""`mistral-lora stats`: the figures are those of the rows, whatever form these come in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.lengths import cuts, histogram
from pytest_mistral_lora.report.tables import figure_lines, statistics_line

CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}


def said(*texts: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


TALK = [{"role": "user", "content": "Warm?"}, {"role": "assistant", "tool_calls": [CALL]}]
TALK += [{"role": "tool", "tool_call_id": "a1B2c3D4e", "content": "21"}, {"role": "assistant", "content": "Yes."}]
ROWS = [
    said("Capital of France?", "Paris.", system="Be brief."),
    said("capital of FRANCE", "paris", system="be brief"),
    *[said(f"Count to {number}.", "one two three " * number) for number in range(1, 9)],
    said("Count to 3.", "one two three " * 3),
    said("Сколько будет два плюс два?", "Четыре."),
    {"messages": TALK, "tools": [TOOL]},
]


def write(path: Path, rows: list[Any] = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def encoded() -> list[Any]:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    return [oracle.encode(row) for row in ROWS]


def figures(capsys: Any, *words: str | Path) -> dict[str, Any]:
    assert main(["stats", *map(str, words), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def test_the_figures_are_those_of_the_rows(tmp_path: Path, capsys: Any, encoded: list[Any]) -> None:
    seen = figures(capsys, write(tmp_path / "rows.jsonl"), "--tokenizer", "spm-v3")
    lengths = [len(row.input_ids) for row in encoded]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    assert (seen["rows"], seen["tokens"]["total"], seen["tokens"]["max"]) == (13, sum(lengths), max(lengths))
    assert seen["supervised_tokens"]["total"] == sum(row.supervised_tokens for row in encoded)
    assert (seen["longest_row"], seen["longest_row_tokens"]) == (f"{tmp_path}/rows.jsonl:{longest + 1}", max(lengths))
    assert seen["roles"] == {"assistant": 14, "user": 13, "system": 2, "tool": 1}
    assert (seen["tools"], seen["scripts"]) == ({"weather": 1}, {"Latin": 12, "Cyrillic": 1})
    assert seen["repeats"]["within_a_side"] == {"same": 1, "another_form": 1, "near": 0}
    assert sum(one["rows"] for one in seen["histogram"]) == 13
    assert seen["cuts"] == [{"max_length": 512, "rows": 0, "tokens": 0}]
    assert "epoch" not in seen


def test_the_same_rows_in_another_format_have_the_same_figures(tmp_path: Path, capsys: Any) -> None:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [
        {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in row["messages"]]}
        for row in ROWS[:-1]
    ]
    half = len(shared) // 2
    for number, part in enumerate((shared[:half], shared[half:])):
        pa.parquet.write_table(pa.Table.from_pylist(part), tmp_path / f"part-{number}.parquet")
    plain = figures(capsys, write(tmp_path / "rows.jsonl", ROWS[:-1]), "--tokenizer", "spm-v3")
    parts = figures(capsys, *sorted(tmp_path.glob("*.parquet")), "--tokenizer", "spm-v3")
    assert [file["rows"] for file in parts["files"]] == [half, len(shared) - half]
    same = plain.keys() - {"files", "longest_row", "rows of"}
    assert {name: parts[name] for name in same} == {name: plain[name] for name in same}


def test_a_recipe_has_its_split_its_max_length_and_its_steps(tmp_path: Path, capsys: Any, encoded: list[Any]) -> None:
    write(tmp_path / "rows.jsonl")
    write(tmp_path / "held-out.jsonl", [ROWS[3], said("COUNT to 5", "one two three " * 5)])
    recipe = {
        "base": {"repo": "a/b", "revision": "0" * 40},
        "data": {"train": ["rows.jsonl"], "eval": ["held-out.jsonl"]},
        "training": {"epochs": 2.5, "batch_size": 4, "max_length": 40, "truncation": "drop", "micro_batch_tokens": 64},
        "output": "out",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    seen = figures(capsys, path, "--tokenizer", "spm-v3")
    lengths = [len(row.input_ids) for row in encoded]
    kept = [length for length in lengths if length <= 40]
    assert (seen["rows_trained_on"], seen["rows_held_out"]) == (len(kept), 2)
    assert seen["rows_dropped"] == len(lengths) - len(kept) > 0
    tokens, steps = sum(kept), -(-len(kept) // 4)
    assert seen["epoch"] == {
        "rows": len(kept),
        "batch_size": 4,
        "steps": steps,
        "tokens_per_step": round(tokens / steps),
        "micro_batch_tokens": 64,
        "micro_batches_per_step_at_least": -(-tokens // (steps * 64)),
        "steps_of_the_run": -(-5 * steps // 2),
        "epochs_of_the_run": round(-(-5 * steps // 2) / steps, 2),
    }
    assert seen["cuts"][0] == {
        "max_length": 40,
        "rows": len(lengths) - len(kept),
        "tokens": sum(length - 40 for length in lengths if length > 40),
    }
    assert seen["repeats"]["across_the_split"] == {"same": 1, "another_form": 1, "near": 0}
    assert main(["stats", str(path), "--tokenizer", "spm-v3"]) == 0
    out = capsys.readouterr().out
    assert f"{steps} steps of 4 rows" in out
    assert "held out, trained on" in out


def test_a_recipe_names_the_tokenizer_of_its_base(tmp_path: Path, capsys: Any) -> None:
    rows, recipe, base = write(tmp_path / "rows.jsonl"), tmp_path / "recipe.yaml", tmp_path / "base"
    base.mkdir()
    shutil.copy(shipped_tokenizer("spm-v7"), base)
    training = {"learning_rate": 1e-3, "batch_size": 1, "micro_batch_tokens": 64, "steps": 1}
    data = {"base": {"path": "base", "weights_sha256": "0" * 64}, "data": {"train": ["rows.jsonl"]}, "output": "out"}
    recipe.write_text(yaml.safe_dump({**data, "training": training}))
    counts = [figures(capsys, rows, "--tokenizer", one)["tokens"] for one in (recipe, "spm-v7", "spm-v3")]
    assert counts[0] == counts[1] != counts[2]
    templates = []
    for one in (recipe, "spm-v7", "spm-v3"):
        assert main(["template", "--tokenizer", str(one)]) == 0
        templates.append(capsys.readouterr().out)
    assert templates[0] == templates[1] != templates[2]
    recipe.write_text("base: {repo: a/b}\n")
    assert main(["stats", str(rows), "--tokenizer", str(recipe)]) == 2
    assert "recipe.yaml: 4 bad values" in capsys.readouterr().err


def test_the_tables_are_printed(tmp_path: Path, capsys: Any) -> None:
    rows = [*ROWS, said("long", "word " * 600), {"messages": []}]
    assert main(["stats", str(write(tmp_path / "rows.jsonl", rows)), "--tokenizer", "spm-v3"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["rows", "14", "(1", "refused)"] in lines
    assert ["512", "1", "7.1%"] in [line[:3] for line in lines]
    assert "█" in out
    assert f": mistral-lora check {tmp_path}/rows.jsonl --tokenizer spm-v3" in out


def test_names_of_tools_are_printed_without_control_characters(tmp_path: Path, capsys: Any) -> None:
    seen = figures(capsys, write(tmp_path / "rows.jsonl"), "--tokenizer", "spm-v3")
    seen["tools"] = {"\x1b[31mred": 3, "x" * 999: 2, **{f"tool-{number}": 1 for number in range(20)}}
    [calls] = [line for line in figure_lines(seen, 999) if line.startswith(" calls")]
    assert calls.split(maxsplit=1)[1] == ", ".join(
        ["\\x1b[31mred 3", f"{'x' * 39}… 2", *(f"tool-{number} 1" for number in range(10)), "and 10 more"]
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rows.jsonl"], "no tokenizer is given"),
        (["rows.jsonl"], "mistral-lora stats rows.jsonl --tokenizer spm-v3"),
        (["lost.jsonl", "--tokenizer", "spm-v3"], "lost.jsonl: no such file"),
        (["empty.jsonl", "--tokenizer", "spm-v3"], "empty.jsonl: the file has no rows"),
        (["bad.jsonl", "--tokenizer", "spm-v3"], "bad.jsonl:1"),
        (["recipe.yaml", "rows.jsonl"], "rows.jsonl: a recipe names its rows itself"),
        (["rows.jsonl", "--tokenizer", "lost"], "lost"),
        (["rows.jsonl", "--tokenizer", "spm-v3", "--lossy", "all"], "unknown kind 'all'"),
        (["recipe.yaml", "--format", "alpaca"], "recipe.yaml is a recipe"),
    ],
)
def test_what_cannot_be_counted_is_named(
    words: list[str], expected: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages"\n')
    (tmp_path / "recipe.yaml").write_text("base: {repo: a/b}\ntraining: {steps: 1}\n")
    assert main(["stats", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


def test_check_and_its_page_show_the_figures(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "rows.jsonl")
    assert main(["check", str(path), "--tokenizer", "spm-v3", "-v"]) == 0
    out = capsys.readouterr().out
    assert "figures of rows.jsonl:" in out
    assert "weather 1" in out
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["checks"]
    assert main(["check", str(path), "--tokenizer", "spm-v3", "--report", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Figures of rows.jsonl" in page
    [facts] = [one["facts"] for one in records if one["case"] == "statistics"]
    assert page.count('class="bar"') == len(facts["histogram"])
    assert statistics_line(facts).startswith("13 rows, ")


@given(st.dictionaries(st.integers(1, 5000), st.integers(1, 9), min_size=1), st.integers(1, 6000))
def test_a_histogram_has_every_row_once_and_cuts_are_exact(lengths: dict[int, int], max_length: int) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 20
    for one in bins:
        assert one["rows"] == sum(rows for length, rows in lengths.items() if one["from"] <= length <= one["to"])
    assert sum(one["rows"] for one in bins) == sum(lengths.values())
    for cut in cuts(lengths, max_length):
        above = [length - cut["max_length"] for length, rows in lengths.items() for _ in range(rows)]
        assert (cut["rows"], cut["tokens"]) == (sum(one > 0 for one in above), sum(one for one in above if one > 0))
    assert cuts(lengths, max_length)[-1]["rows"] == 0


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "stats.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write(tmp_path / f"part-{number}.jsonl", ROWS[number::2])
    names: dict[str, Any] = {}
    exec(code, names)
    assert dict(names["results"]["statistics"].facts)["rows"] == len(ROWS)
