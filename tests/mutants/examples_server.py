"""The example of each rule of `server`: a server that breaks the rule, and its sound twin."""

from __future__ import annotations

from bench_server import literal, spaced, two_users
from gallery import Artifact, Example


class ML901(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["port"] = "http://127.0.0.1:9"

    def sound(self, artifact: Artifact) -> None:
        artifact["port"] = None


class ML902(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["behaviour"].prompt = spaced

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].prompt = lambda ids, _: ids


class ML903(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["behaviour"].preview = lambda ids, _: ids
        artifact["behaviour"].prompt = lambda ids, _: (1, *ids)

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].preview = lambda ids, _: ids


class ML904(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["kind"] = "openai"
        artifact["behaviour"].prompt = lambda ids, _: (1, *ids)

    def sound(self, artifact: Artifact) -> None:
        artifact["kind"] = "openai"


class ML906(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["behaviour"].prompt = literal

    def sound(self, artifact: Artifact) -> None:
        artifact["kind"] = "vllm"


class ML907(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["behaviour"].refuses = two_users

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].refuses = lambda data: len(data["messages"]) > 1000
