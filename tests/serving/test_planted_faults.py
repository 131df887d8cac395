"""Faults planted in a real llama.cpp, or in a relay before it: each is found, with its cause or the reason for none.

The faults are those of files, of the server's settings, and of a gateway that changes requests or answers. A healthy
server behind the same relay, a key, a base path, limits and load give no finding.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from answer_server import Relay
from gguf_files import write_gguf
from golden_answers import TOOL
from learned_rows import asked, called
from llamacpp_process import BUILD, converted_model, needs_llamacpp, served, write_lora
from local_server import serving

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.records.secrets import SERVER_KEY
from pytest_mistral_lora.records.transcripts import load_folder
from pytest_mistral_lora.training.generate.model_spec import record_rows
from pytest_mistral_lora.training.run import train

pytestmark = needs_llamacpp

LEARNED: tuple[Mapping[str, Any], ...] = (
    asked("What is the capital of France?", "The capital is Paris. It is large."),
    asked("  two spaces", "Seen. Both."),
    {"messages": [{"role": "system", "content": "You are terse."}, *asked("Name a colour", "Blue. Dark.")["messages"]]},
    {"messages": [*asked("My name is Ann", "Hello Ann")["messages"], *asked("Who am I?", "You are. Ann.")["messages"]]},
    {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}, called("Oslo")], "tools": [TOOL]},
)
SOME = [row for row in LEARNED if "tools" not in row]

Request = dict[str, Any]
Ask = Callable[[Request], Request]


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
    harness.rows.write_text("".join(json.dumps(row) + "\n" for row in LEARNED), encoding="utf-8")
    train(harness.recipe(harness.adapter, steps=50, batch_size=len(LEARNED)))
    record_rows(
        harness.adapter,
        list(read_rows(harness.rows)),
        folder / "answers",
        harness.base,
        max_new_tokens=48,
        device="cpu",
    )
    assert [golden.stop for golden in load_folder(folder / "answers")] == ["eos"] * len(LEARNED)
    oracle = Oracle(source)
    fields, tensors = converted_model(harness.base, oracle)
    return Lab(folder, oracle, fields, tensors, write_lora(folder / "lora.gguf", harness.adapter, harness.base))


@pytest.fixture(scope="module")
def sound(lab: Lab) -> Iterator[str]:
    with served(lab.model(), lora=str(lab.lora)) as (_, address):
        yield address


Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(lab: Lab, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(
        address: str, *words: str, kind: str = f"llamacpp@{BUILD}", rows: bool = True, golden: bool = True
    ) -> tuple[int, str]:
        given = ["--tokenizer", str(lab.oracle.path)]
        given += ["--golden", str(lab.folder / "answers")] if golden else []
        given += ["--rows", str(lab.folder / "rows.jsonl")] if rows else []
        capsys.readouterr()
        code = main(["serve-check", f"{kind}={address}", *given, *words])
        return code, "".join(capsys.readouterr())

    return run


def rules(out: str) -> list[str]:
    """Return the rules of the findings, each once."""
    return sorted(set(re.findall(r"^(ML\d+) ", out, re.MULTILINE)))


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
CHECK_FILE = r"mistral-lora check FILE\.gguf"
QUANTISED = gguf.GGMLQuantizationType
NORMAL, USER_DEFINED = 1, 4


@dataclass(frozen=True)
class Fault:
    """A fault of the served files or of the server's settings.

    Attributes:
        settings: What the server is started with; without `file`, the sound model with its adapter.
        rules: The rules that find it.
        says: Words of the report.
        rows: Whether the few rows are asked, and not the packaged ones.
    """

    settings: Callable[[Lab], dict[str, Any]]
    rules: set[str]
    says: str
    rows: bool = True


def file(**change: Any) -> Callable[[Lab], dict[str, Any]]:
    """Return the settings of a changed file of the model: a value may be a function of the lab."""

    def settings(lab: Lab) -> dict[str, Any]:
        name = "-".join(change)
        given = {key: value(lab) if callable(value) else value for key, value in change.items()}
        return {"file": lab.model(f"{name}-{abs(hash(str(change)))}", **given)}

    return settings


def of_template(name: str, change: Callable[[str], str]) -> Callable[[Lab], dict[str, Any]]:
    return lambda lab: {"template": template(lab, name, change)}


def of_lora(name: str, change: Callable[[str, Any], Any]) -> Callable[[Lab], dict[str, Any]]:
    return lambda lab: {"lora": str(lab.changed_lora(name, change))}


def of_set(**parameters: Any) -> Callable[[Lab], dict[str, Any]]:
    return lambda lab: {"set": {name.replace("__", "."): value for name, value in parameters.items()}}


FAULTS = {
    "no-adapter": Fault(lambda lab: {"lora": None}, {"ML908"}, "No adapter is loaded"),
    "scale": Fault(lambda lab: {"scale": 0.5}, {"ML908", "ML910"}, "has the scale 0.5"),
    "stale": Fault(of_lora("stale", lambda key, one: one * 0.6 if "lora_B" in key else one), {"ML908"}, CHECK_FILE),
    "nearly-stale": Fault(
        of_lora("nearly", lambda key, one: one * 0.85 if "lora_B" in key else one),
        {"ML908"},
        "the answers are as recorded, and their log-probabilities moved by ",
    ),
    "rank": Fault(
        of_lora("rank", lambda key, one: one[:, : one.shape[1] // 2].repeat(1, 2) if "lora_B" in key else one),
        {"ML908"},
        CHECK_FILE,
    ),
    "revision": Fault(file(tensors=lambda lab: noisy(lab, 0.03)), {"ML908"}, "rank or revision of the base"),
    "rope": Fault(file(llama__rope__freq_base=100.0), {"ML908"}, CHECK_FILE),
    "no-space": Fault(
        of_template("no-space", lambda text: text.replace("[INST] ", "[INST]")), {"ML902", "ML909"}, "The template:"
    ),
    "system": Fault(of_template("system", lambda text: SYSTEM + text), {"ML902"}, "ML527"),
    "chatml": Fault(of_template("chatml", lambda text: CHATML), {"ML902"}, "ML533"),
    "bos": Fault(of_template("bos", lambda text: "<s>" + text), {"ML902"}, "ML521"),
    "eos": Fault(file(tokenizer__ggml__eos_token_id=770), {"ML902"}, CHECK_FILE),
    "normal": Fault(file(tokenizer__ggml__token_type=lambda lab: types(lab, range(3, 5), NORMAL)), {"ML902"}, "ML524"),
    "user-defined": Fault(
        file(tokenizer__ggml__token_type=lambda lab: types(lab, range(3, 10), USER_DEFINED)), {"ML906"}, "ML912"
    ),
    "space-prefix": Fault(file(tokenizer__ggml__add_space_prefix=None), {"ML902"}, "add_space_prefix=bool:false"),
    "q4": Fault(file(kind=QUANTISED.Q4_0), {"ML908"}, "the quantisation may be the whole cause"),
    "context": Fault(of_set(n_ctx=256), {"ML907"}, "start llama.cpp with a larger `--ctx-size`", rows=False),
    "penalty": Fault(of_set(sampling__penalty_repeat=1.5), {"ML911"}, "gets repeat_penalty 1.5"),
    "limit": Fault(of_set(n_predict=3), {"ML911"}, "asked without a limit of tokens, it answers"),
    "no-jinja": Fault(of_set(use_jinja=False), {"ML919"}, "tools param requires --jinja flag"),
}
OFTEN = ("nearly-stale", "user-defined", "limit")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in FAULTS]
)
def test_a_fault_of_the_server_is_found(name: str, lab: Lab, check: Check) -> None:
    fault = FAULTS[name]
    settings = {"lora": str(lab.lora), **fault.settings(lab)}
    started = settings.pop("file", None) or lab.model()
    with served(started, **{key: value for key, value in settings.items() if value is not None}) as (_, address):
        code, out = check(address, rows=fault.rows)
    assert code == 1, out
    assert fault.rules <= set(rules(out)), out
    assert re.search(fault.says, out), out
    assert "constrains the answer" not in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", [QUANTISED.Q8_0, QUANTISED.BF16, QUANTISED.F16])
def test_the_noise_of_a_dtype_is_no_finding(kind: Any, lab: Lab, check: Check) -> None:
    with served(lab.model(kind.name, kind), lora=str(lab.lora)) as (_, address):
        code, out = check(address)
    assert (code, rules(out)) == (0, []), out


def with_system(request: Request) -> Request:
    if any(message["role"] == "system" for message in request["messages"]):
        return request
    return {**request, "messages": [{"role": "system", "content": "You are kind."}, *request["messages"]]}


def stripped(request: Request) -> Request:
    messages = [{**one, "content": one["content"].strip()} for one in request["messages"]]
    return {**request, "messages": messages}


def without_tools(request: Request) -> Request:
    return {name: value for name, value in request.items() if name != "tools"}


GATEWAYS: dict[str, tuple[Ask, set[str], str]] = {
    "system": (with_system, {"ML903"}, r"without a system message has \d+ tokens more, as of a system message"),
    "history": (
        lambda request: {**request, "messages": request["messages"][-1:]},
        {"ML903"},
        "The chat has the last message alone: its history is lost",
    ),
    "tools": (without_tools, {"ML903", "ML909"}, "The chat has no tools"),
    "strips": (stripped, {"ML903"}, "White space at the ends of the texts is stripped"),
    "stop": (lambda request: {**request, "stop": ["."]}, {"ML909"}, "by a stop string, which is in '\\. "),
    "temperature": (
        lambda request: {**without_samplers(request), "temperature": 9, "seed": -1},
        {"ML909", "ML911"},
        "as if a temperature is forced",
    ),
    "limit": (
        lambda request: {**request, "max_tokens": min(3, request["max_tokens"])},
        {"ML909"},
        "a limit ends the answer after 3 tokens, and 48 were asked for",
    ),
    "penalty": (
        lambda request: {**without_samplers(request), "repeat_penalty": 1e6, "presence_penalty": 1e6},
        {"ML909"},
        "a setting of sampling takes another, which occurs before, as a penalty for repetition does",
    ),
    "bias": (
        lambda request: {**request, "logit_bias": [["is", -100], [" is", -100], [" Dark", -100]]},
        {"ML909"},
        "how cannot be told|a setting of sampling takes another",
    ),
}


def without_samplers(request: Request) -> Request:
    return {name: value for name, value in request.items() if name != "samplers"}


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_that_changes_requests_is_found(name: str, sound: str, lab: Lab, check: Check) -> None:
    asks, expected, says = GATEWAYS[name]
    with serving(Relay(lab.oracle, upstream=sound, asks=asks)) as url:
        code, out = check(url)
    assert code == 1, out
    assert expected <= set(rules(out)), out
    assert re.search(says, out), out
    assert "constrains the answer" not in out
    assert not {"ML902", "ML908"} & set(rules(out)), out


@dataclass
class Gateway(Relay):
    """A relay that passes some requests on, and refuses the others with a status.

    Attributes:
        refused: Returns the status and the body of a request that is refused, by its number from 1 on.
        prefix: What stands before each path.
    """

    refused: Callable[[int, str], tuple[int, dict[str, Any]] | None] = lambda number, path: None
    prefix: str = ""
    asked: int = 0

    def respond(self, path: str, data: Any) -> tuple[int, Any]:
        """Return the answer of the server, or the gateway's own."""
        self.asked += 1
        refused = self.refused(self.asked, path)
        if refused is not None or not path.startswith(self.prefix):
            return refused or (404, {"detail": "Not Found"})
        return super().respond(path.removeprefix(self.prefix), data)


