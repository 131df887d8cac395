"""A server of mistral-common's prompts, and servers that feed their model others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from gallery import Artifact, mutant
from local_server import Behaviour, serving

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Settings, collect
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import Target

SPACE, INST = 29473, 3


@cache
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


class ServerBench:
    """Starts a server on the loopback, and judges it."""

    subject = "server"

    def make(self, folder: Path) -> Artifact:
        """Return a server that feeds its model the prompts of mistral-common."""
        return {"folder": folder, "kind": "llamacpp", "behaviour": Behaviour(oracle()), "port": None}

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on the server."""
        judge = Target("spm-v3", shipped_tokenizer("spm-v3"))
        with serving(artifact["behaviour"]) as url:
            target = ServerTarget("local", judge=judge, kind=artifact["kind"], url=artifact["port"] or url)
            settings = Settings(20, None, "cpu", True, (), False, artifact["folder"])
            found = [finding for check in collect([target], settings) for finding in check.run().findings]
        return [_at_the_usual_port(finding, url) for finding in found]


def _at_the_usual_port(finding: Finding, url: str) -> Finding:
    return replace(finding, place=finding.place.replace(url, "http://127.0.0.1:8080"))


BENCH = ServerBench()


def spaced(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
    """Put a space behind the first [INST]."""
    at = ids.index(INST) + 1
    return (*ids[:at], SPACE, *ids[at:])


def literal(ids: tuple[int, ...], data: dict[str, Any]) -> tuple[int, ...]:
    """Make a control token of a text that spells [/INST]."""
    spelled = oracle().encode_text("[/INST]")
    for at in range(len(ids) - len(spelled)):
        if ids[at + 1 : at + len(spelled)] == spelled[1:] and oracle().piece(ids[at]).endswith("["):
            return (*ids[:at], SPACE, 4, *ids[at + len(spelled) :])
    return ids


@mutant("ML901", says="no server answers there")
def nobody_is_there(artifact: Artifact) -> None:
    """No process listens at the address."""
    artifact["port"] = "http://127.0.0.1:9"


@mutant("ML901", says="HTTP 404")
def another_server(artifact: Artifact) -> None:
    """Another server is at the address."""
    artifact["behaviour"].answer = lambda path: (404, b"<html>not found</html>")


@mutant("ML901", says="HTTP 500")
def each_chat_fails(artifact: Artifact) -> None:
    """The server lists its model, and each request fails."""
    artifact["behaviour"].answer = lambda path: (500, b"oops") if path == "/apply-template" else None


@mutant("ML901", says="whole numbers")
def ids_that_are_none(artifact: Artifact) -> None:
    """The ids of a prompt are texts."""
    artifact["behaviour"].answer = lambda path: (200, b'{"tokens": ["<s>"]}') if path == "/tokenize" else None


@mutant("ML902", "N90", says="ML528")
def a_second_space(artifact: Artifact) -> None:
    """The server puts a space behind [INST]."""
    artifact["behaviour"].prompt = spaced


@mutant("ML902", says="BOS is there 2 times")
def a_second_bos(artifact: Artifact) -> None:
    """vLLM writes a second BOS."""
    artifact["kind"] = "vllm"
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML902", says="ML535")
def the_name_of_a_template(artifact: Artifact) -> None:
    """Each prompt is the name of a template."""
    artifact["behaviour"].prompt = lambda ids, _: (1, *oracle().encode_text("mistral-v3-tekken"))


@mutant("ML903", says="the preview has")
def a_preview_that_lies(artifact: Artifact) -> None:
    """The preview is right, and the chat has a second BOS."""
    artifact["behaviour"].preview = lambda ids, _: ids
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML904", says="prompt tokens")
def one_token_more(artifact: Artifact) -> None:
    """A server that hides its ids has a BOS more."""
    artifact["kind"] = "openai"
    artifact["behaviour"].prompt = lambda ids, _: (1, *ids)


@mutant("ML906", says="[/INST]")
def a_marker_in_the_text(artifact: Artifact) -> None:
    """A text that spells [/INST] becomes the marker."""
    artifact["behaviour"].prompt = literal


@mutant("ML907", says="roles must alternate")
def two_users_refused(artifact: Artifact) -> None:
    """The server refuses rows with two messages of the user in a row."""
    artifact["behaviour"].refuses = two_users


def two_users(data: dict[str, Any]) -> bool:
    roles = [message["role"] for message in data["messages"]]
    return any(pair == ("user", "user") for pair in pairwise(roles))
