"""The example of each rule of `server`: a server that breaks the rule, and its sound twin."""

from __future__ import annotations

import bench_server
from bench_server import deployed, is_refused, oracle, replayed, reworded, two_adapters
from gallery import Artifact, Example
from golden_answers import golden_answers
from local_server import CRASH, Behaviour


class ML901(Example):
    mutant = bench_server.nobody_is_there

    def sound(self, artifact: Artifact) -> None:
        artifact["port"] = None


class ML902(Example):
    mutant = bench_server.a_second_space

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].prompt = lambda ids, _: ids


class ML903(Example):
    mutant = bench_server.a_preview_that_lies

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].preview = lambda ids, _: ids


class ML904(Example):
    mutant = bench_server.one_token_more

    def sound(self, artifact: Artifact) -> None:
        artifact["kind"] = "openai"


class ML905(Example):
    mutant = bench_server.first_token_less_likely

    def sound(self, artifact: Artifact) -> None:
        artifact |= {"kind": "openai", "precision": "fp32"}
        replayed(artifact, shows_ids=False, logprob=lambda value, at: value - 0.007)


class ML906(Example):
    mutant = bench_server.a_marker_in_the_text

    def sound(self, artifact: Artifact) -> None:
        artifact["kind"] = "vllm"


class ML907(Example):
    mutant = bench_server.two_users_refused

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].refuses = lambda data: len(data["messages"]) > 1000


class ML908(Example):
    mutant = bench_server.numbers_of_another_model

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, logprob=lambda value, at: value - 0.007)


class ML909(Example):
    mutant = bench_server.a_stop_string

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, completion=lambda ids, _: ids)


class ML910(Example):
    mutant = bench_server.an_adapter_that_does_nothing

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, base=golden_answers(oracle())[:1])


class ML911(Example):
    mutant = bench_server.a_penalty_of_the_server

    def sound(self, artifact: Artifact) -> None:
        replayed(artifact, completion=lambda ids, data: ids)


class ML919(Example):
    mutant = bench_server.a_template_that_crashes

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"] = Behaviour(oracle(), refuses=is_refused, refusal=(500, CRASH))


class ML932(Example):
    mutant = bench_server.swapped_adapters

    def sound(self, artifact: Artifact) -> None:
        two_adapters(artifact, lambda ids, data: reworded(ids) if data.get("model") == "other" else ids)


class ML933(Example):
    mutant = bench_server.an_adapter_left_out

    def sound(self, artifact: Artifact) -> None:
        deployed(artifact, "adapter")
