from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from manifests import COMMIT, FOUR_KEYS, SHA, adapter, merged

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.manifest import SCHEMA, build, load, parts, seal_of, sealed, validate, violations


def test_the_schema_is_itself_valid() -> None:
    Draft202012Validator.check_schema(SCHEMA.data)
    assert SCHEMA.data["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_part_says_whether_it_can_be_computed_again() -> None:
    assert {part["x-fact"] for part in parts().values()} == {"recomputed", "declared"}


@pytest.mark.parametrize("make", [adapter, merged])
def test_a_full_manifest_is_valid(make: Callable[[], dict[str, Any]]) -> None:
    assert violations(make()) == []
    assert validate(make()).version == 3


def test_a_local_base_has_its_weights_hash_in_place_of_a_revision() -> None:
    assert violations({**adapter(), "revision": None}) == []
    without = {key: value for key, value in adapter().items() if key != "base_weights_sha256"}
    assert violations(without) == []
    assert [str(one.place) for one in violations({**without, "revision": None})] == ["$.base_weights_sha256"]


def test_the_configuration_of_the_base_is_an_object_that_older_manifests_lack() -> None:
    assert violations({**adapter(), "base_config": {"rms_norm_eps": 1e-5}}) == []
    assert [str(one.place) for one in violations({**adapter(), "base_config": {}})] == ["$.base_config"]
    assert [str(one.place) for one in violations({**adapter(), "base_config": "a" * 64})] == ["$.base_config"]


def test_keys_of_your_own_begin_with_x() -> None:
    data = adapter()
    data["x-team"] = {"anything": [1]}
    data["training"]["x-note"] = "fine"
    assert violations(data) == []


def set_at(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split("/")
    place: Any = data
    for step in parents:
        place = place[int(step) if isinstance(place, list) else step]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "json_path", "expected"),
    [
        ("revision", "main", "$.revision", "40 hex"),
        ("revision", COMMIT[:12], "$.revision", "40 hex"),
        ("dataset_sha256", SHA.upper(), "$.dataset_sha256", "64 lower-case hex"),
        ("seed", "42", "$.seed", "integer"),
        ("seed", -1, "$.seed", "at least 0"),
        ("schema_version", 2, "$.schema_version", "3"),
        ("kind", "lora", "$.kind", "adapter"),
        ("seeds", 1, "$.seeds", "no such key"),
        ("lora/r", 0, "$.lora.r", "at least 1"),
        ("lora/dropout", 1.0, "$.lora.dropout", "below 1"),
        ("lora/rank", 8, "$.lora.rank", "no such key"),
        ("lora/target_modules", [], "$.lora.target_modules", "minItems"),
        ("training/schedule/name", "cosin", "$.training.schedule.name", "cosine"),
        ("training/learning_rate", None, "$.training.learning_rate", "number"),
        ("dataset/files/0/sha256", "x", "$.dataset.files[0].sha256", "64 lower-case hex"),
        ("evaluation", [{"results": {}}], "$.evaluation[0].command", "What repeats it"),
        ("files", {"../../etc/passwd": {"sha256": SHA, "size": 1}}, "$.files", "without `..`"),
        ("files", {"/etc/passwd": {"sha256": SHA, "size": 1}}, "$.files", "not absolute"),
        ("dataset/files/0/path", "../rows.jsonl", "$.dataset.files[0].path", "without `..`"),
        ("tokenizer/file", "/etc/passwd", "$.tokenizer.file", "not absolute"),
    ],
)
def test_a_violation_names_its_json_path(path: str, value: Any, json_path: str, expected: str) -> None:
    found = violations(set_at(adapter(), path, value))
    assert json_path in [str(one.place) for one in found]
    assert any(expected in one.expected for one in found if str(one.place) == json_path)


_REQUIRED = [key for key in adapter() if key not in ("schema_version", "base_weights_sha256")]


