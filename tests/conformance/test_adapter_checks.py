from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.assertions import assert_adapter_sound
from pytest_mistral_lora.checkpoint.weights import read_header
from pytest_mistral_lora.conformance.adapter import cases
from pytest_mistral_lora.conformance.adapter.effect import movement_findings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.adapter_config import match_counts
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 ids and two layers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("hub") / "small"
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, architectures=["MistralForCausalLM"], **size)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


HARMLESS: dict[str, Any] = {
    # of newer and older versions of PEFT, at their defaults
    "a_key_of_tomorrow": None,
    "another_key_of_tomorrow": False,
    "a_config_of_tomorrow": {},
    "runtime_config": {"ephemeral_gpu_offload": False},
    "enable_lora": None,
    "merge_weights": False,
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "corda_config": None,
    "eva_config": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "target_parameters": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.18.1",
    "layer_replication": None,
    "task_type": "CAUSAL_LM",
    # of Unsloth and ms-swift
    "auto_mapping": {
        "base_model_class": "MistralForCausalLM",
        "parent_library": "transformers.models.mistral.modeling_mistral",
        "unsloth_fixed": True,
    },
    "lora_dtype": None,
    "lorap_lr_ratio": None,
    "lorap_emb_lr": 1e-06,
}

Save = Callable[..., Path]


@pytest.fixture
def save(base: Path, tmp_path: Path) -> Save:
    """Make an adapter as another trainer would: PEFT alone, its lora_B moved, no manifest."""

    def saved(dtype: torch.dtype = torch.float32, *, embeddings: bool | str = "auto", **settings: Any) -> Path:
        folder = tmp_path / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
            config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS, "revision": COMMIT, **settings})
            model = get_peft_model(model, config)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter) * 0.02)
                    parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data
            model.save_pretrained(folder, save_embedding_layers=embeddings)
        return folder

    return saved


def judged(folder: Path, base: Path | None) -> dict[str, Result]:
    return {name: judge() for name, judge in cases(AdapterFolder(folder, base)).items()}


def rules(results: dict[str, Result]) -> set[str]:
    return {finding.rule for result in results.values() for finding in result.findings}


SOUND: dict[str, dict[str, Any]] = {
    "every-projection": {},
    "query-and-value": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "a-regular-expression": {"target_modules": r".*\.(self_attn|mlp)\.(q_proj|down_proj)"},
    "rslora": {"use_rslora": True, "lora_alpha": 2.5},
    "dora": {"use_dora": True},
    "bias-of-lora": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "patterns": {"rank_pattern": {"q_proj": 3, r"^model\.layers\.0\.mlp\..*": 4}, "alpha_pattern": {"q_proj": 5}},
    "one-layer": {"layers_to_transform": [1]},
    "one-layer-by-number": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "a-full-path": {"target_modules": ["layers.1.self_attn.q_proj"]},
    "excluded": {"exclude_modules": ["k_proj"]},
    "saved-modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the-head": {"target_modules": ["q_proj", "lm_head"]},
    "the-embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "new-tokens": {"trainable_token_indices": [1, 2]},
    "replicated-layers": {"layer_replication": [[0, 2], [1, 2]]},
    "rank-one": {"r": 1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}

NOTED = ("dora", "bias-of-lora", "bias-all", "patterns", "saved-modules", "new-tokens", "replicated-layers")
"""What PEFT loads, and vLLM refuses or leaves out."""


def notes(case: str) -> set[str]:
    return {"ML426"} if case in NOTED else set()


@pytest.mark.parametrize(("case", "settings"), SOUND.items(), ids=SOUND)
def test_what_peft_saves_is_sound(case: str, settings: dict[str, Any], save: Save, base: Path) -> None:
    results = judged(save(**settings), base)
    assert rules(results) == notes(case)
    assert {name: result.not_checked for name, result in results.items() if result.not_checked} == {}


@pytest.mark.parametrize(("case", "settings"), SOUND.items(), ids=SOUND)
def test_without_its_base_an_adapter_is_judged_as_far_as_it_goes(
    case: str, settings: dict[str, Any], save: Save
) -> None:
    folder = save(**settings)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "somebody/elsewhere"}))
    results = judged(folder, None)
    assert rules(results) == (notes(case) if "layer_replication" not in settings else set())
    unchecked = {name for name, result in results.items() if result.not_checked}
    named = {"tensors-complete", "configuration"} if "layer_replication" in settings else set()
    assert unchecked == {"fits-base", "changes-the-base"} | named
    assert named or "--mistral-base" in results["fits-base"].not_checked


def test_a_trainers_other_files_and_newer_keys_are_no_finding(save: Save, base: Path) -> None:
    folder = save()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        (folder / name).write_bytes(b"PK")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **HARMLESS}))
    assert rules(judged(folder, base)) == set()
    assert_adapter_sound(folder, base)


