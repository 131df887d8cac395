"""The answers of real servers: what clients get of answers whose ids are known, recorded in docs/serving/answers/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boards.inputs import DOCS
from boards.results import Example, Result
from boards.servers import RunningServer, program_of, to_set
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.conformance.answer.checks import AnswerChecks
from pytest_mistral_lora.conformance.server.failures import no_answer
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.programs.facts import facts
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.probe import said_answers

RECORDED = DOCS / "serving" / "answers"
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
"""The one row that is asked for its prompt."""
WAYS = ("whole", "streamed")
_WRONG_PROMPTS = "--tokenizer-mode hf"
"""A setting of vLLM that does not give it the prompts of mistral-common: it is not one to choose for its answers."""


def read() -> list[dict[str, Any]]:
    """Return every recording, by server, setting and tokenizer."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDED.glob("*.json"))]


def result(data: Mapping[str, Any]) -> Result:
    """Return a recording as a result, with a verdict on each way to ask for an answer."""
    program, version = program_of(data["kind"], data["version"])
    setting, answers = data["setting"], data["answers"]
    return Result(
        program=program,
        task="",
        version=version,
        setting=to_set(setting),
        is_contrast=_WRONG_PROMPTS in setting,
        name=f"{program} {version}: {setting}",
        tokenizer=data["tokenizer"],
        verdicts={f"{name}, {way}": answer[way] for name, answer in answers.items() for way in WAYS},
        examples={
            name: Example(name, answer["found"], answer["expected"])
            for name, answer in answers.items()
            if answer["found"] or answer["expected"]
        },
    )


def known_faults(one: Result) -> list[str]:
    """Return the ids of the known faults of a server that change its answers."""
    server = f"{one.program} {one.version}"
    return [fault.id for fault in facts() if fault.checks and fault.standing_of_server(server).state == "present"]


def command(data: Mapping[str, Any]) -> str:
    """Return the command that repeats the answers of a server."""
    if data["kind"] == "openai":
        return "mistral-lora serve-check openai=http://127.0.0.1:8000 --tokenizer DIR --probe probe"
    if data["kind"] == "vllm":
        return "mistral-lora serve-check vllm=http://127.0.0.1:8000 --tokenizer DIR --answers"
    return f"mistral-lora serve-check {data['kind']}@{data['version']}=http://127.0.0.1:8080 --tokenizer DIR --answers"


def record(server: RunningServer) -> Path:
    """Ask a server for the known answers, and return the file that records what clients get."""
    given: dict[str, Any] = {"version": server.version, "given": (parse_row(ROW),)}
    if server.probe is not None:
        given["probe_answers"] = said_answers(server.probe)
    judge = Target("own", Path(server.tokenizer))
    target = ServerTarget("served", judge=judge, kind=server.kind, url=server.url, asks_answers=True, **given)
    checks = AnswerChecks(target)
    found = {forced.known.name: (fault.found, fault.expected) for forced, _, fault in reversed(checks.faults)}
    for forced in target.forced_answers:
        reason = no_answer(forced.whole) or no_answer(forced.stream)
        if reason:
            # the port is another one each time
            found.setdefault(forced.known.name, (reason.replace(server.url, "http://127.0.0.1"), "an answer"))
    answers = {}
    for answer, verdict in checks.verdicts().items():
        words, expected = found.get(answer, ("", ""))
        ways = {way: verdict.get(way, []) for way in WAYS}
        answers[answer] = {**ways, "found": words, "expected": expected}
    oracle = target.oracle
    data = {
        "kind": server.kind,
        "version": target.served_version,
        "setting": server.setting,
        "tokenizer": f"{oracle.version} ({oracle.kind}, {oracle.vocab_size:,} tokens)",
        "answers": answers,
        "not_said": [forced.known.name for forced in target.forced_answers if forced.way is None],
    }
    file = RECORDED / f"{server.name}.json"
    write_json(file, data)
    return file
