"""What config.json, params.json and a GGUF file say of one model, in the spellings of releases and converters."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_mistral_lora.checkpoint.model_facts import (
    ModelFacts,
    Stated,
    contradictions,
    facts_of_config,
    facts_of_gguf,
    facts_of_params,
    spelling_conflicts,
)
from pytest_mistral_lora.conformance.tokenizer.configurations import configuration_findings
from pytest_mistral_lora.places import Place

SMALL = {
    "config": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32768,
    },
    "params": {
        "n_layers": 32,
        "dim": 4096,
        "hidden_dim": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "norm_eps": 1e-05,
        "vocab_size": 32768,
    },
}


def yarn(factor: float, original: int, mscale_all_dim: float, *, scales: bool, beta: float = 32.0) -> tuple[Any, Any]:
    """Return the rotary embedding of config.json and of params.json of one model."""
    rope = {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": factor,
        "original_max_position_embeddings": original,
        "max_position_embeddings": 262144,
        "beta_fast": beta,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": mscale_all_dim,
        "llama_4_scaling_beta": 0.1,
    }
    own = {
        "original_max_position_embeddings": original,
        "factor": factor,
        "apply_scale": scales,
        "beta": beta,
        "alpha": 1.0,
    }
    params = {"rope_theta": 1e6, "yarn": own}
    return rope, {**params, "llama_4_scaling": {"original_max_position_embeddings": original, "beta": 0.1}}


def of_ministral_3(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    text = {**SMALL["config"], "model_type": "ministral3", "rope_parameters": rope, "sliding_window": None, **config}
    return {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}


MINISTRAL_3, MINISTRAL_3_PARAMS = yarn(16.0, 16384, 1.0, scales=False)
DEVSTRAL_2, DEVSTRAL_2_PARAMS = yarn(48.0, 8192, 1.0, scales=False)
MEDIUM, MEDIUM_PARAMS = yarn(64.0, 4096, 0.0, scales=True, beta=4.0)

RELEASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # no rope_theta, and the window of v0.1
    "7b-v0.1": (
        {**SMALL["config"], "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
        {**SMALL["params"], "sliding_window": 4096},
    ),
    "7b-v0.3": (
        {**SMALL["config"], "model_type": "mistral", "rope_theta": 1e6, "sliding_window": None},
        {**SMALL["params"], "rope_theta": 1e6},
    ),
    # transformers 5 writes the same model with the newer spelling
    "7b-v0.3-saved": (
        {
            **SMALL["config"],
            "model_type": "mistral",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_window": None,
        },
        {**SMALL["params"], "rope_theta": 1e6},
    ),
    "mixtral-8x7b": (
        {**SMALL["config"], "model_type": "mixtral", "rope_theta": 1e6, "sliding_window": None},
        {**SMALL["params"], "rope_theta": 1e6, "moe": {"num_experts_per_tok": 2, "num_experts": 8}},
    ),
    "ministral-8b-2410": (
        {**SMALL["config"], "model_type": "ministral", "rope_theta": 1e8, "sliding_window": 32768},
        {**SMALL["params"], "rope_theta": 1e8, "sliding_window": [32768, 32768, 32768, None]},
    ),
    "small-3.1": (
        {
            "model_type": "mistral3",
            "vision_config": {"hidden_size": 1024, "num_attention_heads": 16},
            "text_config": {**SMALL["config"], "model_type": "mistral", "rope_theta": 1e9, "sliding_window": None},
        },
        {**SMALL["params"], "rope_theta": 1e9, "vision_encoder": {"hidden_size": 1024}, "max_seq_len": 131072},
    ),
    "ministral-3-3b": (
        of_ministral_3({"tie_word_embeddings": True}, MINISTRAL_3),
        {**SMALL["params"], **MINISTRAL_3_PARAMS, "tied_embeddings": True},
    ),
    "devstral-small-2": (of_ministral_3({}, DEVSTRAL_2), {**SMALL["params"], **DEVSTRAL_2_PARAMS}),
    "medium-3.5": (of_ministral_3({}, MEDIUM), {**SMALL["params"], **MEDIUM_PARAMS}),
    # the attention factor spelled out, as a server's own reader of Mistral's format does
    "medium-3.5-factor": (
        of_ministral_3({}, {**MEDIUM, "mscale": None, "mscale_all_dim": None}),
        {**SMALL["params"], **MEDIUM_PARAMS},
    ),
    "ministral-3-factor": (
        of_ministral_3({}, {**MINISTRAL_3, "mscale_all_dim": 1, "mscale": None, "attention_factor": 1.0}),
        {**SMALL["params"], **MINISTRAL_3_PARAMS},
    ),
    # latent attention: heads, widths and the attention factor mean other things in each format
    "small-4": (
        {
            "model_type": "mistral4",
            "num_hidden_layers": 36,
            "head_dim": 64,
            "num_key_value_heads": 32,
            "kv_lora_rank": 256,
            "rope_parameters": {**DEVSTRAL_2, "factor": 128.0},
        },
        {
            "n_layers": 36,
            "head_dim": 128,
            "kv_lora_rank": 256,
            "moe": {"expert_hidden_dim": 2048},
            **DEVSTRAL_2_PARAMS,
            "yarn": {**DEVSTRAL_2_PARAMS["yarn"], "factor": 128.0, "apply_scale": True},
        },
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_two_configurations_of_a_release_agree(name: str) -> None:
    config, params = RELEASES[name]
    assert not list(contradictions(facts_of_config(config), facts_of_params(params)))
    places = (Place.of("config.json"), Place.of("params.json"))
    assert not list(configuration_findings(config, places[0], params, places[1]))


def converted(rope: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return what llama.cpp's converter writes of a Ministral 3."""
    scaling = {
        "type": "yarn",
        "factor": rope["factor"],
        "original_context_length": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_log_multiplier": rope["mscale_all_dim"],
    }
    sizes = {
        "block_count": 32,
        "embedding_length": 4096,
        "attention.head_count": 32,
        "attention.layer_norm_rms_epsilon": 1e-05,
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
        "rope.freq_base": rope["rope_theta"],
    }
    found = {**sizes, **{f"rope.scaling.{key}": value for key, value in scaling.items()}, **fields}
    return {f"mistral3.{key}": value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("rope", [MINISTRAL_3, DEVSTRAL_2, MEDIUM])
def test_a_conversion_agrees_with_both_configurations(rope: dict[str, Any]) -> None:
    config, params = next(
        pair for pair in RELEASES.values() if pair[0].get("text_config", {}).get("rope_parameters") == rope
    )
    stored = facts_of_gguf(converted(rope), "mistral3")
    assert not list(contradictions(stored, facts_of_config(config)))
    assert not list(contradictions(stored, facts_of_params(params)))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (
            {"rope.scaling.yarn_log_multiplier": 0.0},
            "log_multiplier is 0: cosine and sine are multiplied by 1.277",
        ),
        ({"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is missing: cosine and sine"),
        ({"attention.temperature_scale": None}, "mistral3.attention.temperature_scale is missing"),
        ({"attention.temperature_length": 8192}, "mistral3.attention.temperature_length is 8192"),
        ({"rope.scaling.type": None}, "mistral3.rope.scaling.type is missing"),
        ({"rope.scaling.factor": None}, "mistral3.rope.scaling.factor is missing"),
        ({"rope.scaling.yarn_beta_fast": 8.0}, "mistral3.rope.scaling.yarn_beta_fast is 8"),
        ({"attention.sliding_window": 4096}, "mistral3.attention.sliding_window is 4096"),
        # what readers make of a factor of their own is not known
        ({"rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_log_multiplier": 0.0}, ""),
    ],
)
def test_a_field_of_another_value_is_one_difference(fields: dict[str, Any], found: str) -> None:
    config, _ = RELEASES["ministral-3-3b"]
    stored = facts_of_gguf(converted(MINISTRAL_3, **fields), "mistral3")
    differ = [one.as_found for one, _ in contradictions(stored, facts_of_config(config))]
    assert len(differ) == bool(found)
    assert all(found in one for one in differ)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), "4", [4], {"a": 4}, True, 0, -1.0])
