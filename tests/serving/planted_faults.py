"""The faults that tests plant in real servers, and in relays before them: which rules find each, and with what cause.

No fault may be green, and none may be reported with another cause. Where answers do not show the cause, the report
says that it cannot be told. What is harmless to a client has no rules: the same check passes.
`test_planted_faults_are_planted.py` fails if no test plants a fault of this table.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from answer_server import Relay
from golden_answers import TOOL
from learned_rows import asked, called

LEARNED: tuple[Mapping[str, Any], ...] = (
    asked("What is the capital of France?", "The capital is Paris. It is large."),
    asked("  two spaces", "Seen. Both."),
    {"messages": [{"role": "system", "content": "You are terse."}, *asked("Name a colour", "Blue. Dark.")["messages"]]},
    {"messages": [*asked("My name is Ann", "Hello Ann")["messages"], *asked("Who am I?", "You are. Ann.")["messages"]]},
    {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}, called("Oslo")], "tools": [TOOL]},
)
"""The rows that an adapter learns by heart before a fault is planted."""

Request = dict[str, Any]
Ask = Callable[[Request], Request]
"""Changes a chat request, as a gateway does."""

_CHECK_FILE = r"mistral-lora check FILE\.gguf"
_UNTOLD_WEIGHTS = "Which cannot be told, because answers show their sum alone"

_FILES = "test_planted_faults.test_a_fault_of_the_server_is_found"
_GATEWAYS = "test_planted_faults.test_a_gateway_that_changes_requests_is_found"
_DEFAULTS = "test_planted_faults.test_a_gateway_that_sets_defaults_is_found_if_they_change_an_answer"
_ANSWERS = "test_served_answers.test_what_a_relay_does_to_an_answer_has_one_cause"
_PARSERS = "test_served_answers.test_a_parser_that_is_switched_off_is_found"
_ADAPTERS = "test_faults_of_vllm.test_another_model_under_a_name_is_found"
_RELAYS = "test_faults_of_vllm.test_a_gateway_before_vllm_is_found"
_FLAGS = "test_faults_of_vllm.test_wrong_flags_are_found"


@dataclass(frozen=True)
class PlantedFault:
    """A fault that a test plants.

    Attributes:
        what: What is wrong.
        rules: The rules that find it; empty if a client gets what it should.
        says: A regular expression for the words of the report: the cause, or why it cannot be told.
        planted_by: The module and the function of the test.
    """

    what: str
    rules: frozenset[str]
    says: str
    planted_by: str


def _found(what: str, rules: str, says: str, planted_by: str) -> PlantedFault:
    return PlantedFault(what, frozenset(rules.split()), says, planted_by)


def _harmless(what: str, planted_by: str) -> PlantedFault:
    return PlantedFault(what, frozenset(), "", planted_by)


OF_LLAMACPP = {
    "no-adapter": _found("The adapter is not loaded.", "ML908", "No adapter is loaded", _FILES),
    "scale-half": _found("The adapter has the scale 0.5.", "ML908 ML910", r"has the scale 0\.5", _FILES),
    "stale-adapter": _found("An adapter of 0.6 times the size, as of last week.", "ML908", _CHECK_FILE, _FILES),
    "nearly-stale-adapter": _found(
        "An adapter of 0.85 times the size: each answer is the recorded one.",
        "ML908",
        "the answers are as recorded, and their log-probabilities moved by ",
        _FILES,
    ),
    "rank-cut": _found("An adapter whose rank was cut.", "ML908", _CHECK_FILE, _FILES),
    "other-revision": _found("A base with noise of 3 %.", "ML908", "rank or revision of the base", _FILES),
    "rope-base": _found("A model whose rotary embedding has another base.", "ML908", _CHECK_FILE, _FILES),
    "template-no-space": _found("A template that lacks a space.", "ML902", "The template:", _FILES),
    "template-system-prompt": _found("A template that writes a system prompt.", "ML902", "ML527", _FILES),
    "template-chatml": _found("The template of another family.", "ML902", "ML533", _FILES),
    "template-bos-twice": _found("A template that writes BOS, which the server adds.", "ML902", "ML521", _FILES),
    "gguf-no-eos": _harmless(
        "A GGUF file without the id of EOS: llama.cpp takes 2, which it is.",
        "test_planted_faults.test_a_file_without_the_id_of_eos_is_served_right",
    ),
    "gguf-other-eos": _found("A GGUF file with another id of EOS.", "ML902", _CHECK_FILE, _FILES),
    "gguf-markers-normal": _found("[INST] is a normal token of the GGUF file.", "ML902", "ML524", _FILES),
    "gguf-markers-user-defined": _found("Markers are user-defined tokens.", "ML906", "ML912", _FILES),
    "gguf-space-prefix": _found(
        "A GGUF file without `add_space_prefix`.", "ML902", "add_space_prefix=bool:false", _FILES
    ),
    "q4": _found("Weights in Q4_0.", "ML908", "the quantisation may be the whole cause", _FILES),
    "q8": _harmless("Weights in Q8_0.", "test_planted_faults.test_the_noise_of_a_dtype_is_no_finding"),
    "small-context": _found("A context of 256 tokens.", "ML907", "start llama.cpp with a larger `--ctx-size`", _FILES),
    "penalty-by-default": _found(
        "A penalty for repetition by default: no answer changes.", "ML911", r"gets repeat_penalty 1\.5", _FILES
    ),
    "strong-penalty-by-default": _found(
        "A penalty for repetition by default: answers change.", "ML911", "asked with the temperature 0 alone", _FILES
    ),
    "limit-by-default": _found(
        "A limit of tokens by default.", "ML911", "asked without a limit of tokens, it answers", _FILES
    ),
    "no-jinja": _found("A server with a template of its own.", "ML919", "tools param requires --jinja flag", _FILES),
}
"""What is wrong with the files of llama.cpp, or with its settings."""

OF_GATEWAYS = {
    "gateway-system-prompt": _found(
        "A system prompt is put before each chat.",
        "ML903",
        r"without a system message has \d+ tokens more, as of a system message",
        _GATEWAYS,
    ),
    "gateway-last-message": _found(
        "Only the last message arrives.", "ML903", "The chat has the last message alone: its history is lost", _GATEWAYS
    ),
    "gateway-no-tools": _found("Tools are dropped.", "ML903 ML909", "The chat has no tools", _GATEWAYS),
    "gateway-strips": _found(
        "Texts are stripped.", "ML903", "White space at the ends of the texts is stripped", _GATEWAYS
    ),
    "gateway-stop": _found("A stop string.", "ML909", r"by a stop string, which is in '\. ", _GATEWAYS),
    "gateway-temperature": _found(
        "A temperature is forced.", "ML909 ML911", "as if a temperature is forced", _GATEWAYS
    ),
    "gateway-limit": _found(
        "A limit of tokens is forced.",
        "ML909",
        "a limit ends the answer after 3 tokens, and 48 were asked for",
        _GATEWAYS,
    ),
    "gateway-penalty": _found(
        "A penalty is forced.",
        "ML909",
        "a setting of sampling or a grammar takes another, which occurs before, as a penalty for repetition does",
        _GATEWAYS,
    ),
    "gateway-bias": _found(
        "A bias is forced.", "ML909", "how cannot be told|a setting of sampling or a grammar takes another", _GATEWAYS
    ),
    "gateway-default-temperature": _harmless("A temperature for requests that name none.", _DEFAULTS),
    "gateway-default-penalty": _found(
        "A penalty for requests that name none.", "ML911", "asked with the temperature 0 alone", _DEFAULTS
    ),
    "gateway-default-limit": _found(
        "A limit of tokens for requests that name none.",
        "ML911",
        "asked without a limit of tokens, it answers",
        _DEFAULTS,
    ),
    "gateway-busy": _found(
        "HTTP 429 without an end.",
        "ML919",
        r"the server is busy \(HTTP 429",
        "test_planted_faults.test_a_gateway_that_stays_busy_is_called_busy",
    ),
}
"""What a gateway before llama.cpp does."""

OF_ANSWERS = {
    "thoughts-as-text": _found("A server that leaves thoughts in the text.", "ML925", "with its parsers", _PARSERS),
    "no-parser": _found(
        "A server that gives the text of an answer as it is.", "ML927 ML929", "with its parser", _PARSERS
    ),
    "stream-parts-lost": _found(
        "Parts of a stream are lost.", "ML931", "parts of the stream are lost, such as", _ANSWERS
    ),
    "stream-cut": _found(
        "A stream is cut in half.",
        "ML921",
        r"the stream ends early: finish_reason None, and no event \[DONE\]",
        _ANSWERS,
    ),
    "stream-no-reason": _found(
        "A stream without its finish_reason.",
        "ML930 ML931",
        r"finish_reason None\n  expected: as whole: finish_reason '(stop|tool_calls)'",
        _ANSWERS,
    ),
    "stream-white-space": _found(
        "White space of the parts of a stream is stripped.", "ML931", "parts of the stream are lost, such as", _ANSWERS
    ),
    "stream-harmless": _harmless("A stream with pings and other line ends, and without its last event.", _ANSWERS),
    "answers-in-parts": _harmless("The text of an answer is a list of parts.", _ANSWERS),
    "answers-stop": _found("A stop string.", "ML923", r"ends early, by a stop string, which is in '\.", _ANSWERS),
    "answers-limit": _found(
        "A limit of tokens is forced.",
        "ML930",
        "finish_reason 'length'.* a limit of the server, or of a proxy",
        _ANSWERS,
    ),
}
"""What changes answers whose ids are known, between llama.cpp's model and a client."""

