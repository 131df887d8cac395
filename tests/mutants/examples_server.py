"""The example of each rule of `server`: a server that breaks the rule, and its sound twin."""

from __future__ import annotations

from bench_server import by_ids, is_refused, literal, oracle, replayed, reworded, spaced
from gallery import Artifact, Example
from golden_answers import golden_answers
from local_server import CRASH, Behaviour, has_calls, two_users


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


class ML905(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact |= {"kind": "openai", "precision": "fp32"}
        replayed(artifact, shows_ids=False, logprob=lambda value, at: value - 0.0714 * (at == 0))

    def sound(self, artifact: Artifact) -> None:
        artifact |= {"kind": "openai", "precision": "fp32"}
        replayed(artifact, shows_ids=False, logprob=lambda value, at: value - 0.007)


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


class ML908(Example):
    def broken(self, artifact: Artifact) -> None:
        replayed(artifact, completion=lambda ids, data: reworded(ids) if by_ids(data) else ids)

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, logprob=lambda value, at: value - 0.007)


class ML909(Example):
    also = "ML902"

    def broken(self, artifact: Artifact) -> None:
        replayed(artifact, prompt=spaced)

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, prompt=lambda ids, _: ids)


class ML910(Example):
    def broken(self, artifact: Artifact) -> None:
        replayed(artifact, base=golden_answers(oracle()))

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, base=golden_answers(oracle())[:1])


class ML911(Example):
    def broken(self, artifact: Artifact) -> None:
        replayed(
            artifact, completion=lambda ids, data: ids if by_ids(data) or "repeat_penalty" in data else reworded(ids)
        )

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, completion=lambda ids, data: ids)


class ML919(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["behaviour"] = Behaviour(oracle(), refuses=has_calls, refusal=(500, CRASH))

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"] = Behaviour(oracle(), refuses=is_refused, refusal=(500, CRASH))
