"""The adapters of a run beside each other: whether one is a sum of the others, with one scale in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pytest_mistral_lora.conformance.adapter.combination import Combination, Comparison, LayerDeviation, Member, Term
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings
from pytest_mistral_lora.errors import InputError, counted, short_json
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

MOST_ADAPTERS = 16
"""Most adapters that are compared with each other."""

_SHOWN = 5
_LEAST_LOST = 0.01
_SVD_SCALES_ONCE = (0, 21)
"""The version of PEFT whose `svd` no longer applies the scale of the sources twice: huggingface/peft#3111."""


class RelatedAdapters:
    """The adapters of a run: they are read once, for the checks of each."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders: Sequence[Path] = folders

    @cached_property
    def _read(self) -> tuple[dict[Path, Member], dict[Path, InputError]]:
        """The adapters that can be compared, and why the others cannot."""
        names = [folder.resolve().name for folder in self._folders]
        members, errors = dict[Path, Member](), dict[Path, InputError]()
        for folder, name in zip(self._folders, names, strict=True):
            try:
                members[folder] = Member.read(name if names.count(name) == 1 else str(folder), AdapterFolder(folder))
            except InputError as error:
                errors[folder] = error
        return members, errors

    @cached_property
    def _combinations(self) -> dict[int, Combination] | InputError:
        try:
            return Comparison(list(self._read[0].values())).combinations()
        except InputError as error:
            return error

    def result(self, folder: Path) -> Result:
        """Return the findings on one of the adapters: the scale and the layers of a sum of others."""
        members, errors = self._read
        if len(self._folders) > MOST_ADAPTERS:
            return Result(not_checked=f"{len(self._folders)} adapters: at most {MOST_ADAPTERS} are compared")
        if folder in errors:
            return Result(not_checked=f"the adapter cannot be compared with others: {errors[folder]}")
        if len(members) < 2:
            return Result(not_checked=f"no other adapter can be compared: {next(iter(errors.values()))}")
        if isinstance(self._combinations, InputError):
            return Result(not_checked=f"the adapters cannot be compared: {self._combinations}")
        index = list(members).index(folder)
        combination = self._combinations.get(index)
        if combination is not None:
            findings = (*_scale_findings(combination), *_loss_findings(combination), *_layer_findings(combination))
            return Result(findings, facts=(("relation of", _fact(combination)),))
        own = members[folder]
        sums = [found for found in self._combinations.values() if own in found.sources]
        names = " and ".join(found.members[found.target].name for found in sums)
        return Result(facts=(("relation of", f"in the sum of {names}" if names else "no sum of the other adapters"),))


def _fact(combination: Combination) -> str:
    text = _sum_text(combination, combination.weights)
    moved = [deviation for deviation in combination.deviations if deviation.cause == "trained on"]
    if moved:
        text += f", trained on in {counted(len(moved), 'layer')}"
    return text


def _sum_text(combination: Combination, weights: Mapping[Term, float], factor: float = 1.0) -> str:
    """Return a sum with its weights, divided by a factor; of crossed factors, the terms of one adapter each."""
    plain = {term: weight for term, weight in weights.items() if term[0] == term[1]}
    text = ""
    for (left, right), weight in (plain or weights).items():
        first, second = (combination.members[index].name for index in (left, right))
        name = first if left == right else f"B of {first} with A of {second}"
        size = f"{abs(weight) / factor:.4g} · {name}"
        if text:
            text += f" {'-' if weight < 0 else '+'} {size}"
        else:
            text = f"{'-' if weight < 0 else ''}{size}"
    return text


def _scale_findings(combination: Combination) -> Iterator[Finding]:
    """Yield ML462 for known tensors with another scale, and ML460 for a sum that has a wrong factor."""
    member = combination.members[combination.target]
    config, place = member.folder.config, str(member.folder.config_file)
    text = _sum_text(combination, combination.weights)
    if any(adapter.has_magnitudes for adapter in (member, *combination.sources)):
        yield from _magnitude_findings(combination)
        return
    if combination.has_same_tensors:
        yield from _same_tensor_findings(combination)
        return
    plain = [weight for (left, right), weight in combination.weights.items() if left == right]
    if not plain:
        found = f"A and B are those of different adapters: {text}"
        yield Finding("ML460", found, str(member.folder.tensors_file), "A and B of the same adapters")
        return
    if _has_lost_sign(combination):
        names = " or ".join(source.name for source in combination.sources)
        found = f"the sign of a weight is lost: A and B of {names} are both negated, which makes {text}"
        yield Finding("ML460", found, str(member.folder.tensors_file), "the sign on one side alone")
    # an average is meant as it is
    is_average = min(plain) > 0 and math.isclose(sum(plain), 1.0, rel_tol=1e-3)
    if is_average or not member.is_like_combined:
        return
    factor, reasons = 1.0, []
    if config.get("use_rslora") and config["r"] > 1:
        factor *= math.sqrt(config["r"])
        reasons.append(f"√{config['r']}: use_rslora is on, though A and B have the scales of their sources already")
    scale = combination.scale_of_sources
    if combination.is_decomposed and _scales_twice(config.get("peft_version")) and scale not in (None, 1.0):
        assert scale is not None
        factor *= scale
        reasons.append(f"{scale:.4g}: the scale of the sources is in it twice")
    if reasons:
        found = f"{factor:.4g} times too strong, as {text} ({'; '.join(reasons)})"
        yield Finding("ML460", found, place, _sum_text(combination, combination.weights, factor))


def _scales_twice(version: object) -> bool:
    """Return whether a version of PEFT, as a configuration records it, applies the scale twice in `svd`."""
    numbers = str(version or "0").split(".")[:2]
    if not all(number.isdecimal() for number in numbers):
        return False
    return tuple(map(int, numbers)) < _SVD_SCALES_ONCE


def _has_lost_sign(combination: Combination) -> bool:
    # huggingface/peft#2918: with the sign on both sides, B A keeps its sign, and the crossed products change theirs
    weights = combination.weights
    return any(
        left < right
        and weight < 0
        and weights.get((right, left), 0) < 0 < min(weights[left, left], weights[right, right])
        for (left, right), weight in weights.items()
        if (left, left) in weights and (right, right) in weights
    )


def _magnitude_findings(combination: Combination) -> Iterator[Finding]:
    member = combination.members[combination.target]
    if member.folder.tensors_sha256 in {source.folder.tensors_sha256 for source in combination.sources}:
        return
    found = f"B A is {_sum_text(combination, combination.weights)}, and the magnitudes of DoRA have no such sum"
    expected = "a plain LoRA: merge each DoRA adapter by itself, and add the merged weights"
    yield Finding("ML460", found, str(member.folder.tensors_file), expected)


def _same_tensor_findings(combination: Combination) -> Iterator[Finding]:
    (factor,) = combination.weights.values()
    if math.isclose(factor, 1.0, rel_tol=1e-6):
        return
    member, (source,) = combination.members[combination.target], combination.sources
    config, other = member.folder.config, source.folder.config
    root, hint = math.sqrt(member.rank), ""
    if bool(config.get("use_rslora")) != bool(other.get("use_rslora")) and math.isclose(max(factor, 1 / factor), root):
        hint = f", {'' if factor > 1 else '1 / '}√{member.rank}: use_rslora"
    found = f"A and B are those of {source.name}, and the scale is {factor:.4g} times its own{hint}"
    names = ("lora_alpha", "r", "use_rslora")
    expected = ", ".join(f"{name} {short_json(other[name])}" for name in names if other.get(name) is not None)
    yield Finding("ML462", found, str(member.folder.config_file), expected)


def _loss_findings(combination: Combination) -> Iterator[Finding]:
    """Yield ML461 for a sum that is cut, or that has products of one adapter's B with another's A."""
    member = combination.members[combination.target]
    has_plain = any(left == right for left, right in combination.weights)
    if combination.lost < _LEAST_LOST or not has_plain or _has_lost_sign(combination):
        return
    text = _sum_text(combination, combination.weights)
    if combination.kind == "cut":
        found = f"{combination.lost:.0%} of {text} is lost: it is cut to rank {member.rank}"
    else:
        found = f"differs from {text} by {combination.lost:.0%} of its norm: B of each meets A of the others, too"
    rank = sum(source.rank for source in combination.sources)
    expected = f'the whole sum: combination_type="cat", or "svd" with svd_rank={rank}'
    yield Finding("ML461", found, str(member.folder.tensors_file), expected)


def _layer_findings(combination: Combination) -> Iterator[Finding]:
    """Yield ML460 for each layer that is not the sum that the other layers are."""
    member = combination.members[combination.target]
    place, expected = str(member.folder.tensors_file), _sum_text(combination, combination.weights)
    found = [
        Finding("ML460", f"{deviation.layer} {_deviation_text(combination, deviation)}", place, expected)
        for deviation in combination.deviations
        if deviation.cause != "trained on"
    ]
    yield from first_findings(found, _SHOWN, place)


def _deviation_text(combination: Combination, deviation: LayerDeviation) -> str:
    if deviation.cause == "left out":
        return "is left out, and the others change it"
    if deviation.cause == "of no source":
        return "is changed, and none of the others changes it"
    if deviation.cause == "another layer":
        a, b = deviation.homes
        if a == b:
            return f"has A and B of {a}"
        return " and ".join(f"has {side} of {home}" for side, home in (("A", a), ("B", b)) if home)
    if deviation.cause == "another change":
        return f"is another change (cosine {deviation.cosine:.2f})"
    factors = [weight / combination.weights[term] for term, weight in deviation.weights.items()]
    if max(factors) - min(factors) > 1e-3 * max(map(abs, factors)):
        return f"is {_sum_text(combination, deviation.weights)}"
    return f"is {factors[0]:.4g} times the sum of the other layers"