OF_VLLM = {
    "vllm-base-for-adapter": _found(
        "The base is asked.", "ML908", "base is the parent of the adapters that the server lists", _ADAPTERS
    ),
    "vllm-no-name": _harmless(
        "No model is named, and one adapter is served: it is asked.",
        "test_faults_of_vllm.test_the_one_adapter_is_asked_without_its_name",
    ),
    "vllm-no-name-of-several": _found(
        "No model is named, and several adapters are served.", "ML901", "Name the adapter: --model NAME", _ADAPTERS
    ),
    "vllm-wrong-name": _found("A model is named that is not there.", "ML901", "tuned, ", _ADAPTERS),
    "vllm-stale-adapter": _found("An adapter of 0.6 times the size.", "ML908", _UNTOLD_WEIGHTS, _ADAPTERS),
    "vllm-alpha-halved": _found("An adapter whose alpha was halved.", "ML908", _UNTOLD_WEIGHTS, _ADAPTERS),
    "vllm-rank-cut": _found("An adapter whose rank was cut.", "ML908", _UNTOLD_WEIGHTS, _ADAPTERS),
    "vllm-other-adapter": _found(
        "Another adapter has the name.", "ML932", "other answers as no adapter that you named", _ADAPTERS
    ),
    "vllm-gateway-system-prompt": _found(
        "A system prompt is put before each chat.",
        "ML902",
        "Find the system prompt that each chat gets: that of a gateway",
        _RELAYS,
    ),
    "vllm-gateway-last-message": _found(
        "Only the last message arrives.", "ML902", "its history is lost, which gives the ids of each", _RELAYS
    ),
    "vllm-gateway-no-tools": _found(
        "Tools are dropped.", "ML902", "The chat has no tools, which gives the ids of each", _RELAYS
    ),
    "vllm-gateway-strips": _found(
        "Texts are stripped.", "ML902", "the texts is stripped, which gives the ids of each", _RELAYS
    ),
    "vllm-gateway-limit": _found(
        "A limit of tokens is forced.", "ML909", "a limit ends the answer after 3 tokens", _RELAYS
    ),
    "vllm-gateway-wrong-temperature": _found(
        "A temperature is forced that vLLM refuses.",
        "ML907 ML909",
        "The server refuses a setting of the request, and not the messages",
        _RELAYS,
    ),
    "vllm-gateway-temperature": _found("A temperature is forced.", "ML909 ML911", "a temperature is forced", _RELAYS),
    "vllm-gateway-cut-prompt": _found(
        "Prompts are cut at the start.", "ML902", "a field `truncate_prompt_tokens` of a gateway", _RELAYS
    ),
    "vllm-gateway-stop": _found("A stop string.", "ML909", r"the answer ends early, by the stop string '\.'", _RELAYS),
    "vllm-gateway-penalty": _found(
        "A strong penalty is forced.",
        "ML909",
        "as a penalty for repetition does|how cannot be told, because",
        _RELAYS,
    ),
    "vllm-gateway-special-tokens": _harmless("Special tokens are kept in texts, which have none.", _RELAYS),
    "vllm-gateway-default-penalty": _found(
        "A penalty for requests that name none.", "ML911", "asked with the temperature 0 alone", _RELAYS
    ),
    "vllm-mode-hf": _found(
        "Prompts by the chat template.", "ML906", "Start vLLM with `--tokenizer-mode mistral`", _FLAGS
    ),
    "vllm-small-context": _found(
        "A context of 256 tokens.", "ML907", "start vLLM with a larger `--max-model-len`", _FLAGS
    ),
    "vllm-parser-of-another-model": _found(
        "A parser of another model's calls.", "ML925", "--tool-call-parser mistral", _FLAGS
    ),
    "vllm-no-reasoning-parser": _found(
        "No parser of thoughts.", "ML929", "Start vLLM with its parser of thinking", _FLAGS
    ),
    "vllm-penalty-of-the-folder": _found(
        # one that changes no answer is not seen: vLLM shows no defaults of its requests
        "A penalty in generation_config.json that changes an answer.",
        "ML922",
        "A default of the server changes the answer, such as a penalty in generation_config.json",
        _FLAGS,
    ),
}
"""What is wrong with vLLM's adapters or options, or with a gateway before it."""

