"""Train an adapter with transformers and PEFT, guarded: python transformers_guard.py BASE ROWS OUTPUT."""

import json
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from pytest_mistral_lora import guard, training_template

base, rows, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, mistral_format=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
tokenizer.chat_template = training_template(base)  # with generation blocks, which make the mask


def encode(messages: list[dict[str, str]]) -> dict[str, list[int]]:
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = made["input_ids"], made["assistant_masks"]
    return {"input_ids": ids, "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]}


trainer = Trainer(
    model=get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"])),
    args=TrainingArguments(output, max_steps=2, per_device_train_batch_size=2, report_to="none"),
    train_dataset=[encode(json.loads(line)["messages"]) for line in Path(rows).read_text().splitlines()],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
callback = guard(trainer)
trainer.train()
print(callback.verdict)
