"""The example of each rule of `transcript`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

import bench_transcript
from gallery import Artifact, Example


class ML801(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["stop"] = "full stop"

    def sound(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["x-note"] = "keys of your own begin with x-"


class ML802(Example):
    def broken(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["prompt_ids"].insert(1, 1)

    def sound(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["prompt_ids"][0] = 1


class ML803(Example):
    mutant = bench_transcript.recorded_on_another_base

    def sound(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["model"]["x-base"] = "a local one"


class ML804(Example):
    mutant = bench_transcript.another_answer

    def sound(self, artifact: Artifact) -> None:
        answer = artifact["transcripts"]["row-0001"]
        answer["margins"][0] = 3.5


class ML805(Example):
    def broken(self, artifact: Artifact) -> None:
        check = {"name": "number", "kind": "regex", "value": "[0-9]+", "passed": True, "reason": ""}
        artifact["transcripts"]["row-0001"]["checks"].append(check)

    def sound(self, artifact: Artifact) -> None:
        check = {"name": "any", "kind": "regex", "value": ".*", "passed": True, "reason": ""}
        artifact["transcripts"]["row-0001"]["checks"].append(check)


class ML806(Example):
    mutant = bench_transcript.answer_of_a_larger_model

    def sound(self, artifact: Artifact) -> None:
        artifact["transcripts"]["row-0001"]["completion_ids"][0] += 0


class ML807(Example):
    mutant = bench_transcript.lost_what_it_knew

    def sound(self, artifact: Artifact) -> None:
        bench_transcript.record_gate(artifact["folder"], low=0.01, difference=0.2, adapter=1.4, verdict="undecided")
