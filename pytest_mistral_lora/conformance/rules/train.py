"""Rules of the subject `train`: what a training run must keep."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

RULES = (
    Rule(
        "ML301",
        "A tiny model learns a handful of conversations by heart and says them again through the inference path.",
        "train",
        "Template, labels, saving or loading is broken somewhere between training and inference.",
        "Read the other findings of this subject first: they say which part.",
        "general",
    ),
    Rule(
        "ML302",
        "Only LoRA tensors change in training.",
        "train",
        "The base is not the base any more, and an adapter-only save loses what was trained.",
        "Freeze the base; look at modules_to_save and at tied embeddings.",
        "huggingface/peft#137",
    ),
    Rule(
        "ML303",
        "Every targeted layer is trained.",
        "train",
        "Layers that never move are a silent loss of capacity.",
        "Check target_modules and activation checkpointing (use_reentrant=False).",
        "huggingface/transformers#42489",
    ),
    Rule(
        "ML304",
        "The loss falls.",
        "train",
        "Nothing is learned.",
        "Check the learning rate, the labels and which parameters are trainable.",
        "huggingface/peft#282",
    ),
    Rule(
        "ML305",
        "Base and adapter, loaded afresh in a new process, give the logits of the trained model.",
        "train",
        "What is saved is not what was trained.",
        "Compare the adapter's keys with the base's; look for warnings when it is loaded.",
        "huggingface/transformers#38927",
    ),
    Rule(
        "ML306",
        "The loss has no gradient where the next label is -100.",
        "train",
        "Tokens of the user are trained on in spite of the mask.",
        "Check the shift of the labels and the loss function.",
        "huggingface/trl#3781",
    ),
    Rule(
        "ML307",
        "The same seed gives the same adapter, and another seed another one.",
        "train",
        "A run cannot be reproduced from its manifest.",
        "Set the seed before the adapter is made; fix the order of the data.",
        "huggingface/trl#6688",
    ),
)
