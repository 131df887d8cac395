"""Rules of the subject `transcript`: does an adapter answer as its golden transcripts say?"""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML801",
        "A golden transcript keeps its schema and does not contradict itself.",
        "transcript",
        "A transcript that was edited or cut off proves nothing about the adapter.",
        "Restore the file, or record it again with mistral-lora smoke --record.",
        "general",
        bad='transcripts["row-0001"]["stop"] = "full stop"',
        good='transcripts["row-0001"]["x-note"] = "keys of your own begin with x-"',
    ),
    Rule(
        "ML802",
        "The prompt of a transcript is encoded into the ids that it was recorded with.",
        "transcript",
        "Tokenizer, template or a library has moved: the adapter is asked something else than it was trained on.",
        "Restore the tokenizer's files and the versions in the transcript, or train and record again.",
        "general",
        bad='transcripts["row-0001"]["prompt_ids"].insert(1, 1)',
        good='transcripts["row-0001"]["prompt_ids"][0] = 1',
    ),
    Rule(
        "ML803",
        "The transcripts in an adapter's folder were recorded with this adapter, on this base.",
        "transcript",
        "Answers of another model are taken for those of this one.",
        "Record the transcripts again, or restore the adapter or the base.",
        "general",
        bad='transcripts["row-0001"]["model"]["base_weights_sha256"] = "0" * 64',
        good='transcripts["row-0001"]["model"]["x-base"] = "a local one"',
    ),
    Rule(
        "ML804",
        "The adapter answers as its transcripts say, or with another token only at a near tie.",
        "transcript",
        "What is deployed says something else than what was tested.",
        "Look at the first other token; restore adapter, base, precision and versions, or accept it and record again.",
        "general",
        bad='answer = transcripts["row-0001"]\n'
        'answer["completion_ids"][0], answer["margins"][0] = answer["runner_up_ids"][0], 3.5',
        good='answer = transcripts["row-0001"]\nanswer["margins"][0] = 3.5',
    ),
    Rule(
        "ML805",
        "An answer keeps the form that it was recorded with.",
        "transcript",
        "What reads the answer (a JSON parser, a tool) fails, even where the words are nearly the same.",
        "Train longer, on rows of that form, or accept it and record again.",
        "general",
        bad='check = {"name": "number", "kind": "regex", "value": "[0-9]+", "passed": True, "reason": ""}\n'
        'transcripts["row-0001"]["checks"].append(check)',
        good='check = {"name": "any", "kind": "regex", "value": ".*", "passed": True, "reason": ""}\n'
        'transcripts["row-0001"]["checks"].append(check)',
    ),
)