def test_no_value_of_a_file_ends_the_comparison(value: Any) -> None:
    config, params = RELEASES["ministral-3-3b"]
    text = config["text_config"]
    broken_rope = {key: value for key in text["rope_parameters"] if key != "rope_type"}
    broken = dict.fromkeys((*SMALL["config"], "sliding_window", "model_type", "tie_word_embeddings"), value)
    for rope in (value, {**text["rope_parameters"], **broken_rope}, {"rope_type": value}):
        for spelling in ("rope_parameters", "rope_scaling"):
            one = {**config, "text_config": {**text, **broken, spelling: rope}}
            yarn = dict.fromkeys(params["yarn"], value)
            two = {**dict.fromkeys(params, value), "sliding_window": [value, None], "yarn": yarn}
            for other in (params, two, {"yarn": value, "llama_4_scaling": value, "moe": value}):
                places = Place.of("config.json"), Place.of("params.json")
                assert all(str(finding) for finding in configuration_findings(one, places[0], other, places[1]))
            fields = {key: value for key in converted(MINISTRAL_3) if not key.endswith("type")}
            stored = facts_of_gguf({**converted(MINISTRAL_3), **fields}, "mistral3")
            assert all(found.as_found for found, _ in contradictions(stored, facts_of_config(one)))


def test_the_effect_of_a_value_is_named_after_it() -> None:
    plain = Stated(8, "head_dim")
    assert (plain.as_found, plain.as_expected("config.json")) == ("head_dim is 8", "8, head_dim of config.json")
    scaled = Stated(2.0, "yarn.apply_scale", "true", "cosine and sine are multiplied by 2")
    assert scaled.as_found == f"yarn.apply_scale is true: {scaled.effect}"
    assert scaled.as_expected("params.json") == f"true, yarn.apply_scale of params.json: {scaled.effect}"