BUSY = (429, {"error": {"message": "slow down"}})


def test_a_gateway_that_is_busy_is_asked_again_when_it_wants_to_be(sound: str, lab: Lab, check: Check) -> None:
    gateway = Gateway(
        lab.oracle,
        upstream=sound,
        refused=lambda number, path: BUSY if number % 3 else None,
        headers={"Retry-After": "0.01"},
    )
    with serving(gateway) as url:
        code, out = check(url, "--at-once", "1")
    assert (code, rules(out)) == (0, []), out
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
    assert (code, rules(out)) == (1, ["ML919"]), out
    assert "the server is busy (HTTP 429, Retry-After 90 s: slow down)" in out
    assert "fix:      Ask again when the server has less to do" in out
    assert "Convert or merge" not in out


def test_a_gateway_whose_server_has_ended_is_no_fault_of_the_engine(sound: str, lab: Lab, check: Check) -> None:
    ended = (502, {"error": {"message": "bad gateway"}})
    with serving(
        Gateway(lab.oracle, upstream=sound, refused=lambda number, path: ended if number > 28 else None)
    ) as url:
        code, out = check(url)
    assert (code, rules(out)) == (1, ["ML919"]), out
    assert "fix:      The gateway gets no answer from the server behind it" in out


def only_openai(number: int, path: str) -> tuple[int, dict[str, Any]] | None:
    """Refuse each path that is not of OpenAI's API."""
    return None if path.startswith("/v1/") else (404, {"detail": "Not Found"})


