"""Faults planted in vLLM itself, or in a relay before it: each is found, with its cause or the reason for none.

One server has all adapters, another has every wrong option, and a third serves the same probe as it is exported: a
start takes a minute. `tox run -e serving-vllm` has the environment.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_server import Relay
from fault_lab import Check, check_of, learn
from litellm_python import litellm_before, needs_litellm
from local_server import serving
from planted_faults import (
    BUSY,
    LEARNED,
    OF_VLLM,
    Ask,
    Gateway,
    assert_found,
    found_rules,
    loaded,
    or_default,
    stripped,
    with_last_message,
    with_limit,
    with_stop,
    with_system_prompt,
    without_tools,
)
from safetensors.torch import load_file, save_file
from test_server_export import write_base
from vllm_python import needs_vllm, serve_by_vllm

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.field.servers.vllm.server import VLLM
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.records.secrets import SERVER_KEY
from pytest_mistral_lora.training.export import servers
from pytest_mistral_lora.training.export.servers import PROBE_MODEL, ServerFiles, export_for_server
from pytest_mistral_lora.training.generate.model_spec import record_rows

pytestmark = [pytest.mark.vllm, needs_vllm]

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Lab:
    """A base, an adapter that knows rows by heart, its transcripts, and adapters that differ from it.

    Attributes:
        folder: Where they are.
        oracle: The tokenizer.
    """

    folder: Path
    oracle: Oracle

    def adapter(self, name: str, weights: Callable[[Tensors], Tensors] = lambda found: found, **config: Any) -> Path:
        """Write an adapter with other weights or another configuration, and return its folder."""
        copy = self.folder / name
        copy.mkdir()
        found = weights(load_file(self.folder / "adapter" / "adapter_model.safetensors"))
        save_file({key: one.contiguous() for key, one in found.items()}, copy / "adapter_model.safetensors")
        of_trained = json.loads((self.folder / "adapter" / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**of_trained, **config}))
        return copy


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    harness = TrainerHarness(folder, folder, "cpu")
    write_base(harness.base, "derived-v13-thinking")
    learn(harness, folder)
    return Lab(folder, Oracle(harness.base / "tekken.json"))


def scaled(tensors: Tensors) -> Tensors:
    return {key: one * 0.6 if "lora_B" in key else one for key, one in tensors.items()}


def cut(tensors: Tensors) -> Tensors:
    """Keep the first half of the rank."""
    return {
        key: one[: len(one) // 2] if "lora_A" in key else one[:, : one.shape[1] // 2] for key, one in tensors.items()
    }


def drawn(tensors: Tensors) -> Tensors:
    made = torch.Generator().manual_seed(3)
    return {key: torch.randn(one.shape, generator=made) * 0.05 for key, one in tensors.items()}


@pytest.fixture(scope="module")
def sound(lab: Lab) -> Iterator[str]:
    """The server of the exported script, with the other adapters beside the exported one."""
    export_for_server(lab.folder / "adapter", VLLM.load_exporter(), lab.folder / "to", name="tuned")
    trained = json.loads((lab.folder / "adapter" / "adapter_config.json").read_text())
    adapters = {
        "tuned": lab.folder / "adapter",
        "stale": lab.adapter("stale", scaled),
        "alpha": lab.adapter("alpha", lora_alpha=trained["lora_alpha"] / 2),
        "rank": lab.adapter("rank", cut, r=trained["r"] // 2, lora_alpha=trained["lora_alpha"] / 2),
        "other": lab.adapter("other", drawn),
    }
    loaded = [f"{name}={folder}" for name, folder in adapters.items()]
    with serve_by_vllm(lab.folder / "to" / "serve.sh", "--lora-modules", *loaded) as url:
        yield url


@pytest.fixture
def check(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Check:
    return check_of(lab.folder, lab.oracle.path, "vllm:fp32", capsys)


def test_a_healthy_server_of_two_adapters_is_green_by_its_own_rows_and_the_packaged_ones(
    sound: str, lab: Lab, check: Check
) -> None:
    for is_own in (True, False):
        code, out = check(sound, "--model", "tuned", rows=is_own)
        assert (code, found_rules(out)) == (0, []), out
        assert out.count(f"{len(LEARNED)} exact of {len(LEARNED)}") == 2, out
    other = lab.folder / "answers-of-other"
    rows = list(read_rows(lab.folder / "rows.jsonl"))
    record_rows(lab.folder / "other", rows, other, lab.folder / "base", max_new_tokens=8, device="cpu")
    named = (f"--adapter=tuned={lab.folder / 'answers'}", f"--adapter=other={other}")
    code, out = check(sound, *named, golden=False)
    assert (code, found_rules(out)) == (0, []), out
    assert "2 of 2 names answer as their own adapter" in out


MODELS = {
    "vllm-base-for-adapter": ["--model", "base"],
    "vllm-no-name-of-several": [],
    "vllm-wrong-name": ["--model", "trained"],
    "vllm-stale-adapter": ["--model", "stale"],
    "vllm-alpha-halved": ["--model", "alpha"],
    "vllm-rank-cut": ["--model", "rank"],
    "vllm-other-adapter": ["--model", "other"],
}
"""What is asked of the server in place of its adapter."""


@pytest.mark.parametrize("name", MODELS)
def test_another_model_under_a_name_is_found(name: str, sound: str, lab: Lab, check: Check) -> None:
    words = MODELS[name]
    if name == "vllm-other-adapter":
        answers = lab.folder / "answers"
        words = ["--adapter", f"tuned={answers}", "--adapter", f"other={answers}"]
    code, out = check(sound, *words, golden=name != "vllm-other-adapter")
    assert_only_found(name, code, out)


@dataclass
class OneAdapter(Relay):
    """A relay that lists the base and one adapter."""

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the answer of the server, without the names of the other adapters."""
        status, answer = super().respond(path, data)
        if path == "/v1/models":
            answer = {**answer, "data": [model for model in answer["data"] if model["id"] in ("base", "tuned")]}
        return status, answer


