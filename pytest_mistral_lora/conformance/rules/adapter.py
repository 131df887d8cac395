"""Rules of the subject `adapter`: what an adapter folder must hold."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rules.rule import Rule

RULES = (
    Rule(
        "ML401",
        "An adapter holds two tensors for each adapted layer of its base, and nothing else.",
        "adapter",
        "PEFT only warns about tensors that are missing or match nothing, and serves the base as it was.",
        "Save the adapter again from the trained model; compare its names with the base's layers.",
        "huggingface/transformers#38927",
    ),
    Rule(
        "ML402",
        "Every tensor of an adapter is finite.",
        "adapter",
        "One NaN makes every answer NaN.",
        "Lower the learning rate; look at the training log for the first step that was not finite.",
        "hiyouga/LlamaFactory#3353",
    ),
    Rule(
        "ML403",
        "Every adapted layer was trained: its lora_B is not zero.",
        "adapter",
        "A layer whose lora_B is zero does nothing.",
        "Check that the parameters were trainable and in the optimizer.",
        "tloen/alpaca-lora#446",
    ),
    Rule(
        "ML404",
        "The tensors have the rank that the configuration says.",
        "adapter",
        "The scale alpha / r is wrong, or the adapter does not load.",
        "Do not edit adapter_config.json.",
        "huggingface/peft#2502",
    ),
)
