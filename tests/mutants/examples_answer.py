"""The example of each rule of `answer`: a server that breaks the rule, and its sound twin."""

from __future__ import annotations

import bench_answer
from answer_server import nothing
from bench_answer import LLAMACPP
from gallery import Artifact, Example


class ML921(Example):
    mutant = bench_answer.a_required_call_is_refused

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].refuses = lambda _: False


class ML922(Example):
    mutant = bench_answer.another_city

    def sound(self, artifact: Artifact) -> None:
        artifact["kind"] = "llamacpp"


class ML923(Example):
    mutant = bench_answer.texts_are_stripped

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML924(Example):
    mutant = bench_answer.letters_become_a_call

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML925(Example):
    mutant = bench_answer.calls_are_not_read

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML926(Example):
    mutant = bench_answer.characters_are_split

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML927(Example):
    mutant = bench_answer.numbers_become_text

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML928(Example):
    mutant = bench_answer.calls_share_an_id

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML929(Example):
    mutant = bench_answer.thoughts_are_lost

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML930(Example):
    mutant = bench_answer.calls_end_with_stop

    def sound(self, artifact: Artifact) -> None:
        artifact["behaviour"].change = nothing


class ML931(Example):
    mutant = bench_answer.white_space_is_lost_in_streams

    def sound(self, artifact: Artifact) -> None:
        # whole and streamed lose it
        artifact["kind"] = "llamacpp"
        artifact["behaviour"].version = LLAMACPP
        artifact["behaviour"].change = lambda message, _: message.update(content=message["content"].lstrip())