def test_the_one_adapter_is_asked_without_its_name(sound: str, lab: Lab, check: Check) -> None:
    with serving(OneAdapter(lab.oracle, upstream=sound, seconds=600)) as url:
        code, out = check(url)
    assert_only_found("vllm-no-name", code, out)
    assert "model tuned" in out, out


def assert_only_found(name: str, code: int, out: str) -> None:
    """Assert that a planted fault is found by its rules, and by no other."""
    rules = OF_VLLM[name].rules
    assert (code, found_rules(out)) == (bool(rules), sorted(rules)), out
    assert_found(name, out)


GATEWAYS: dict[str, Ask] = {
    "vllm-gateway-system-prompt": with_system_prompt,
    "vllm-gateway-last-message": with_last_message,
    "vllm-gateway-no-tools": without_tools,
    "vllm-gateway-strips": stripped,
    "vllm-gateway-limit": with_limit,
    "vllm-gateway-temperature": lambda request: {**request, "temperature": 2},
    "vllm-gateway-wrong-temperature": lambda request: {**request, "temperature": 9},
    "vllm-gateway-cut-prompt": lambda request: {**request, "truncate_prompt_tokens": 24},
    "vllm-gateway-stop": with_stop,
    "vllm-gateway-penalty": lambda request: {**request, "repetition_penalty": 20.0},
    "vllm-gateway-special-tokens": lambda request: {**request, "skip_special_tokens": False},
    "vllm-gateway-default-penalty": or_default("repetition_penalty", 20.0),
}


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_before_vllm_is_found(name: str, sound: str, lab: Lab, check: Check) -> None:
    with serving(Relay(lab.oracle, upstream=sound, asks=GATEWAYS[name], seconds=600)) as url:
        code, out = check(url, "--model", "tuned")
    assert_only_found(name, code, out)


def test_a_base_path_a_busy_gateway_and_a_load_are_no_finding(sound: str, lab: Lab, check: Check) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, prefix="/llm/mistral", seconds=600)) as url:
        code, out = check(f"{url}/llm/mistral/v1", "--model", "tuned")
    assert (code, found_rules(out)) == (0, []), out
    gateway = Gateway(
        lab.oracle,
        upstream=sound,
        refused=lambda number, path: BUSY if number % 3 else None,
        headers={"Retry-After": "0.01"},
        seconds=600,
    )
    with serving(gateway) as url:
        code, out = check(url, "--model", "tuned", "--at-once", "1")
    assert (code, found_rules(out)) == (0, []), out
    with loaded(sound, 20, model="tuned"):
        code, out = check(sound, "--model", "tuned")
    assert (code, found_rules(out)) == (0, []), out