def test_a_note_does_not_fail_the_assertion_and_an_error_does(save: Save, base: Path) -> None:
    folder = save(revision=None)
    assert rules(judged(folder, base)) == {"ML411"}
    assert_adapter_sound(folder, base)
    (folder / TENSORS).write_bytes(b"")
    with pytest.raises(AssertionError, match=r"^ML405 .*adapter_model.safetensors"):
        assert_adapter_sound(folder, base)


def test_a_base_beside_the_folder_is_found_by_its_name(save: Save, base: Path) -> None:
    folder = save()
    shutil.copytree(base, folder.parent / "small")
    results = judged(folder, None)
    assert not any(result.not_checked or result.findings for result in results.values())


def test_a_base_is_found_in_the_cache_at_its_commit_and_nowhere_else(
    save: Save, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--some--base" / "snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    folder = save()
    config = {**json.loads((folder / CONFIG).read_text()), "base_model_name_or_path": "some/base"}
    (folder / CONFIG).write_text(json.dumps(config))
    assert not judged(folder, None)["changes-the-base"].not_checked
    (folder / CONFIG).write_text(json.dumps({**config, "revision": COMMIT[::-1]}))
    assert "is missing" in judged(folder, None)["changes-the-base"].not_checked
    (folder / CONFIG).write_text(json.dumps({**config, "revision": None}))
    assert "is missing" in judged(folder, None)["changes-the-base"].not_checked


def test_an_adapter_in_the_hubs_cache_may_link_to_its_blobs(save: Save, base: Path, tmp_path: Path) -> None:
    made = save()
    blobs = tmp_path / "models--some--adapter" / "blobs"
    snapshot = blobs.parent / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        shutil.copy(made / name, blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"hash-of-{name}")
    assert rules(judged(snapshot, base)) == set()


def test_a_base_that_cannot_be_read_is_an_error_of_its_own(save: Save, base: Path, tmp_path: Path) -> None:
    folder = save()
    with pytest.raises(PinError, match=r"config\.json"):
        judged(folder, tmp_path)
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PinError, match="does not load"):
        judged(folder, broken)


@pytest.mark.parametrize("architecture", ["VoxtralForConditionalGeneration", "GptOssForCausalLM"])
def test_names_are_not_checked_on_a_base_of_another_architecture(
    architecture: str, save: Save, base: Path, tmp_path: Path
) -> None:
    folder, other = save(), Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    results = judged(folder, other)
    assert rules(results) == set()
    assert all(architecture in results[case].not_checked for case in ("tensors-complete", "configuration"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "two"},
        {"hidden_size": "x"},
        {"hidden_size": -1},
        {"num_attention_heads": 0, "head_dim": None},
        {"vocab_size": 10**30},
    ],
)
def test_a_base_of_impossible_size_is_refused_at_once(
    change: dict[str, Any], save: Save, base: Path, tmp_path: Path
) -> None:
    folder, other = save(), Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(PinError, match="other"):
        judged(folder, other)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(save: Save, base: Path) -> None:
    folder = save()
    for name in (CONFIG, TENSORS):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    results = judged(folder, base)
    assert rules(results) == {"ML405"}
    assert all("no regular file" in finding.text() for finding in results["files"].findings)


def test_a_configuration_of_gigabytes_is_not_read(save: Save, base: Path) -> None:
    folder = save()
    with (folder / CONFIG).open("wb") as file:
        file.truncate(2 << 30)
    assert "too large" in judged(folder, base)["files"].findings[0].found


@pytest.mark.parametrize(
    "header",
    [
        b"null",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"\\u001b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_that_is_not_one_is_refused_with_the_files_name(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / TENSORS
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match=TENSORS):
        read_header(file)


def test_a_header_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(0, 4).bfloat16(), "c": torch.tensor(1).char()}
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    header = read_header(tmp_path / TENSORS)
    assert {name: info.shape for name, info in header.items()} == {"a": (2, 3), "b": (0, 4), "c": ()}
    assert {name: info.dtype for name, info in header.items()} == {"a": "F32", "b": "BF16", "c": "I8"}
    assert header.keys() == load_file(tmp_path / TENSORS).keys()


def test_every_cut_of_a_file_is_found(save: Save) -> None:
    file = save(target_modules=["q_proj"]) / TENSORS
    data = file.read_bytes()
    for length in (*range(64), len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match="safetensors"):
            read_header(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="bytes too many"):
        read_header(file)


def test_patterns_are_counted_and_bad_ones_refused() -> None:
    assert match_counts([], ["a"]) == []
    assert match_counts([r"a.*", r"b", r"ab"], ["ab", "ac"]) == [2, 0, 1]
    with pytest.raises(InputError, match="not a regular expression"):
        match_counts(["("], ["a"])