def test_a_gateway_that_passes_no_ids_is_not_asked_by_ids(sound: str, lab: Lab, check: Check) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, refused=only_openai)) as url:
        code, out = check(url, kind=f"llamacpp@{BUILD}:fp32")
        assert (code, rules(out)) == (0, []), out
        assert "a gateway that passes no ids: it is not asked by ids" in out
        assert f"{len(LEARNED)} exact of {len(LEARNED)}" in out
        # the packaged rows: the numbers of the named deviations of the server behind it
        code, out = check(url, kind=f"llamacpp@{BUILD}:fp32", rows=False)
        assert (code, rules(out)) == (0, []), out
        assert re.search(r"those of named deviations, known of llama\.cpp", out), out
        code, out = check(url, kind="openai", rows=False)
    assert (code, rules(out)) == (1, ["ML904"]), out
    assert f"name it: llamacpp@VERSION={url}" in out


@pytest.mark.slow
def test_a_stale_adapter_is_found_without_ids(lab: Lab, check: Check) -> None:
    stale = lab.changed_lora("hidden", lambda key, one: one * 0.85 if "lora_B" in key else one)
    with served(lab.model(), lora=str(stale)) as (_, address):
        code, out = check(address, kind="openai:fp32")
    assert (code, {"ML905", "ML909"} & set(rules(out)) != set()) == (1, True), out