@pytest.mark.parametrize("key", _REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    data = adapter()
    del data[key]
    found = violations(data)
    assert [str(one.place) for one in found] == [f"$.{key}"]
    assert found[0].found == ""


def test_a_merged_manifest_needs_its_parent() -> None:
    data = merged()
    del data["parent"]
    assert [str(one.place) for one in violations(data)] == ["$.parent"]


def test_four_keys_are_version_0_and_are_migrated() -> None:
    manifest = validate(FOUR_KEYS)
    assert manifest.version == 0
    assert {key: manifest.data[key] for key in FOUR_KEYS} == FOUR_KEYS
    assert manifest.data["kind"] == "adapter"
    assert manifest.not_recorded == [
        "base_weights_sha256",
        "base_config",
        "tokenizer",
        "template",
        "dataset",
        "masking",
        "lora",
        "training",
        "recipe",
        "environment",
        "files",
        "evaluation",
        "parent",
        "seal",
    ]
    assert validate({**FOUR_KEYS, "schema_version": 0}).version == 0


@pytest.mark.parametrize("key", FOUR_KEYS)
def test_each_of_the_four_keys_is_needed(key: str) -> None:
    data = {name: value for name, value in FOUR_KEYS.items() if name != key}
    assert [str(one.place) for one in violations(data)] == [f"$.{key}"]


@pytest.mark.parametrize("data", [None, [], "manifest", 3, {}])
def test_what_is_not_a_manifest_has_violations(data: Any) -> None:
    assert violations(data) != []


def test_all_violations_are_in_one_error(tmp_path: Path) -> None:
    data = {**FOUR_KEYS, "seed": "x", "revision": "main"}
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"(?s)2 violations.*\$\.revision: \"main\".*\$\.seed: \"x\""):
        load(tmp_path)


def test_a_folder_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        load(tmp_path)


def test_build_orders_the_keys_as_the_schema_does() -> None:
    made = adapter()
    built = build(**dict(reversed(made.items())), **{"x-mine": 1})
    assert list(built) == [*(name for name in parts() if name in made and name != "seal"), "x-mine", "seal"]
    with pytest.raises(InputError, match=r"\$\.seed"):
        build(**{**made, "seed": None})


@pytest.mark.parametrize(
    "path",
    [
        "recipe",
        "seal",
        "tokenizer/files",
        "template/probe",
        "template/probe_sha256",
        "dataset/held_out_rows_sha256",
        "lora/seed",
        "environment/code",
    ],
)
def test_an_adapter_has_the_facts_that_repeat_its_run(path: str) -> None:
    data = adapter()
    part, _, key = path.partition("/")
    del (data[part] if key else data)[key or part]
    [violation] = violations(data)
    assert str(violation.place) == f"$.{path.replace('/', '.')}"
    assert violation.expected != "a value"


def test_a_version_that_was_never_released_is_refused() -> None:
    [violation] = violations({**adapter(), "schema_version": 1})
    assert str(violation) == "$.schema_version: 1; expected 3"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"seed": 42', b'"seed": 43'),
        (b"{\n", b"{ \n"),
        (b"x-mine", b"x-mind"),
        (b"0.5", b"5E-1"),
        (b'"0000', b'"0001'),
    ],
)
def test_the_seal_moves_with_every_byte(before: bytes, after: bytes, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    data = build(**adapter(), **{"x-mine": "0" * 64})
    write_json(file, data)
    assert seal_of(file.read_bytes(), data["seal"]) == data["seal"]
    assert sealed(data) == data
    text = file.read_bytes()
    assert before in text
    file.write_bytes(text.replace(before, after, 1))
    assert seal_of(file.read_bytes(), data["seal"]) != data["seal"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"seed": 1, "seed": 2}', "the key 'seed' appears twice"),
        ('{"seed": NaN}', "NaN is not a JSON number"),
        ('{"seed": 1e999}', "too large a number"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"base": "\\ud800"}', "surrogates"),
        ('{\n"seed": 1,\n}', "line 3, column 1"),
        ("", "not valid JSON"),
    ],
    ids=["twice", "nan", "infinite", "deep", "surrogate", "trailing-comma", "empty"],
)
def test_json_that_cannot_be_trusted_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=says):
        load(tmp_path)


def test_a_manifest_of_50_megabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"x-big": "' + "a" * (50 << 20) + '"}')
    with pytest.raises(InputError, match="too large to be one"):
        load(tmp_path)


_SCALARS = st.none() | st.booleans() | st.integers() | st.text()
_JSON = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(_JSON, st.sampled_from(sorted(adapter())))
def test_any_json_in_place_of_a_part_gives_violations_and_never_a_crash(value: Any, part: str) -> None:
    for one in violations({**adapter(), part: value}):
        assert str(one.place).startswith("$")
        assert str(one)