def test_a_configuration_with_a_number_that_is_none_cannot_be_read(save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": float("nan")}))
    results = judged(folder, base)
    assert rules(results) == {"ML405"}
    assert any("NaN is not a JSON number" in finding.found for one in results.values() for finding in one.findings)


@pytest.mark.parametrize(
    "change",
    [
        {"layer_replication": [[0, 10**9]]},
        {"layer_replication": [[0]]},
        {"layers_to_transform": "all"},
        {"target_modules": ["q_proj"] * 20_000},
        {"target_modules": {"q_proj": 1}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": ["q_proj"]},
        {"modules_to_save": [1]},
        {"r": 10**30},
        {"r": True},
        {"lora_alpha": -8},
        {"use_rslora": "yes"},
        {"bias": "some"},
        {"trainable_token_indices": "all"},
        {"target_modules": "("},
    ],
    ids=str,
)
def test_a_value_that_no_lora_has_is_named(change: dict[str, Any], save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    results = judged(folder, base)
    assert rules(results) == {"ML408"}
    assert results["tensors-complete"].not_checked


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: name.removeprefix("base_model.model."), "is missing"),
        (lambda name: f"base_model.model.{name}", "twice"),
        (lambda name: name.replace("model.model.", "model."), "it begins with 'base_model.model.'"),
        (lambda name: name.replace("model.layers", "language_model.layers"), "'language_model.' is in it"),
        (lambda name: f"module.{name}", "'module.' is in it"),
        (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "'_orig_mod.' is in it"),
        (lambda name: name.replace(".weight", ".default.weight"), "the adapter's name 'default'"),
        (lambda name: name.replace(".lora_", ".base_layer.lora_"), "'.base_layer' is in it"),
        (lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "it ends otherwise"),
        (lambda name: name.removesuffix(".weight"), "it ends otherwise"),
    ],
)
def test_without_a_base_names_that_peft_does_not_find_are_told_with_the_right_one(
    rename: Callable[[str], str], says: str, save: Save
) -> None:
    folder = save()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / TENSORS)
    [finding] = judged(folder, None)["tensors-complete"].findings
    assert finding.rule == "ML407"
    assert f"{len(tensors)} names" in finding.found
    assert says in finding.found
    assert finding.expected in tensors


@pytest.mark.parametrize("head", ["base_model.model.model.language_model", "base_model.model.language_model.model"])
def test_without_a_base_an_adapter_of_a_model_with_images_is_not_checked(head: str, save: Save) -> None:
    folder = save()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    renamed = {name.replace("base_model.model.model", head): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "somebody/elsewhere"}))
    results = judged(folder, None)
    assert rules(results) == set()
    assert "is not of a MistralForCausalLM" in results["tensors-complete"].not_checked


def test_an_adapter_that_is_small_everywhere_is_a_short_run(save: Save, base: Path) -> None:
    folder = save()
    tensors = {name: tensor / (1e6 if "lora_B" in name else 1) for name, tensor in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS)
    assert not judged(folder, base)["layers-trained"].findings


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("scale", [8, 32])
def test_a_base_that_an_initialisation_changed_is_told_from_the_plain_one(
    start: str, scale: int, base: Path, tmp_path: Path
) -> None:
    """Real PEFT: the adapter after some steps, the plain base, the run's own base, and the converted adapter."""
    settings = {"r": 4, "lora_alpha": scale // 2, "target_modules": ["q_proj", "down_proj"], "revision": COMMIT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=start, **settings))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = start
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        for _ in range(5):
            model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        own = model.unload()
        own.config.architectures = ["MistralForCausalLM"]
        own.save_pretrained(tmp_path / "own")
    assert rules(judged(tmp_path / "adapter", base)) == {"ML423"}
    assert rules(judged(tmp_path / "adapter", tmp_path / "own")) == set()
    assert rules(judged(tmp_path / "plain", base)) == set()


def test_an_initialisation_that_leaves_no_trace_is_not_checked(save: Save, base: Path) -> None:
    folder = save()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "init_lora_weights": "lora_ga"}))
    results = judged(folder, base)
    assert rules(results) == set()
    assert "needs a base of its own" in results["initial-base"].not_checked


@pytest.mark.parametrize(
    ("moved", "still"),
    [
        ({0: 1.0}, 5),
        ({5: 1.0}, 5),
        ({2: 1.0, 3: 1.0}, 4),
        # a gradient that shrinks towards the first block is no freezing
        ({n: 0.3**n for n in range(6)}, 0),
        (dict.fromkeys(range(6), 1e-5), 0),
    ],
)
def test_blocks_that_hardly_moved_are_told_from_those_that_moved(
    moved: dict[int, float], still: int, tmp_path: Path
) -> None:
    random = torch.Generator().manual_seed(0)
    sides = {"lora_A": (4, 16), "lora_B": (16, 4)}
    names = {n: f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in range(6)}
    tensors = {
        f"{name}.{side}.weight": torch.randn(shape, generator=random) * (moved.get(n, 1e-6) if side == "lora_B" else 1)
        for n, name in names.items()
        for side, shape in sides.items()
    }
    save_file(tensors, tmp_path / TENSORS)
    found = [finding.found for finding in movement_findings(AdapterFolder(tmp_path, None))]
    assert len(found) == still
    assert not any(f"layers.{n}." in text for n in moved for text in found)
