"""Train an adapter in a loop of Accelerate, watched: python accelerate_loop.py BASE ROWS."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from pytest_mistral_lora import guard, training_template

base, rows = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, mistral_format=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
tokenizer.chat_template = training_template(base)  # with generation blocks, which make the mask


def encode(messages: list[dict[str, str]]) -> dict[str, list[int]]:
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = made["input_ids"], made["assistant_masks"]
    return {"input_ids": ids, "labels": [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]}


data = [encode(json.loads(line)["messages"]) for line in Path(rows).read_text().splitlines()]
loader = DataLoader(data, batch_size=2, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-4)
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
watch = guard.watch(model, tokenizer=tokenizer)
model.train()
for batch in loader:
    with watch:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
print(watch.verdict)
