"""Faults planted in a real llama.cpp, or in a relay before it: each is found, with its cause or the reason for none.

The faults are those of files, of the server's settings, and of a gateway that changes requests or answers. A healthy
server behind the same relay, a key, a base path, limits and load give no finding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from answer_server import Relay
from fault_lab import Check, check_of, learn
from gguf_files import write_gguf
from litellm_python import litellm_before, needs_litellm
from llamacpp_process import BUILD, converted_model, needs_llamacpp, served, write_lora
from local_server import serving
from planted_faults import (
    BUSY,
    LEARNED,
    OF_GATEWAYS,
    Ask,
    Gateway,
    Request,
    assert_found,
    found_rules,
    loaded,
    only_openai,
    or_default,
    stripped,
    with_last_message,
    with_limit,
    with_stop,
    with_system_prompt,
    without_tools,
)
from sampling import sampled

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.records.secrets import SERVER_KEY

pytestmark = needs_llamacpp


@dataclass
class Lab:
    """A base, an adapter that knows rows by heart, their transcripts, and the parts of its GGUF files.

    Attributes:
        folder: Where its files are.
        oracle: Its tokenizer.
        fields: The fields of the model's file.
        tensors: The tensors of the model's file.
        lora: The file of the adapter.
    """

    folder: Path
    oracle: Oracle
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]
    lora: Path
    files: dict[str, Path] = field(default_factory=dict)

    def model(self, name: str = "sound", kind: Any = gguf.GGMLQuantizationType.F32, **changed: Any) -> Path:
        """Return the file of the model with other fields, or with other tensors (`tensors`)."""
        if name not in self.files:
            tensors = changed.pop("tensors", self.tensors)
            fields = {**self.fields, **{key.replace("__", "."): value for key, value in changed.items()}}
            self.files[name] = write_gguf(self.folder / f"{name}.gguf", fields, tensors, kind=kind)
        return self.files[name]

    def changed_lora(self, name: str, change: Callable[[str, Any], Any]) -> Path:
        """Return the file of the adapter with changed tensors."""
        from safetensors.torch import load_file, save_file

        copy = self.folder / name
        copy.mkdir(exist_ok=True)
        weights = load_file(self.folder / "adapter" / "adapter_model.safetensors")
        save_file(
            {key: change(key, one).contiguous() for key, one in weights.items()}, copy / "adapter_model.safetensors"
        )
        (copy / "adapter_config.json").write_text((self.folder / "adapter" / "adapter_config.json").read_text())
        return write_lora(copy / f"{name}.gguf", copy, self.folder / "base")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    harness, source = TrainerHarness(folder, folder, "cpu"), shipped_tokenizer("spm-v3")
    write_tiny_base(harness.base, source)
    learn(harness, folder)
    oracle = Oracle(source)
    fields, tensors = converted_model(harness.base, oracle)
    return Lab(folder, oracle, fields, tensors, write_lora(folder / "lora.gguf", harness.adapter, harness.base))


@pytest.fixture(scope="module")
def sound(lab: Lab) -> Iterator[str]:
    with served(lab.model(), lora=str(lab.lora)) as (_, address):
        yield address


@pytest.fixture
def check(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Check:
    return check_of(lab.folder, lab.oracle.path, f"llamacpp@{BUILD}", capsys)


def test_a_healthy_server_is_green_beside_its_numbers(sound: str, check: Check) -> None:
    code, out = check(sound)
    assert (code, out.count(f"{len(LEARNED)} exact of {len(LEARNED)}")) == (0, 2), out
    assert "fp32 explains 0.1 and 0.01" in out
    assert re.search(r"defaults of .* temperature 0.8, top_k 40, top_p 0.95, min_p 0.05, n_ctx 1024", out), out


def noisy(lab: Lab, share: float) -> dict[str, Any]:
    """Return the tensors with noise of a share of their spread, as those of another revision of the base."""
    drawn = np.random.default_rng(0)
    return {
        name: (one + drawn.normal(0, share * one.std(), one.shape)).astype(one.dtype) if one.ndim == 2 else one
        for name, one in lab.tensors.items()
    }


def template(lab: Lab, name: str, change: Callable[[str], str]) -> str:
    """Return the file of a changed chat template."""
    file = lab.folder / f"{name}.jinja"
    file.write_text(change(lab.fields["tokenizer.chat_template"]))
    return str(file)


def types(lab: Lab, of: range, value: int) -> list[int]:
    """Return the types of the tokens, with another one for some."""
    return [value if token in of else one for token, one in enumerate(lab.fields["tokenizer.ggml.token_type"])]


SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', 'content': 'You are a helpful "
    "assistant.'}] + messages %}{%- endif %}"
)
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') + '<|im_end|>\\n'}}"
    "{% endfor %}{{'<|im_start|>assistant\\n'}}"
)
QUANTISED = gguf.GGMLQuantizationType
NOISE = {"q8": QUANTISED.Q8_0, "bf16": QUANTISED.BF16, "f16": QUANTISED.F16}
NORMAL, USER_DEFINED = 1, 4


Settings = Callable[[Lab], dict[str, Any]]


def file(**change: Any) -> Settings:
    """Return the settings of a changed file of the model: a value may be a function of the lab."""

    def settings(lab: Lab) -> dict[str, Any]:
        name = "-".join(change)
        given = {key: value(lab) if callable(value) else value for key, value in change.items()}
        return {"file": lab.model(f"{name}-{abs(hash(str(change)))}", **given)}

    return settings


def of_template(name: str, change: Callable[[str], str]) -> Settings:
    return lambda lab: {"template": template(lab, name, change)}


def of_lora(name: str, change: Callable[[str, Any], Any]) -> Settings:
    return lambda lab: {"lora": str(lab.changed_lora(name, change))}


def of_set(**parameters: Any) -> Settings:
    return lambda lab: {"set": {name.replace("__", "."): value for name, value in parameters.items()}}


FAULTS: dict[str, Settings] = {
    "no-adapter": lambda lab: {"lora": None},
    "scale-half": lambda lab: {"scale": 0.5},
    "stale-adapter": of_lora("stale", lambda key, one: one * 0.6 if "lora_B" in key else one),
    "nearly-stale-adapter": of_lora("nearly", lambda key, one: one * 0.85 if "lora_B" in key else one),
    "rank-cut": of_lora("rank", lambda key, one: one[:, : one.shape[1] // 2].repeat(1, 2) if "lora_B" in key else one),
    "other-revision": file(tensors=lambda lab: noisy(lab, 0.03)),
    "rope-base": file(llama__rope__freq_base=100.0),
    "template-no-space": of_template("no-space", lambda text: text.replace("[INST] ", "[INST]")),
    "template-system-prompt": of_template("system", lambda text: SYSTEM + text),
    "template-chatml": of_template("chatml", lambda text: CHATML),
    "template-bos-twice": of_template("bos", lambda text: "<s>" + text),
    "gguf-other-eos": file(tokenizer__ggml__eos_token_id=770),
    "gguf-markers-normal": file(tokenizer__ggml__token_type=lambda lab: types(lab, range(3, 5), NORMAL)),
    "gguf-markers-user-defined": file(tokenizer__ggml__token_type=lambda lab: types(lab, range(3, 10), USER_DEFINED)),
    "gguf-space-prefix": file(tokenizer__ggml__add_space_prefix=None),
    "q4": file(kind=QUANTISED.Q4_0),
    "small-context": of_set(n_ctx=256),
    "penalty-by-default": of_set(sampling__penalty_repeat=1.5),
    "strong-penalty-by-default": of_set(sampling__penalty_repeat=3.0),
    "limit-by-default": of_set(n_predict=3),
    "no-jinja": of_set(use_jinja=False),
}
"""The faults of the served files and of the server's settings: without `file`, it has the sound model's."""
OFTEN = ("nearly-stale-adapter",)
PACKAGED = ("small-context",)
"""The faults that only longer prompts show: the packaged rows."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_of_the_server_is_found(name: str, lab: Lab, check: Check) -> None:
    settings = {"lora": str(lab.lora), **FAULTS[name](lab)}
    started = settings.pop("file", None) or lab.model()
    with served(started, **{key: value for key, value in settings.items() if value is not None}) as (_, address):
        code, out = check(address, rows=name not in PACKAGED)
    assert code == 1, out
    assert_found(name, out)


