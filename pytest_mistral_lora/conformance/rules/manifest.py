"""Rules of the subject `manifest`: is manifest.json valid, and is it true of the files?"""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

RULES = (
    Rule(
        "ML701",
        "manifest.json keeps its schema.",
        "manifest",
        "An adapter without its story cannot be trusted, and a pin that can move is none.",
        "Do not edit the output folder; train again.",
        "huggingface/peft#1567",
    ),
    Rule(
        "ML702",
        "What manifest.json records of the files beside it is true of them.",
        "manifest",
        "A file was exchanged, edited or lost after the run: the manifest describes another adapter.",
        "Take the folder as the run left it; do not edit it.",
        "verl-project/verl#1821",
    ),
)
