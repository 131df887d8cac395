"""Rules of the subject `template`: goldens, and the chat template against mistral-common."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

_FINETUNE = "mistral-finetune, finetune/data/tokenize.py"
_ORACLE = "mistral-common, tokens/tokenizers/instruct.py"

RULES = (
    Rule(
        "ML001",
        "A golden has the form that the schema says, and its supervised text is the assistant's text.",
        "template",
        "A golden that contradicts itself guards nothing.",
        "Record it again: pytest --mistral-golden --mistral-golden-update, or scripts/record_goldens.py.",
        "JSON Schema 2020-12",
    ),
    Rule(
        "ML002",
        "mistral-common gives a golden row the recorded ids.",
        "template",
        "The reference itself has moved: a model trained under one version is served under another.",
        "Pin mistral-common to the version of the base model's release, or read its changelog and record again.",
        _ORACLE,
    ),
    Rule(
        "ML003",
        "A golden row has the recorded labels and spans.",
        "template",
        "Other tokens carry loss than when the golden was recorded.",
        "Find the change that moved the mask; record again only if it was meant.",
        _FINETUNE,
    ),
    Rule(
        "ML004",
        "The chat template gives the ids of mistral-common, but for the named deviations.",
        "template",
        "Training and serving see different prompts; quality is lost without any error.",
        "Use the template that mistral-common generates for this tokenizer, or train with the mistral-common backend.",
        "mistralai/mistral-common#3",
    ),
    Rule(
        "ML005",
        "The chat template shows no deviation that was not recorded.",
        "template",
        "An upgrade of transformers or mistral-common changed how the template renders or is encoded.",
        "Pin the versions that recorded the golden, or read the deviation's reason and record again.",
        "huggingface/transformers#42299",
    ),
    Rule(
        "ML006",
        "The template's generation blocks mark exactly the tokens that the oracle supervises.",
        "template",
        "Trainers that use the assistant mask train on other tokens than they should.",
        "Put {% generation %} around the whole answer and its EOS.",
        "huggingface/transformers#34172",
    ),
    Rule(
        "ML007",
        "Every row of a golden folder is recorded, and recorded as it is now.",
        "template",
        "A row without a golden is not guarded.",
        "Record it: pytest --mistral-golden --mistral-golden-dir PATH --mistral-golden-update.",
        "general",
    ),
)