@pytest.mark.slow
def test_a_file_without_the_id_of_eos_is_served_right(
    lab: Lab, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    started = lab.model("no-eos", tokenizer__ggml__eos_token_id=None)
    with served(started, lora=str(lab.lora)) as (_, address):
        code, out = check(address)
    assert (code, found_rules(out)) == (0, []), out
    # llama.cpp takes the id that it has for such a vocabulary, which is that of this one
    code = main(["check", str(started), "--tokenizer", str(lab.oracle.path)])
    out = "".join(capsys.readouterr())
    assert (code, found_rules(out)) == (0, []), out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q8", "bf16", "f16"])
def test_the_noise_of_a_dtype_is_no_finding(kind: str, lab: Lab, check: Check) -> None:
    with served(lab.model(kind, NOISE[kind]), lora=str(lab.lora)) as (_, address):
        code, out = check(address)
    assert (code, found_rules(out)) == (0, []), out


def without_samplers(request: Request) -> Request:
    return {name: value for name, value in request.items() if name != "samplers"}


GATEWAYS: dict[str, Ask] = {
    "gateway-system-prompt": with_system_prompt,
    "gateway-last-message": with_last_message,
    "gateway-no-tools": without_tools,
    "gateway-strips": stripped,
    "gateway-stop": with_stop,
    "gateway-temperature": lambda request: {**without_samplers(request), "temperature": 9, "seed": -1},
    "gateway-limit": with_limit,
    "gateway-penalty": lambda request: {
        **without_samplers(request),
        "repeat_penalty": 1e6,
        "presence_penalty": 1e6,
    },
    "gateway-bias": lambda request: {**request, "logit_bias": [["is", -100], [" is", -100], [" Dark", -100]]},
}


@pytest.mark.parametrize("name", sampled(GATEWAYS, ("gateway-system-prompt", "gateway-temperature", "gateway-limit")))
def test_a_gateway_that_changes_requests_is_found(name: str, sound: str, lab: Lab, check: Check) -> None:
    with serving(Relay(lab.oracle, upstream=sound, asks=GATEWAYS[name])) as url:
        code, out = check(url)
    assert code == 1, out
    assert_found(name, out)
    assert not {"ML902", "ML908"} & set(found_rules(out)), out


DEFAULTS: dict[str, Ask] = {
    "gateway-default-temperature": or_default("temperature", 1.5),
    "gateway-default-penalty": or_default("repeat_penalty", 5.0),
    "gateway-default-limit": or_default("max_tokens", 3),
}


@pytest.mark.parametrize("name", sampled(DEFAULTS, ("gateway-default-penalty",)))
def test_a_gateway_that_sets_defaults_is_found_if_they_change_an_answer(
    name: str, sound: str, lab: Lab, check: Check
) -> None:
    with serving(Relay(lab.oracle, upstream=sound, asks=DEFAULTS[name])) as url:
        code, out = check(url)
    assert found_rules(out) == sorted(OF_GATEWAYS[name].rules), out
    assert code == bool(OF_GATEWAYS[name].rules), out
    assert_found(name, out)


def test_a_gateway_that_is_busy_is_asked_again_when_it_wants_to_be(sound: str, lab: Lab, check: Check) -> None:
    gateway = Gateway(
        lab.oracle,
        upstream=sound,
        refused=lambda number, path: BUSY if number % 3 else None,
        headers={"Retry-After": "0.01"},
    )
    with serving(gateway) as url:
        code, out = check(url, "--at-once", "1")
    assert (code, found_rules(out)) == (0, []), out
    assert gateway.asked > 3 * len(gateway.passed) - 3


def test_a_gateway_that_stays_busy_is_called_busy(sound: str, lab: Lab, check: Check) -> None:
    # the rows are answered, and then nothing any more
    gateway = Gateway(
        lab.oracle,
        upstream=sound,
        refused=lambda number, path: BUSY if number > 28 else None,
        headers={"Retry-After": "90"},
    )
    with serving(gateway) as url:
        code, out = check(url)
    assert (code, found_rules(out)) == (1, ["ML919"]), out
    assert_found("gateway-busy", out)
    assert "Retry-After 90 s: slow down)" in out
    assert "fix:      Ask again when the server has less to do" in out
    assert "Convert or merge" not in out


def test_a_gateway_whose_server_has_ended_is_no_fault_of_the_engine(sound: str, lab: Lab, check: Check) -> None:
    ended = (502, {"error": {"message": "bad gateway"}})
    with serving(
        Gateway(lab.oracle, upstream=sound, refused=lambda number, path: ended if number > 28 else None)
    ) as url:
        code, out = check(url)
    assert (code, found_rules(out)) == (1, ["ML919"]), out
    assert "fix:      The gateway gets no answer from the server behind it" in out


def test_a_gateway_that_passes_no_ids_is_not_asked_by_ids(sound: str, lab: Lab, check: Check) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, refused=only_openai)) as url:
        code, out = check(url, kind=f"llamacpp@{BUILD}:fp32")
        assert (code, found_rules(out)) == (0, []), out
        assert "a gateway that passes no ids: it is not asked by ids" in out
        assert f"{len(LEARNED)} exact of {len(LEARNED)}" in out


