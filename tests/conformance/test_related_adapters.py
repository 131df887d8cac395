"""Adapters on one command line are compared; the broken sums are in the gallery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from combined_adapters import RANK, combined_adapters
from safetensors.torch import load_file, save_file

from pytest_mistral_lora import judge
from pytest_mistral_lora.conformance.adapter.related import MOST_ADAPTERS, RelatedAdapters
from pytest_mistral_lora.conformance.collection import NamedPaths
from pytest_mistral_lora.conformance.finding import Result

TENSORS = "adapter_model.safetensors"


def related(*folders: Path) -> list[Result]:
    family = RelatedAdapters(folders)
    return [family.result(folder) for folder in folders]


def relation(result: Result) -> str:
    assert not result.not_checked
    return str(dict(result.facts)["relation of"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "cat"}, "0.7 · first + 0.3 · second"),
        ({"mode": "cat", "weights": (1.0, -0.5)}, "1 · first - 0.5 · second"),
        ({"mode": "cat", "weights": (-2.0, 0.5)}, "-2 · first + 0.5 · second"),
        ({"mode": "svd", "rank": 2 * RANK, "weights": (0.5, 0.5)}, "0.5 · first + 0.5 · second"),
        ({"mode": "linear", "weights": (-0.5,)}, "-0.5 · first"),
        ({"mode": "cat", "dtype": torch.bfloat16}, "0.7"),
        ({"mode": "cat", "dtype": torch.float16}, "0.7"),
        ({"mode": "cat", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, "0.7 · first + 0.3 · second"),
    ],
    ids=str,
)
def test_the_weights_of_a_sum_are_found(settings: dict[str, Any], text: str) -> None:
    made = combined_adapters(**settings)
    first, second, combined = related(*made.sources, made.combined)
    assert relation(combined).startswith(text)
    assert not any(result.findings for result in (first, second, combined))
    assert relation(first) == "in the sum of combined"
    used = len(settings.get("weights", (0.7, 0.3)))
    assert relation(second) == ("in the sum of combined" if used == 2 else "no sum of the other adapters")


def test_a_sum_is_found_wherever_it_is_named() -> None:
    made = combined_adapters("cat")
    combined, *sources = related(made.combined, *made.sources)
    assert relation(combined) == "0.7 · first + 0.3 · second"
    assert [relation(source) for source in sources] == ["in the sum of combined"] * 2


def test_adapters_without_a_relation_are_no_finding() -> None:
    results = related(*combined_adapters("cat").sources)
    assert [relation(result) for result in results] == ["no sum of the other adapters"] * 2
    assert not any(result.findings for result in results)


def test_a_copy_is_the_same_adapter(tmp_path: Path) -> None:
    source = combined_adapters("cat", use_rslora=True).sources[0]
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    first, second = related(source, copy)
    assert (relation(first), relation(second)) == ("in the sum of copy", "1 · first")
    assert not second.findings


def test_a_layer_that_was_trained_on_is_no_finding(tmp_path: Path) -> None:
    source = combined_adapters("cat").sources[0]
    later = Path(shutil.copytree(source, tmp_path / "later"))
    tensors = load_file(later / TENSORS)
    name = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)) / 100
    save_file(tensors, later / TENSORS)
    _, result = related(source, later)
    assert (relation(result), result.findings) == ("1 · first, trained on in 1 layer", ())


def test_an_average_of_rslora_without_its_root_is_meant(tmp_path: Path) -> None:
    # whoever knows of √r divides the weights by it
    root = (2 * RANK) ** 0.5
    made = combined_adapters("cat", (0.5 / root, 0.5 / root), use_rslora=True)
    *_, combined = related(*made.sources, made.combined)
    assert (relation(combined), combined.findings) == ("0.5 · first + 0.5 · second", ())


def test_what_cannot_be_compared_is_not_checked(tmp_path: Path) -> None:
    made = combined_adapters("cat")
    broken = Path(shutil.copytree(made.combined, tmp_path / "broken"))
    (broken / TENSORS).write_bytes(b"")
    first, other = related(made.sources[0], broken)
    assert "no other adapter can be compared" in first.not_checked
    assert "cannot be compared with others" in other.not_checked
    many = [Path(shutil.copytree(made.combined, tmp_path / str(index))) for index in range(MOST_ADAPTERS + 1)]
    assert "17 adapters: at most 16" in related(*many)[0].not_checked


def test_adapters_of_other_bases_have_no_relation(tmp_path: Path) -> None:
    source = combined_adapters("cat").sources[0]
    larger = Path(shutil.copytree(source, tmp_path / "larger"))
    save_file(
        {
            name: torch.cat([tensor, tensor], dim=0 if "lora_B" in name else 1)
            for name, tensor in load_file(larger / TENSORS).items()
        },
        larger / TENSORS,
    )
    assert [relation(result) for result in related(source, larger)] == ["no sum of the other adapters"] * 2


def test_ranks_beyond_the_limit_are_not_multiplied(tmp_path: Path) -> None:
    source = combined_adapters("cat").sources[0]
    wide = Path(shutil.copytree(source, tmp_path / "wide"))
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps(config | {"r": 5000, "lora_alpha": 5000}))
    tensors = load_file(wide / TENSORS)
    save_file(
        {
            name: torch.ones(5000, tensor.shape[1]) if "lora_A" in name else torch.ones(tensor.shape[0], 5000)
            for name, tensor in tensors.items()
        },
        wide / TENSORS,
    )
    assert all("2048 ranks together" in result.not_checked for result in related(source, wide))


def test_numbers_that_are_not_finite_have_no_relation(tmp_path: Path) -> None:
    made = combined_adapters("cat")
    broken = Path(shutil.copytree(made.combined, tmp_path / "broken"))
    tensors = load_file(broken / TENSORS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / TENSORS)
    results = related(*made.sources, made.combined, broken)
    assert relation(results[2]) == "0.7 · first + 0.3 · second"
    assert relation(results[3]) == "no sum of the other adapters"


def test_every_front_compares_the_adapters_of_one_command_line() -> None:
    made = combined_adapters("cat", use_rslora=True)
    verdict = judge(*made.sources, made.combined, base=made.base)
    assert {finding.rule for finding in verdict.findings} == {"ML460"}
    assert "relation of combined: 1.98 · first + 0.8485 · second" in str(verdict)
    # one adapter has nothing to be compared with
    targets = NamedPaths(adapters=[made.combined], base=made.base).targets()
    assert [target.family for target in targets] == [None]
