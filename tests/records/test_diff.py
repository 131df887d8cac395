"""In what two records differ: made ones here, real runs in tests/training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from manifests import COMMIT, FOUR_KEYS, adapter, merged
from safetensors.torch import save_file
from sample_transcripts import transcript

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.compare_runs import ABSENT, GROUPS, compare_runs
from pytest_mistral_lora.report.tables import diff_data, diff_lines

Change = Callable[[dict[str, Any]], object]
LAYER = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
TENSORS = {LAYER.format(layer, side): torch.full((2, 3), float(layer + 1)) for layer in (0, 1) for side in "AB"}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, data: dict[str, Any] | None = None, tensors: Any = None, answers: Any = ()) -> Path:
        folder = tmp_path / name
        (folder / "transcripts").mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(adapter() if data is None else data))
        save_file(TENSORS if tensors is None else tensors, folder / "adapter_model.safetensors")
        for one in answers:
            one.write(folder / "transcripts")
        return folder

    return make


def facts(write: Callable[..., Path], change: Change) -> list[tuple[Any, ...]]:
    other = json.loads(json.dumps(adapter()))
    change(other)
    found = compare_runs(write("a"), write("b", other))
    return [(fact.group, fact.path, fact.a, fact.b) for fact in found.facts]


CASES: list[tuple[Change, list[tuple[Any, ...]]]] = [
    (lambda data: None, []),
    (lambda data: data.update(seed=7), [("training", "$.seed", 42, 7)]),
    (lambda data: data["lora"].update(r=16), [("lora", "$.lora.r", 8, 16)]),
    (
        lambda data: data["lora"].update(target_modules=["q_proj"]),
        [("lora", "$.lora.target_modules", ["q_proj", "v_proj"], ["q_proj"])],
    ),
    (
        lambda data: data["training"]["schedule"].update(name="constant"),
        [("training", "$.training.schedule.name", "cosine", "constant")],
    ),
    (
        lambda data: data["dataset"]["files"][0].update(rows=6),
        [("data", "$.dataset.files[0].rows", 5, 6)],
    ),
    (
        lambda data: data["dataset"]["files"].append(data["dataset"]["files"][0]),
        [("data", "$.dataset.files[1]", ABSENT, adapter()["dataset"]["files"][0])],
    ),
    (
        lambda data: data["files"].update({"a b/c.json": data["files"].pop("adapter_model.safetensors")}),
        [
            ("files", "$.files['adapter_model.safetensors']", {"sha256": "ab" * 32, "size": 10}, ABSENT),
            ("files", "$.files['a b/c.json']", ABSENT, {"sha256": "ab" * 32, "size": 10}),
        ],
    ),
    (
        lambda data: data["lora"].update(tensors_sha256="cd" * 32),
        [("files", "$.lora.tensors_sha256", "ab" * 32, "cd" * 32)],
    ),
    (
        lambda data: data["environment"]["packages"].update({"mistral-common": "1.0"}),
        [("environment", "$.environment.packages.mistral-common", ABSENT, "1.0")],
    ),
    (
        lambda data: data["evaluation"][0]["results"].update(loss=0.25),
        [("evaluation", "$.evaluation[0].results.loss", 0.5, 0.25)],
    ),
    (
        lambda data: data["template"].update(sha256="cd" * 32),
        [("tokenizer", "$.template.sha256", "ab" * 32, "cd" * 32)],
    ),
    (lambda data: data.update(seal="cd" * 32), []),
    (
        lambda data: data["recipe"]["base"].update(revision="f" * 40),
        [("recipe", "$.recipe.base.revision", COMMIT, "f" * 40)],
    ),
    (lambda data: data.update({"x-note": "mine"}), [("record", "$.x-note", ABSENT, "mine")]),
]


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_a_changed_fact_is_the_only_one_named(
    change: Change, expected: list[tuple[Any, ...]], write: Callable[..., Path]
) -> None:
    assert facts(write, change) == expected


def test_facts_come_by_group(write: Callable[..., Path]) -> None:
    def several(data: dict[str, Any]) -> None:
        data["files"]["more"] = {"sha256": "ab" * 32, "size": 1}
        data["environment"]["threads"] = 9
        data["masking"]["tokens"] = 9
        data["base"] = "other"

    groups = [group for group, *_ in facts(write, several)]
    assert groups == ["data", "base", "environment", "files"]
    assert groups == sorted(groups, key=GROUPS.index)


def test_what_an_old_manifest_does_not_record_is_one_fact_a_part(write: Callable[..., Path]) -> None:
    found = compare_runs(write("a", FOUR_KEYS), write("b"))
    assert all(fact.a is ABSENT for fact in found.facts)
    groups = {fact.path.removeprefix("$."): fact.group for fact in found.facts}
    alike = {name: name for name in ("tokenizer", "lora", "training", "environment", "files", "evaluation")}
    others = {"template": "tokenizer", "dataset": "data", "masking": "data", "base_weights_sha256": "base"}
    assert groups.items() >= {**alike, **others}.items()
    assert "  $.dataset: not recorded → {" in "\n".join(diff_lines(found, 80))


def test_tensors_are_compared_by_kind(write: Callable[..., Path]) -> None:
    other = {name: tensor.clone() for name, tensor in TENSORS.items()}
    other[LAYER.format(0, "A")][0, 0] += 3
    other[LAYER.format(1, "B")].neg_()
    found = compare_runs(write("a", None, TENSORS), write("b", None, other)).tensors
    assert not isinstance(found, str)
    assert (found.compared, found.different, found.equal) == (4, 2, False)
    a, b = found.kinds
    assert (a.name, a.tensors, a.different, a.max_abs) == ("self_attn.q_proj.lora_A", 2, 1, 3.0)
    norm = math.sqrt(6 * 1 + 6 * 4)
    assert a.relative == pytest.approx(3 / norm)
    assert a.cosine == pytest.approx((30 + 3) / (norm * math.sqrt(30 + 16 - 1)))
    assert (b.name, b.different, b.max_abs, b.cosine) == ("self_attn.q_proj.lora_B", 1, 4.0, pytest.approx(-18 / 30))


def test_tensors_of_other_names_and_shapes_are_named(write: Callable[..., Path]) -> None:
    name, *rest = TENSORS
    other = {one: TENSORS[one].clone() for one in rest[:-1]} | {"more": torch.ones(1), name: torch.ones(4, 3)}
    found = compare_runs(write("a", None, TENSORS), write("b", None, other))
    assert not isinstance(found.tensors, str)
    assert found.tensors.reshaped == ((name, (2, 3), (4, 3)),)
    assert (found.tensors.only_a, found.tensors.only_b) == ((rest[-1],), ("more",))
    assert not found.equal
    text = "\n".join(diff_lines(found, 80))
    for line in (f"  {name}: shape [2, 3] in a, [4, 3] in b", f"  {rest[-1]}: only in a", "  more: only in b"):
        assert line in text


@pytest.mark.parametrize(
    ("value", "max_abs"), [(torch.tensor([1.0, math.nan]), math.nan), (torch.tensor([1.0, math.inf]), math.inf)]
)
def test_what_is_no_number_differs_and_is_null_in_json(
    value: torch.Tensor, max_abs: float, write: Callable[..., Path]
) -> None:
    found = compare_runs(write("a", None, {"x": torch.ones(2)}), write("b", None, {"x": value}))
    assert not isinstance(found.tensors, str)
    assert found.tensors.kinds[0].max_abs == pytest.approx(max_abs, nan_ok=True)
    assert json.loads(json.dumps(diff_data(found), allow_nan=False))["tensors"]["kinds"][0]["max_abs"] is None
    same = compare_runs(write("c", None, {"x": value}), write("d", None, {"x": value.clone()}))
    assert same.equal


def test_shards_of_merged_models_are_read_as_one(write: Callable[..., Path]) -> None:
    one, other = write("a", merged()), write("b", merged())
    for folder in (one, other):
        (folder / "adapter_model.safetensors").unlink()
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
    save_file(tensors, one / "model.safetensors")
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor + index}, other / f"model-0000{index + 1}-of-00002.safetensors")
    found = compare_runs(one, other).tensors
    assert not isinstance(found, str)
    assert [(kind.name, kind.different) for kind in found.kinds] == [("lm_head", 1), ("mlp.up_proj", 0)]
    assert compare_runs(other, other).equal


def test_another_dtype_is_another_tensor(write: Callable[..., Path]) -> None:
    found = compare_runs(
        write("a", None, {"x": torch.ones(2)}), write("b", None, {"x": torch.ones(2, dtype=torch.bfloat16)})
    )
    assert not isinstance(found.tensors, str)
    assert (found.tensors.different, found.tensors.kinds[0].max_abs, found.equal) == (1, 0.0, False)


def test_answers_are_compared_by_case(write: Callable[..., Path]) -> None:
    asked = parse_row({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    first = [transcript(case=f"row-{n}") for n in range(5)]
    second = [
        transcript(case="row-1", completion_ids=(7, 9), text="Other"),
        transcript(case="row-2", row=asked),
        transcript(case="row-3", prompt_ids=(1, 3, 6, 4)),
        transcript(case="row-4", logprobs=(-0.5, -0.5), recorded_with=dict(first[0].recorded_with, torch="2.0")),
        transcript(case="row-9"),
    ]
    found = compare_runs(write("a", None, None, first), write("b", None, None, second))
    assert not isinstance(found.answers, str)
    assert [(one.case, one.differs, one.token) for one in found.answers.different] == [
        ("row-1", "answer", 1),
        ("row-2", "question", None),
        ("row-3", "prompt", None),
    ]
    assert (found.answers.compared, found.answers.only_a, found.answers.only_b) == (4, ("row-0",), ("row-9",))
    text = list(diff_lines(found, 80))
    assert text[text.index("answers: 3 of 4 differ") + 1 :][:3] == [
        "  row-1: from token 1 on",
        "    a: 'Pâris'",
        "    b: 'Other'",
    ]


def test_an_answer_that_is_the_beginning_of_another_differs_where_it_ends(write: Callable[..., Path]) -> None:
    longer = transcript(
        completion_ids=(7, 2, 2), logprobs=(-0.1,) * 3, margins=(1.0,) * 3, runner_up_ids=(1,) * 3, stop="eos"
    )
    found = compare_runs(write("a", None, None, [transcript()]), write("b", None, None, [longer])).answers
    assert not isinstance(found, str)
    assert found.different[0].token == 2


def test_what_cannot_be_compared_is_said(write: Callable[..., Path], tmp_path: Path) -> None:
    one = write("a", None, TENSORS, [transcript()])
    found = compare_runs(one, one / "manifest.json")
    assert (found.facts, found.equal) == ((), True)
    assert found.tensors == f"no tensors in {one / 'manifest.json'}"
    assert found.answers == f"no transcripts in {one / 'manifest.json'}"
    assert f"tensors: not compared: {found.tensors}" in list(diff_lines(found, 80))
    assert diff_data(found)["not_compared"] == {"tensors": found.tensors, "answers": found.answers}
    other = write("b", merged(), TENSORS)
    assert compare_runs(one, other).tensors == "one is of kind adapter, the other merged"
    assert ("record", "$.kind") in {(fact.group, fact.path) for fact in compare_runs(one, other).facts}


def _no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _torn_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _torn_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"no")


def _torn_transcript(folder: Path) -> None:
    (folder / "transcripts" / "row-0001.json").write_text("{}")


@pytest.mark.parametrize(
    ("tear", "said"),
    [
        (_torn_manifest, "not valid JSON"),
        (_no_manifest, "no such file"),
        (_torn_tensors, "not a safetensors file"),
        (_no_tensors, "no tensors; expected an adapter or a model"),
        (_torn_transcript, "not a golden transcript"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_by_name(
    tear: Callable[[Path], None], said: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (write(name, None, TENSORS, [transcript()]) for name in ("a", "b"))
    tear(other)
    with pytest.raises(InputError, match=said) as error:
        compare_runs(one, other)
    assert str(other) in str(error.value.place)
    assert main(["diff", str(one), str(other)]) == 2
    assert said in capsys.readouterr().err


def test_the_exit_code_says_whether_they_differ(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write("a", None, TENSORS), write("b", {**adapter(), "seed": 7}, TENSORS)
    assert main(["diff", str(one), str(one)]) == 0
    assert capsys.readouterr().out.splitlines()[2:4] == ["facts: 0 differ", "tensors: 0 of 4 differ"]
    assert main(["diff", str(one), str(other)]) == 1
    assert capsys.readouterr().out.splitlines()[2:5] == ["facts: 1 differ", "training", "  $.seed: 42 → 7"]
    assert main(["diff", str(one), str(other), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["facts"] == [{"group": "training", "path": "$.seed", "a": 42, "b": 7}]
    assert (data["equal"], data["tensors"]["different"]) == (False, 0)
