"""The example of each rule of `mask`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

from typing import Any

import mutants_mask_encodings as encodings
import mutants_mask_rows as rows
import mutants_mask_settings as settings
from gallery import Artifact, Example
from mutants_mask_encodings import supervised, with_ids
from mutants_mask_settings import of_newest


def plain_row() -> dict[str, Any]:
    """A question and its answer: enough for the rules that are not about tools or several turns."""
    question, answer = "Which colour is the sky?", "Blue."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


class OfPlainRow(Example):
    """An example whose row is a question and its answer."""

    def start(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()


class ML101(OfPlainRow):
    mutant = encodings._labels_shifted

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        artifact["after"] = lambda made: made | {"labels": [*made["labels"]]}


class ML102(OfPlainRow):
    mutant = encodings._the_user_is_supervised

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        artifact["after"] = lambda made: supervised(made, lambda span: span["role"] == "assistant")


class ML103(Example):
    mutant = encodings._weights_are_ignored

    def sound(self, artifact: Artifact) -> None:
        artifact["row"]["messages"][2]["weight"] = 0


class ML104(OfPlainRow):
    mutant = encodings._eos_is_masked

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        artifact["after"] = lambda made: supervised(made, lambda span: span["supervised"])


class ML105(OfPlainRow):
    mutant = encodings._bos_twice

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        bos = artifact["tokenizer"].bos_id
        artifact["after"] = lambda made: with_ids(made, 0, [bos])


class ML106(Example):
    also = "ML107 ML109"

    def broken(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        # as if the answer had spelled it
        eos = artifact["tokenizer"].eos_id
        artifact["after"] = lambda made: with_ids(made, made["spans"][-2]["start"], [eos])

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        artifact["row"]["messages"][-1]["content"] = "</s>"


class ML107(Example):
    mutant = rows._the_encoders_have_moved

    def sound(self, artifact: Artifact) -> None:
        artifact["tokenizer"] = artifact["newer_tokenizer"]


class ML108(Example):
    mutant = rows._weights_in_the_text

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = {
            "messages": [
                artifact["question"],
                artifact["answer"] | {"weight": 0},
                artifact["question"],
                artifact["answer"],
            ]
        }


class ML109(OfPlainRow):
    mutant = encodings._another_answer

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        it = artifact["tokenizer"].encode_text("Blue.")[:1]
        artifact["after"] = lambda made: with_ids(made, made["spans"][-2]["start"], it)


class ML110(Example):
    mutant = encodings._a_call_without_its_marker

    def sound(self, artifact: Artifact) -> None:
        artifact["after"] = lambda made: made


class ML112(OfPlainRow):
    mutant = rows._another_prompt

    def sound(self, artifact: Artifact) -> None:
        artifact["row"] = plain_row()
        artifact["prompt"] = lambda row, tokenizer: tokenizer.encode_prompt(row)


class ML118(Example):
    mutant = rows._no_system_prompt

    def sound(self, artifact: Artifact) -> None:
        artifact["before"] = lambda row: row | {"messages": [*row["messages"]]}


class ML123(Example):
    mutant = settings._the_first_chunk_of_a_result

    def sound(self, artifact: Artifact) -> None:
        of_newest(artifact, lambda row: row)


class ML125(Example):
    mutant = settings._thinking_is_text

    def sound(self, artifact: Artifact) -> None:
        of_newest(artifact, lambda row: row)