@needs_litellm
def test_litellm_before_vllm_is_no_finding(
    sound: str, lab: Lab, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: f"hosted_vllm/{name}" for name in ("tuned", "other")}
    monkeypatch.setenv(SERVER_KEY, "sk-sesame")
    with litellm_before(sound, models, tmp_path, key="sk-sesame") as url:
        for kind in ("vllm@0.32.0:fp32", "openai:fp32"):
            for rows in (True, False):
                code, out = check(url, "--model", "tuned", kind=kind, rows=rows)
                assert (code, found_rules(out)) == (0, []), out
                assert f"{len(LEARNED)} exact of {len(LEARNED)}" in out, out


SAID = ("plain", "call", "thinking")
FEW = tuple(answer for answer in known_answers() if answer.name in SAID)


@pytest.fixture(scope="module")
def probe(lab: Lab) -> ServerFiles:
    """The export of a probe that says a few known answers."""
    with pytest.MonkeyPatch.context() as patch:
        # all of them take minutes
        patch.setattr(servers, "known_answers", lambda: FEW)
        return export_for_server(lab.folder / "base", VLLM.load_exporter(), lab.folder / "probe", is_probe=True)


def report_on_answers(address: str, lab: Lab) -> str:
    """Return the findings about the answers that the probe says, and the summary of these answers."""
    judge = Target("own", lab.oracle.path)
    target = ServerTarget(
        "served", judge=judge, kind="vllm", url=address, precision="fp32", asks_answers=True, given_answers=FEW
    )
    results = [judge() for judge in AnswerChecks(target).cases().values()]
    findings = tuple(finding for result in results for finding in result.findings)
    summary = [f"{name} {text}" for result in results for name, text in result.facts]
    return "\n".join([*(finding.text() for finding in target.in_words(findings)), *summary])


def test_a_healthy_probe_behind_a_key_gives_its_answers_to_a_client(
    lab: Lab, probe: ServerFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_KEY, "sesame-1234")
    with serve_by_vllm(probe.folder / "serve.sh", "--api-key", "sesame-1234") as url:
        out = report_on_answers(url, lab)
    assert found_rules(out) == [], out
    assert "3 of 3 arrive whole as generated, 3 of 3 as a stream; 3 generated by a probe" in out, out


@pytest.fixture(scope="module")
def reports(lab: Lab, probe: ServerFiles) -> Mapping[str, str]:
    """What is reported of the probe with each option wrong, by what is asked: `prompts` or `answers`."""
    model = shutil.copytree(lab.folder / "base", lab.folder / "wrong")
    for file in (probe.folder / PROBE_MODEL).iterdir():
        shutil.copy(file, model)
    settings = {"temperature": 0.7, "repetition_penalty": 20.0}
    (model / "generation_config.json").write_text(json.dumps(settings))
    options = ["--model", str(model), "--generation-config", str(model), "--max-model-len", "256"]
    options += ["--tokenizer-mode", "hf", "--tool-call-parser", "hermes"]
    prompts = io.StringIO()
    with serve_by_vllm(probe.folder / "serve.sh", *options, without=["--reasoning-parser"]) as url:
        with contextlib.redirect_stdout(prompts):
            assert main(["serve-check", f"vllm:fp32={url}", "--tokenizer", str(lab.oracle.path)]) == 1
        return {"prompts": prompts.getvalue(), "answers": report_on_answers(url, lab)}


FLAGS = {
    "vllm-mode-hf": "prompts",
    "vllm-small-context": "prompts",
    "vllm-parser-of-another-model": "answers",
    "vllm-no-reasoning-parser": "answers",
    "vllm-penalty-of-the-folder": "answers",
}


@pytest.mark.parametrize("name", FLAGS)
def test_wrong_flags_are_found(name: str, reports: Mapping[str, str]) -> None:
    asked = FLAGS[name]
    assert_found(name, reports[asked])
    # and no other cause
    of_all = frozenset[str]().union(*(OF_VLLM[other].rules for other in FLAGS if FLAGS[other] == asked))
    assert set(found_rules(reports[asked])) == of_all, reports[asked]
