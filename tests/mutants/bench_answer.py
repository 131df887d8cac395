"""A server that gives clients the known answers as its model says them, and servers that change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import answer_server as answers
from answer_server import AnswerServer, in_streams
from derived_tekken import derived_oracle
from gallery import Artifact, mutant
from local_server import serving

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
LLAMACPP = "b11549-8b3f1c2"


def oracle() -> Oracle:
    return derived_oracle("derived-v13-thinking", words=2000)


class AnswerBench:
    """Starts a server on the loopback, and judges its answers."""

    subject = "answer"

    def make(self, folder: Path) -> Artifact:
        """Return a server whose clients get what the model says."""
        # the server has an oracle of its own, since an oracle traces one conversation at a time
        return {"folder": folder, "behaviour": AnswerServer(Oracle(oracle().path)), "kind": "vllm", "probe": None}

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on the server."""
        judge = Target("own", oracle().path)
        given: dict[str, Any] = {"given": (parse_row(ROW),), "probe_answers": artifact["probe"]}
        with serving(artifact["behaviour"]) as url:
            target = ServerTarget("local", judge=judge, url=url, kind=artifact["kind"], asks_answers=True, **given)
            settings = Settings(20, None, "cpu", True, (), False, artifact["folder"])
            checks = [check for check in collect([target], settings) if check.subject == "answer"]
            found = [finding for check in checks for finding in check.run().findings]
        return [replace(finding, place=str(finding.place).replace(url, "http://127.0.0.1:8080")) for finding in found]


BENCH = AnswerBench()


@mutant("ML921", says="call-required: whole: the server refuses it: HTTP 400: Failed to initialize samplers")
def a_required_call_is_refused(artifact: Artifact) -> None:
    """The server refuses each request that requires a call."""
    artifact["behaviour"].refuses = answers.required
    artifact["behaviour"].refusal = (400, "Failed to initialize samplers: std::exception")


@mutant("ML922", "N140", says='call: whole and streamed: calls weather({"city": "Graz"})')
def another_city(artifact: Artifact) -> None:
    """A grammar has the model call a tool with another city; the stream hides its ids."""
    artifact["kind"] = "llamacpp"
    artifact["behaviour"].change = answers.other_city


@mutant("ML923", says="trailing-line-break: whole and streamed: the text 'The end.'")
def texts_are_stripped(artifact: Artifact) -> None:
    """The server strips each text."""
    artifact["behaviour"].change = answers.stripped


@mutant("ML923", says="a named deviation (leading-white-space) that is not known of this version")
def a_deviation_of_another_server(artifact: Artifact) -> None:
    """The server drops white space at the beginning, as another one is known to do."""
    artifact["behaviour"].change = lambda message, _: message.update(content=message["content"].lstrip())


@mutant("ML924", says="spelled-call-tools: whole and streamed: text 'It is', calls weather({})")
def letters_become_a_call(artifact: Artifact) -> None:
    """The server reads the text again, and finds a marker in its letters."""
    artifact["behaviour"].change = answers.letters_as_call


@mutant("ML925", "N141", says="call: whole and streamed: text '[TOOL_CALLS]weather[ARGS]{}'")
def calls_are_not_read(artifact: Artifact) -> None:
    """The server has no parser of tool calls."""
    artifact["behaviour"].change = answers.calls_as_text


@mutant("ML926", "N143", says="emoji: whole and streamed: the text 'Here: ��")
def characters_are_split(artifact: Artifact) -> None:
    """The server decodes each token by itself."""
    artifact["behaviour"].change = answers.split_characters


@mutant("ML926 ML931", "N143", says="emoji: streamed: the text 'Here: ��")
def characters_of_a_stream_are_split(artifact: Artifact) -> None:
    """The server decodes each token of a stream by itself."""
    artifact["behaviour"].change = in_streams(answers.split_characters)


@mutant("ML927", "N142", says='call-float: whole and streamed: the calls store({"value": "1.0"})')
def numbers_become_text(artifact: Artifact) -> None:
    """The server turns numbers into texts."""
    artifact["behaviour"].change = answers.numbers_as_text


@mutant("ML928", says="calls-of-two-tools: whole and streamed: the ids of the calls ['callcall1', 'callcall1']")
def calls_share_an_id(artifact: Artifact) -> None:
    """The server gives the calls of an answer one id."""
    artifact["behaviour"].change = answers.one_id


@mutant("ML929", "N144", says="thinking: whole and streamed: the thinking ''")
def thoughts_are_lost(artifact: Artifact) -> None:
    """The server drops each thought."""
    artifact["behaviour"].change = answers.no_thinking


@mutant("ML930", says="call: whole and streamed: finish_reason 'stop'")
def calls_end_with_stop(artifact: Artifact) -> None:
    """The server ends each answer with `stop`."""
    artifact["behaviour"].change = answers.always_stop


@mutant("ML931", says="leading-spaces: streamed: text 'word'")
def white_space_is_lost_in_streams(artifact: Artifact) -> None:
    """The stream alone drops white space at the beginning, which is known of the server."""
    artifact |= {"kind": "llamacpp"}
    artifact["behaviour"].version = LLAMACPP
    change = in_streams(lambda message, _: message.update(content=message["content"].lstrip()))
    artifact["behaviour"].change = change