PLANTED = {**OF_LLAMACPP, **OF_GATEWAYS, **OF_ANSWERS, **OF_VLLM}


def found_rules(out: str) -> list[str]:
    """Return the rules of the findings of a report, each once."""
    return sorted(set(re.findall(r"^(ML\d+) ", out, re.MULTILINE)))


def assert_found(name: str, out: str) -> None:
    """Assert that a report has the rules and the words of a planted fault."""
    fault = PLANTED[name]
    assert fault.rules <= set(found_rules(out)), out
    assert re.search(fault.says, out), out
    assert "constrains the answer" not in out


def with_system_prompt(request: Request) -> Request:
    """Put a system prompt before a chat that has none."""
    if any(message["role"] == "system" for message in request["messages"]):
        return request
    return {**request, "messages": [{"role": "system", "content": "You are kind."}, *request["messages"]]}


def with_last_message(request: Request) -> Request:
    """Keep the last message alone."""
    return {**request, "messages": request["messages"][-1:]}


def stripped(request: Request) -> Request:
    """Strip the texts."""
    messages = [{**one, "content": one["content"].strip()} for one in request["messages"]]
    return {**request, "messages": messages}


def without_tools(request: Request) -> Request:
    """Drop the tools."""
    return {name: value for name, value in request.items() if name != "tools"}


