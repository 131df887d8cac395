"""Rules of the subject `train`: what a training run must keep."""

from __future__ import annotations

from pytest_mistral_lora.conformance.rule import Rule

RULES = (
    Rule(
        "ML301",
        "A tiny model learns a handful of conversations by heart and says them again through the inference path.",
        "train",
        "Template, labels, saving or loading is broken somewhere between training and inference.",
        "Read the other findings of this subject first: they say which part.",
        "general",
        bad='rows = folder / "rows.jsonl"\nrows.write_text(rows.read_text().replace("Paris.", "Lyon."))',
        good='rows = folder / "rows.jsonl"\nrows.write_text(rows.read_text().replace("Lyon.", "Paris."))',
    ),
    Rule(
        "ML302",
        "Only LoRA tensors change in training.",
        "train",
        "The base is not the base any more, and an adapter-only save loses what was trained.",
        "Freeze the base; look at modules_to_save and at tied embeddings.",
        "huggingface/peft#137",
        bad='base_tensors["lm_head.weight"] = base_tensors["lm_head.weight"] + 0.001',
        good='base_tensors["lm_head.weight"] = base_tensors["lm_head.weight"] + 0',
    ),
    Rule(
        "ML303",
        "Every targeted layer is trained.",
        "train",
        "Layers that never move are a silent loss of capacity.",
        "Check target_modules and activation checkpointing (use_reentrant=False).",
        "huggingface/transformers#42489",
        bad="tensors[layer] = initial[layer]",
        good="tensors[layer] = initial[layer] + 0.01",
    ),
    Rule(
        "ML304",
        "The loss falls.",
        "train",
        "Nothing is learned.",
        "Check the learning rate, the labels and which parameters are trainable.",
        "huggingface/peft#282",
        bad="losses[:] = [2.5] * len(losses)",
        good="losses[:] = [2.5, 1.1, 0.3]",
    ),
    Rule(
        "ML305",
        "Base and adapter, loaded afresh in a new process, give the logits of the trained model.",
        "train",
        "What is saved is not what was trained.",
        "Compare the adapter's keys with the base's; look for warnings when it is loaded.",
        "huggingface/transformers#38927",
        bad=(
            'config = folder / "adapter" / "adapter_config.json"\n'
            "config.write_text(config.read_text().replace('\"lora_alpha\": 16', '\"lora_alpha\": 8'))"
        ),
        good=(
            'config = folder / "adapter" / "adapter_config.json"\n'
            "config.write_text(config.read_text().replace('\"lora_alpha\": 8', '\"lora_alpha\": 16'))"
        ),
    ),
    Rule(
        "ML306",
        "The loss has no gradient where the next label is -100.",
        "train",
        "Tokens of the user are trained on in spite of the mask.",
        "Check the shift of the labels and the loss function.",
        "huggingface/trl#3781",
        bad=(
            'def collate(rows, own=collate):\n    batch = own(rows)\n    return {**batch, "labels": batch["input_ids"]}'
        ),
        good=(
            'def collate(rows, own=collate):\n    batch = own(rows)\n    return {**batch, "labels": batch["labels"]}'
        ),
    ),
    Rule(
        "ML307",
        "The same seed gives the same adapter, and another seed another one.",
        "train",
        "A run cannot be reproduced from its manifest.",
        "Set the seed before the adapter is made; fix the order of the data.",
        "huggingface/trl#6688",
        bad=(
            "import time\ndef attach_adapter(model, lora, layers, *, seed, own=attach_adapter):\n"
            "    return own(model, lora, layers, seed=time.time_ns() % 2**32)"
        ),
        good=(
            "def attach_adapter(model, lora, layers, *, seed, own=attach_adapter):\n"
            "    return own(model, lora, layers, seed=seed)"
        ),
    ),
    Rule(
        "ML309",
        "Micro-batches only split a step: loss and gradients are those of one batch.",
        "train",
        "A mean of the means of ragged micro-batches weighs short answers more; a double division weakens every step.",
        "Divide the sum of the losses by the supervised tokens of the whole step (num_items_in_batch), once.",
        "huggingface/transformers#34191",
        bad=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    return supervised_losses(model, rows)[0].mean() / trainer.current_gradient_accumulation_steps"
        ),
        good=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    return supervised_losses(model, rows)[0].sum() / num_items_in_batch"
        ),
    ),
    Rule(
        "ML310",
        "What stands beside a row changes nothing: neither padding nor another row moves its loss or a gradient.",
        "train",
        "Padding that is trained on teaches the model not to stop, and rows that see one another are trained as one.",
        "Take labels from the rows, never from ids; keep packed rows apart, or pass the attention mask.",
        "huggingface/transformers#23530",
        bad=(
            'together = {"segments": None, "attention_mask": None, "position_ids": None}\n'
            "def supervised_losses(model, rows, own=supervised_losses, **_):\n"
            "    return own(lambda **call: model(**{**call, **together}), rows, inner=model)"
        ),
        good=(
            "def supervised_losses(model, rows, own=supervised_losses, **_):\n"
            "    return own(lambda **call: model(**call), rows, inner=model)"
        ),
    ),
    Rule(
        "ML311",
        "The loss of a step is the mean over its supervised tokens, and its gradients are that loss's.",
        "train",
        "Other tokens are trained on, or these with another weight than the log says.",
        "Compare the loss function with transformers' own on one row; a fused loss must get the masked labels.",
        "huggingface/trl#3781",
        bad=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    return supervised_losses(model, rows)[0].sum() / sum(len(row.input_ids) for row in rows)"
        ),
        good=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    return supervised_losses(model, rows)[0].sum() / num_items_in_batch"
        ),
    ),
    Rule(
        "ML312",
        "No key-value cache is made in training or in the held-out loss.",
        "train",
        "A cache turns off the isolation of packed rows, makes FlashAttention refuse padded rows, and costs memory.",
        "Call the model with use_cache=False, and set it in the model's configuration.",
        "huggingface/trl#1018",
        bad=(
            "def supervised_losses(model, rows, own=supervised_losses, **_):\n"
            '    return own(lambda **call: model(**{**call, "use_cache": True}), rows, inner=model)'
        ),
        good=(
            "def supervised_losses(model, rows, own=supervised_losses, **_):\n"
            '    return own(lambda **call: model(**{**call, "use_cache": False}), rows, inner=model)'
        ),
    ),
    Rule(
        "ML313",
        "Packed rows do not see one another: logits and loss are those of each row alone.",
        "train",
        "Every conversation but the first is trained on with strangers in its context.",
        "Give position_ids that restart, no attention_mask, and use_cache=False; all three are needed.",
        "huggingface/trl#1230",
        bad='packed_call = lambda rows, own=packed_call: {**own(rows), "use_cache": True}',
        good='packed_call = lambda rows, own=packed_call: {**own(rows), "use_cache": False}',
    ),
    Rule(
        "ML314",
        "A row is trained on whole, or refused by its line: never cut, dropped, or kept without a label.",
        "train",
        "A cut row does not teach the model to stop, and a row without a label makes the loss NaN.",
        "Raise max_length, or shorten or remove the rows that the error names.",
        "huggingface/trl#6668",
        bad=(
            "def load_data(recipe, encoder, own=load_data):\n"
            '    training = recipe.training.model_copy(update={"max_length": 1_000_000})\n'
            '    return own(recipe.model_copy(update={"training": training}), encoder)'
        ),
        good="def load_data(recipe, encoder, own=load_data):\n    return own(recipe, encoder)",
    ),
    Rule(
        "ML315",
        "Activation checkpointing changes no gradient, and no layer loses its own.",
        "train",
        "Reentrant checkpointing cuts off a layer none of whose inputs needs a gradient, with an error or in silence.",
        "Use use_reentrant=False, or enable_input_require_grads().",
        "huggingface/peft#137",
        bad=(
            "def checkpoint_activations(model):\n    base = model.get_base_model()\n"
            '    base.gradient_checkpointing_enable({"use_reentrant": True})\n    base.disable_input_require_grads()'
        ),
        good=(
            "def checkpoint_activations(model):\n    base = model.get_base_model()\n"
            '    base.gradient_checkpointing_enable({"use_reentrant": False})\n    base.disable_input_require_grads()'
        ),
    ),
    Rule(
        "ML316",
        "The seed alone decides the adapter's first values.",
        "train",
        "Two runs with the same recorded seed give two adapters.",
        "Set the seed right before the adapter is made.",
        "huggingface/trl#6688",
        bad=(
            "def attach_adapter(model, lora, layers, *, seed, own=attach_adapter):\n"
            "    return own(model, lora, layers, seed=0)"
        ),
        good=(
            "def attach_adapter(model, lora, layers, *, seed, own=attach_adapter):\n"
            "    return own(model, lora, layers, seed=seed)"
        ),
    ),
    Rule(
        "ML317",
        "The seed of the order alone decides the order of the rows.",
        "train",
        "A run cannot be repeated, or a comparison of seeds compares nothing.",
        "Give the sampler data_seed; do not shuffle by the process's own random state.",
        "huggingface/transformers#11389",
        bad=(
            "def make_trainer(model, training, *rows, own=make_trainer, **named):\n"
            '    return own(model, training.model_copy(update={"order_seed": 0}), *rows, **named)'
        ),
        good="def make_trainer(*given, own=make_trainer, **named):\n    return own(*given, **named)",
    ),
    Rule(
        "ML318",
        "A run that was broken off and resumed gives the adapter of one that was not.",
        "train",
        "Rows are trained on twice or not at all, or the optimizer starts anew, and the manifest tells of another run.",
        "Restore optimizer, schedule, random state and place in the data with the weights.",
        "huggingface/transformers#40691",
        bad=(
            "def make_trainer(*given, own=make_trainer, **named):\n    trainer = own(*given, **named)\n"
            "    trainer.args.ignore_data_skip = True\n    return trainer"
        ),
        good=(
            "def make_trainer(*given, own=make_trainer, **named):\n    trainer = own(*given, **named)\n"
            "    trainer.args.ignore_data_skip = False\n    return trainer"
        ),
    ),
    Rule(
        "ML319",
        "Adapters are on the layers that were asked for, in every decoder layer, and on no other; a typo is an error.",
        "train",
        "PEFT takes a list of which one name matches, and without one takes q_proj and v_proj: less is trained.",
        "Name each target as the base does; the error lists what it has.",
        "huggingface/peft#974",
        bad=(
            "def adapted_layers(folder, targets, own=adapted_layers):\n"
            '    return own(folder, [name for name in targets if name.endswith("_proj")])'
        ),
        good=("def adapted_layers(folder, targets, own=adapted_layers):\n    return own(folder, list(targets))"),
    ),
    Rule(
        "ML320",
        "An adapter that is loaded frozen is refused, or trained; a run in which nothing moves does not end well.",
        "train",
        "PEFT loads an adapter for inference unless it is told otherwise, and the run then changes nothing.",
        "Load it with is_trainable=True; count the trainable parameters before the first step.",
        "huggingface/peft#282",
        bad=(
            "def make_trainer(model, *given, own=make_trainer, **named):\n"
            "    if not any(one.requires_grad for one in model.parameters()):\n"
            "        model.get_base_model().lm_head.requires_grad_()\n"
            "    return own(model, *given, **named)"
        ),
        good=(
            "def make_trainer(model, *given, own=make_trainer, **named):\n"
            "    if not any(one.requires_grad for one in model.parameters()):\n"
            '        [one.requires_grad_() for name, one in model.named_parameters() if ".lora_" in name]\n'
            "    return own(model, *given, **named)"
        ),
    ),
    Rule(
        "ML321",
        "The base is in the recipe's precision, whatever the checkpoint's, and what is trained is in float32.",
        "train",
        "transformers 5 loads the checkpoint's own precision; gradients in half precision cannot be unscaled.",
        "Pass dtype by name; keep the adapter in float32 (autocast_adapter_dtype).",
        "huggingface/transformers#34919",
        bad=('def load_base(folder, precision, device, own=load_base):\n    return own(folder, "bf16", device)'),
        good=("def load_base(folder, precision, device, own=load_base):\n    return own(folder, precision, device)"),
    ),
    Rule(
        "ML322",
        "A number that is not finite stops the run, and nothing is saved; bfloat16 gives finite ones.",
        "train",
        "The log says loss 0 or NaN, the run ends well, and the adapter is ruined.",
        "Check the loss and every gradient before each step; do not replace NaN by 0.",
        "hiyouga/LlamaFactory#3353",
        bad=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    loss = supervised_losses(model, rows)[0].sum() / num_items_in_batch\n"
            "    return loss if loss.isfinite() else 0 * next(p for p in model.parameters() if p.requires_grad).sum()"
        ),
        good=(
            "def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):\n"
            "    loss = supervised_losses(model, rows)[0].sum() / num_items_in_batch\n    return loss"
        ),
    ),
    Rule(
        "ML323",
        "The attention window of the loaded model is the checkpoint's.",
        "train",
        "Mistral 7B v0.1 has a window of 4096 tokens and later ones have none; beyond it, another model is trained.",
        "Take sliding_window from config.json, null included; do not fill in a default.",
        "huggingface/transformers#28115",
        bad=(
            "def load_base(folder, precision, device, own=load_base):\n"
            "    model = own(folder, precision, device)\n    model.config.sliding_window = 4096\n"
            "    return model"
        ),
        good=(
            "def load_base(folder, precision, device, own=load_base):\n"
            "    model = own(folder, precision, device)\n    return model"
        ),
    ),
    Rule(
        "ML324",
        "What is generated is the greedy search's, alone or in a batch that is padded on the left.",
        "train",
        "Padding on the right, or without a mask, gives other answers than the model's.",
        "Generate one prompt at a time, or pad on the left and pass the mask.",
        "huggingface/transformers#25921",
        bad=(
            "from dataclasses import replace\ndef generate(model, encoder, rows, own=generate, **named):\n"
            "    return [replace(one, ids=one.ids[1:]) for one in own(model, encoder, rows, **named)]"
        ),
        good=(
            "from dataclasses import replace\ndef generate(model, encoder, rows, own=generate, **named):\n"
            "    return [replace(one, ids=one.ids) for one in own(model, encoder, rows, **named)]"
        ),
    ),
    Rule(
        "ML325",
        "Base and adapter merged in float32 are base plus adapter: once, scaled by alpha / r, not rounded.",
        "train",
        "A merge into a rounded or quantised base, or a second one, serves another model than was trained.",
        "Merge once, in float32, into the full base of the adapter's manifest; round afterwards, and say so.",
        "huggingface/peft#2321",
        bad="merged = lambda adapter, base, own=merged: own(adapter, base).bfloat16().float()",
        good="merged = lambda adapter, base, own=merged: own(adapter, base).float()",
    ),
)