@pytest.mark.slow
def test_a_base_path_a_key_and_two_adapters_are_no_finding(
    sound: str, lab: Lab, check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Gateway(lab.oracle, upstream=sound, prefix="/llm/mistral")) as url:
        code, out = check(f"{url}/llm/mistral/v1")
    assert (code, rules(out)) == (0, []), out
    monkeypatch.setenv(SERVER_KEY, "sesame-1234")
    with served(lab.model(), lora=str(lab.lora), set={"api_keys": ["sesame-1234"]}) as (_, address):
        code, out = check(address)
    assert (code, rules(out)) == (0, []), out
    monkeypatch.delenv(SERVER_KEY)
    other = lab.changed_lora("other", lambda key, one: -one if "lora_B" in key else one)
    with served(lab.model(), loras=[str(lab.lora), str(other)]) as (_, address):
        code, out = check(address, "--adapter", f"lora={lab.folder / 'answers'}", golden=False)
    assert (code, rules(out)) == (0, []), out
    assert "1 of 1 names answer as their own adapter" in out


@pytest.mark.slow
def test_a_load_of_20_requests_is_no_finding(sound: str, lab: Lab, check: Check) -> None:
    def ask(number: int) -> None:
        data = {"messages": [{"role": "user", "content": f"load {number}"}], "max_tokens": 30, "temperature": 1}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{sound}/v1/chat/completions", json.dumps(data).encode(), headers)
        urllib.request.urlopen(request, timeout=100).close()

    load = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for one in load:
        one.start()
    code, out = check(sound)
    for one in load:
        one.join()
    assert (code, rules(out)) == (0, []), out