def test_the_older_spelling_states_the_same() -> None:
    new, _ = RELEASES["ministral-3-3b"]
    text = dict(new["text_config"])
    rope = text.pop("rope_parameters")
    theta = rope["rope_theta"]
    old = {**new, "text_config": {**text, "rope_theta": theta, "rope_scaling": {**rope, "rope_theta": None}}}
    values = [{title: one.value for title, one in facts_of_config(config).items()} for config in (new, old)]
    assert values[0] == values[1]


def test_two_spellings_conflict_only_in_the_values_that_differ() -> None:
    config = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": {"type": "yarn", "factor": 8.0}}
    [(new, old)] = spelling_conflicts(config)
    assert (new.as_found, old.as_found) == ("rope_parameters.factor is 4", "rope_scaling.factor is 8")
    assert not list(spelling_conflicts({"rope_scaling": {"factor": 8.0}, "rope_parameters": None}))


PLAIN = {"rope_theta": 1e6, "rope_type": "default"}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "values", "key"),
    [
        ({"rope_theta": 1e6}, PLAIN, ""),
        ({"rope_theta": 1e6, "rope_scaling": None}, PLAIN, ""),
        ({"rope_parameters": PLAIN}, PLAIN, "rope_parameters"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}, YARN, "rope_scaling"),
        ({"text_config": {"rope_parameters": YARN}}, YARN, "rope_parameters"),
        ({"rope_scaling": YARN, "rope_parameters": PLAIN}, YARN, "rope_scaling"),
    ],
)
def test_each_spelling_of_a_rotary_embedding_has_one_form(
    config: dict[str, Any], values: dict[str, Any], key: str
) -> None:
    facts = ModelFacts(config)
    assert (facts.rope_values, facts.rope_key) == (values, key)


@pytest.mark.parametrize("rope", [{"rope_theta": 1e6, "rope_scaling": None}, {"rope_scaling": YARN}])
def test_transformers_makes_the_same_rotary_embedding(rope: dict[str, Any]) -> None:
    from transformers import MistralConfig

    loaded = ModelFacts(MistralConfig(**SMALL["config"], **rope)).rope_values
    assert {key: loaded[key] for key in ModelFacts(rope).rope_values} == ModelFacts(rope).rope_values


def test_a_rotary_embedding_for_each_type_of_layers_is_no_single_one() -> None:
    facts = ModelFacts({"rope_parameters": {"full_attention": PLAIN, "sliding_attention": YARN}})
    assert facts.ropes == [PLAIN, YARN]
    assert (facts.rope, facts.rope_key, facts.rope_type) == ({}, "", None)


def test_a_wrapper_s_facts_are_those_of_its_text_model() -> None:
    fp8 = {"quant_method": "fp8"}
    text = {"vocab_size": 10, "num_attention_heads": 4, "torch_dtype": "float16", "tie_word_embeddings": True}
    facts = ModelFacts({"vocab_size": 20, "quantization_config": fp8, "text_config": text})
    assert (facts.is_wrapped, facts.vocabulary, facts.kv_heads, facts.dtype) == (True, 10, 4, "float16")
    assert facts.ties == {"text_config.tie_word_embeddings": True}
    assert facts.is_fp8
    assert not facts.is_packed
    assert ModelFacts({"quantization_config": {}}).is_packed