@pytest.mark.slow
def test_a_gateway_that_passes_no_ids_is_judged_by_the_deviations_of_the_server_behind_it(
    sound: str, lab: Lab, check: Check
) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, refused=only_openai)) as url:
        # the packaged rows: the numbers of the named deviations
        code, out = check(url, kind=f"llamacpp@{BUILD}:fp32", rows=False)
        assert (code, found_rules(out)) == (0, []), out
        assert re.search(r"those of named deviations, known of llama\.cpp", out), out
        code, out = check(url, kind="openai", rows=False)
    assert (code, found_rules(out)) == (1, ["ML904"]), out
    assert f"name it: llamacpp@VERSION={url}" in out


@pytest.mark.slow
def test_a_stale_adapter_is_found_without_ids(lab: Lab, check: Check) -> None:
    stale = lab.changed_lora("hidden", lambda key, one: one * 0.85 if "lora_B" in key else one)
    with served(lab.model(), lora=str(stale)) as (_, address):
        code, out = check(address, kind="openai:fp32")
    assert (code, {"ML905", "ML909"} & set(found_rules(out)) != set()) == (1, True), out


@pytest.mark.slow
def test_a_base_path_a_key_and_two_adapters_are_no_finding(
    sound: str, lab: Lab, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, prefix="/llm/mistral")) as url:
        code, out = check(f"{url}/llm/mistral/v1")
    assert (code, found_rules(out)) == (0, []), out
    monkeypatch.setenv(SERVER_KEY, "sesame-1234")
    with served(lab.model(), lora=str(lab.lora), set={"api_keys": ["sesame-1234"]}) as (_, address):
        code, out = check(address)
    assert (code, found_rules(out)) == (0, []), out
    monkeypatch.delenv(SERVER_KEY)
    other = lab.changed_lora("other", lambda key, one: -one if "lora_B" in key else one)
    with served(lab.model(), loras=[str(lab.lora), str(other)]) as (_, address):
        code, out = check(address, "--adapter", f"lora={lab.folder / 'answers'}", golden=False)
    assert (code, found_rules(out)) == (0, []), out
    assert "1 of 1 names answer as their own adapter" in out


@pytest.mark.slow
def test_a_load_of_20_requests_is_no_finding(sound: str, lab: Lab, check: Check) -> None:
    with loaded(sound, 20):
        code, out = check(sound)
    assert (code, found_rules(out)) == (0, []), out


@pytest.mark.slow
@needs_litellm
def test_litellm_before_llamacpp_is_no_finding(
    sound: str, lab: Lab, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_KEY, "sk-sesame")
    with litellm_before(sound, {"tuned": "openai/lora"}, tmp_path, key="sk-sesame", root="/llm") as url:
        for rows in (True, False):
            code, out = check(url, "--model", "tuned", kind=f"llamacpp@{BUILD}:fp32", rows=rows)
            assert (code, found_rules(out)) == (0, []), out
            assert "a gateway that passes no ids: it is not asked by ids" in out
            assert f"{len(LEARNED)} exact of {len(LEARNED)}" in out
        code, out = check(url, "--model", "tuned", kind="openai:fp32")
        assert (code, found_rules(out)) == (0, []), out
        with loaded(url, 20, key="sk-sesame", model="tuned"):
            code, out = check(url, "--model", "tuned", kind=f"llamacpp@{BUILD}:fp32")
    assert (code, found_rules(out)) == (0, []), out