def with_limit(request: Request) -> Request:
    """End each answer after three tokens."""
    return {**request, "max_tokens": min(3, request.get("max_tokens", 3))}


def with_stop(request: Request) -> Request:
    """End each answer at its first full stop."""
    return {**request, "stop": ["."]}


def or_default(name: str, value: Any) -> Ask:
    """Return a gateway that sets a field of the requests that lack it."""
    return lambda request: {name: value, **request}


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
"""The answer of a gateway that has too many requests."""


def only_openai(number: int, path: str) -> tuple[int, dict[str, Any]] | None:
    """Refuse each path that is not of OpenAI's API."""
    return None if path.startswith("/v1/") else (404, {"detail": "Not Found"})


@contextmanager
def loaded(address: str, count: int, key: str = "", **fields: Any) -> Iterator[None]:
    """Ask a server for many other chats at once until the end of the block.

    Args:
        address: The address of the server.
        count: The number of requests.
        key: The key that the server asks for; empty for none.
        fields: Further fields of each, such as `model`.
    """

    def ask(number: int) -> None:
        data = {"messages": [{"role": "user", "content": f"load {number}"}], "max_tokens": 30, "temperature": 1}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps({**data, **fields}).encode(), headers
        )
        urllib.request.urlopen(request, timeout=300).close()

    load = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for one in load:
        one.start()
    yield
    for one in load:
        one.join()
