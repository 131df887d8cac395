"""Generate answers, record them as golden transcripts, and judge a model by recorded ones."""

from pytest_mistral_lora.training.generate.answers import (
    Completion,
    Probe,
    adapter_effect,
    complete,
    generate,
    last_turn_ids,
    load_adapted,
    probe,
)

__all__ = ["Completion", "Probe", "adapter_effect", "complete", "generate", "last_turn_ids", "load_adapted", "probe"]
