"""Train an adapter with TRL, guarded: python trl_guard.py BASE ROWS OUTPUT."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from pytest_mistral_lora import guard, training_template

base, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, mistral_format=False)
tokenizer.chat_template = training_template(base)  # with the generation blocks that assistant_only_loss needs
settings = {"assistant_only_loss": True, "max_length": None, "bf16": torch.cuda.is_available()}
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(output, max_steps=2, report_to="none", **settings),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=tokenizer,
    peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
)
callback = guard(trainer)
trainer.train()
print(callback.verdict)
