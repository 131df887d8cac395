"""TRL's training loop for steps that are timed beside those of this package."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_mistral_lora.training.gpu_trial.shape import Steps


def training_loop(steps: Steps) -> Any:
    """Return an SFTTrainer, ready to run."""
    from datasets import Dataset
    from peft import get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    with suppress(ImportError, ValueError):  # the kernel that it advises for packed rows
        steps.model.set_attn_implementation("flash_attention_2")
    arguments = SFTConfig(
        output_dir=str(steps.folder / "work"),
        max_steps=len(steps.ids),
        per_device_train_batch_size=1,
        max_length=len(steps.ids[0]),
        bf16=True,
        use_cpu=steps.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    # it asks for a tokenizer, and encodes nothing with it
    words = Tokenizer(WordLevel({"</s>": 2}, unk_token="</s>"))
    return SFTTrainer(
        model=get_peft_model(steps.model, steps.lora),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in steps.ids]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
    )
