"""Trainers, and finished runs, that are broken on purpose.

A change to a function of the trainer is put where the trainer looks for it; the tiny run and every law that calls the
function are then made again. What calls it was found out by running them once with the trainer as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gallery import Artifact, mutant
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trained_run import SOUND, judged, pristine, run_folder
from transformers import GenerationConfig, MistralForCausalLM, TrainerCallback, set_seed

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.callbacks import StopAtNonFinite
from pytest_mistral_lora.training.step import StepRow


class TrainBench:
    """Makes a finished tiny run and the functions of the trainer, and judges both as the suite does."""

    subject = "train"

    def make(self, folder: Path) -> Artifact:
        """Make a finished run below a folder."""
        clean = pristine()
        return {
            "folder": run_folder(clean, folder),
            "tensors": dict(clean.tensors),
            "initial": dict(clean.initial),
            "layer": max(clean.tensors),
            "base_tensors": dict(clean.base_tensors),
            "losses": list(clean.evidence["losses"]),
            **SOUND,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on it."""
        return judged(artifact)


BENCH = TrainBench()


# the finished run


def edited(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file)


@mutant("ML301 ML305 ML706", says="said 'Paris.'")
def another_answer(artifact: Artifact) -> None:
    """The adapter says another answer than the row has."""
    rows = artifact["folder"] / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Paris.", "Lyon."))


@mutant("ML302", says="lm_head.weight is not as it was")
def changed_base(artifact: Artifact) -> None:
    """Training changed a tensor of the base."""
    artifact["base_tensors"]["lm_head.weight"] = artifact["base_tensors"]["lm_head.weight"] + 1e-3


@mutant("ML303", says="did not move")
def still_layer(artifact: Artifact) -> None:
    """One tensor of the adapter is as it was before training."""
    artifact["tensors"][artifact["layer"]] = artifact["initial"][artifact["layer"]]


@mutant("ML304")
def loss_that_stays(artifact: Artifact) -> None:
    """The loss does not fall."""
    artifact["losses"][:] = [artifact["losses"][0]] * len(artifact["losses"])


@mutant("ML305 ML403 ML702", says="logits are up to")
def zeroed_layer(artifact: Artifact) -> None:
    """A layer of the saved adapter is zero."""

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(name for name in tensors if ".lora_B." in name)].zero_()

    edited(artifact["folder"] / "adapter" / "adapter_model.safetensors", zero)


@mutant("ML305 ML325 ML702", "I61", says="merged 0.500 times")
def another_alpha(artifact: Artifact) -> None:
    """The scale is edited in the saved configuration."""
    file = artifact["folder"] / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 8}))


# the loss


@mutant("ML309", "I07", says="4 micro-batches of a row")
def mean_of_means(artifact: Artifact) -> None:
    """Each micro-batch has its own mean, and the step has the mean of these."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].mean() / trainer.current_gradient_accumulation_steps

    artifact["compute_loss"] = compute_loss


@mutant("ML309", "I07")
def divided_twice(artifact: Artifact) -> None:
    """The mean over the step's tokens is divided by the micro-batches once more."""

    def compute_loss(trainer: Any, *given: Any, **named: Any) -> Any:
        return SOUND["compute_loss"](trainer, *given, **named) / trainer.current_gradient_accumulation_steps

    artifact["compute_loss"] = compute_loss


@mutant("ML309", "I07")
def never_divided(artifact: Artifact) -> None:
    """Each micro-batch has its own mean, and the step has the sum of these."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].mean()

    artifact["compute_loss"] = compute_loss


@mutant("ML309 ML310 ML311", "I33", says="supervised tokens")
def mean_over_every_token(artifact: Artifact) -> None:
    """The sum of the supervised losses is divided by the number of all tokens."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return artifact["supervised_losses"](model, rows)[0].sum() / sum(len(row.input_ids) for row in rows)

    artifact["compute_loss"] = compute_loss


@mutant("ML322", "I45", says="does not stop the run")
def loss_of_zero_for_nan(artifact: Artifact) -> None:
    """A loss that is not a number counts as zero, and the run goes on."""

    def compute_loss(trainer: Any, model: Any, rows: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        loss = artifact["supervised_losses"](model, rows)[0].sum() / num_items_in_batch
        if torch.isfinite(loss):
            return loss
        return 0.0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)

    artifact["compute_loss"] = compute_loss


def loss_with(artifact: Artifact, labels: Callable[[StepRow], torch.Tensor]) -> None:
    """Give the loss other labels."""

    def supervised_losses(model: Any, rows: Any, **_: Any) -> Any:
        return SOUND["supervised_losses"](model, [replace(row, labels=labels(row)) for row in rows])

    artifact["supervised_losses"] = supervised_losses


@mutant("ML306 ML310 ML311", "I33", says="a gradient after")
def loss_of_every_token(artifact: Artifact) -> None:
    """A fused loss gets the ids for labels, not the masked labels."""
    loss_with(artifact, lambda row: row.input_ids)


@mutant("ML301 ML306 ML310 ML311", says="no gradient after")
def loss_without_the_shift(artifact: Artifact) -> None:
    """Each position is to predict its own token."""
    loss_with(artifact, lambda row: row.labels.roll(1))


def called_with(artifact: Artifact, **changes: Any) -> None:
    """Call the model with other arguments."""

    def supervised_losses(model: Any, rows: Any, **_: Any) -> Any:
        return SOUND["supervised_losses"](lambda **call: model(**{**call, **changes}), rows, inner=model)

    artifact["supervised_losses"] = supervised_losses


@mutant("ML312", "I43", says="passes make a key-value cache")
def cache_in_training(artifact: Artifact) -> None:
    """The model makes a cache in training, for which FlashAttention refuses rows that are padded on the right."""
    called_with(artifact, use_cache=True)


@mutant("ML301 ML309 ML310 ML311", "I20", "I21", says="rows beside one another")
def rows_that_see_one_another(artifact: Artifact) -> None:
    """The rows of a micro-batch are one text to the model."""
    called_with(artifact, segments=None, attention_mask=None, position_ids=None)


# batches and rows


def collated(artifact: Artifact, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the collator makes of the rows of a step."""

    def collate(rows: Any) -> Any:
        batch = SOUND["collate"](rows)
        return {**batch, **change(batch)}

    artifact["collate"] = collate


@mutant("ML301 ML306 ML311", "I01", says="no gradient after")
def padding_id_is_masked(artifact: Artifact) -> None:
    """No token that has the padding id is trained on: if EOS is the padding, the model never learns to stop."""
    collated(artifact, lambda batch: {"labels": batch["labels"].masked_fill(batch["input_ids"] == 2, IGNORE_INDEX)})


@mutant("ML306 ML311", says="a gradient after")
def padding_is_trained_on(artifact: Artifact) -> None:
    """Padding has its own id for a label."""

    def collate(rows: Any) -> Any:
        longest = max(len(row["input_ids"]) for row in rows)
        pads = [[0] * (longest - len(row["input_ids"])) for row in rows]
        columns = ("input_ids", "labels")
        padded = [
            {**row, **{name: [*row[name], *pad] for name in columns}} for row, pad in zip(rows, pads, strict=True)
        ]
        return SOUND["collate"](padded)

    artifact["collate"] = collate


@mutant("ML301 ML306 ML311", "I34", says="no gradient after")
def batch_that_is_cut(artifact: Artifact) -> None:
    """The collator cuts each row to a length: the last EOS of a long one is gone."""

    def collate(rows: Any) -> Any:
        return SOUND["collate"]([{**row, **{name: row[name][:20] for name in ("input_ids", "labels")}} for row in rows])

    artifact["collate"] = collate


def loaded(recipe: Any, encoder: Any, change: Callable[[list[Any]], list[Any]]) -> Any:
    """Load rows without a limit, and change what they became."""
    training = recipe.training.model_copy(update={"max_length": 10**6})
    whole = SOUND["load_data"](recipe.model_copy(update={"training": training}), encoder)
    pairs = change(list(zip(whole.train.rows, whole.train.encoded, strict=True)))
    train = replace(whole.train, rows=tuple(row for row, _ in pairs), encoded=tuple(one for _, one in pairs))
    return replace(whole, train=train)


@mutant("ML314", "I34", says="a row of 24 tokens is not refused")
def rows_that_are_cut(artifact: Artifact) -> None:
    """A row that does not fit is cut at its end."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        end = recipe.training.max_length
        return loaded(
            recipe,
            encoder,
            lambda rows: [
                (row, replace(one, input_ids=one.input_ids[:end], labels=one.labels[:end])) for row, one in rows
            ],
        )

    artifact["load_data"] = load_data


@mutant("ML314", "I06", says="it is taken")
def rows_that_are_dropped(artifact: Artifact) -> None:
    """A row that does not fit is left out without a report."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        end = recipe.training.max_length
        return loaded(recipe, encoder, lambda rows: [pair for pair in rows if len(pair[1].input_ids) <= end])

    artifact["load_data"] = load_data


@mutant("ML314", "I06", says="a row without a label")
def rows_without_labels(artifact: Artifact) -> None:
    """A row without a token to train on is accepted."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        if recipe.data.train[0].name == "unlabelled.jsonl":
            return None
        return SOUND["load_data"](recipe, encoder)

    artifact["load_data"] = load_data


@mutant("ML301 ML305 ML314 ML706", "I34", says="that every row keeps changes a row")
def eos_without_a_label(artifact: Artifact) -> None:
    """With a limit of length, EOS has no label, even if nothing is cut."""

    def load_data(recipe: Any, encoder: Any) -> Any:
        whole = SOUND["load_data"](recipe, encoder)
        rows = tuple(replace(one, labels=_without(one.labels, encoder.eos_id)) for one in whole.train.encoded)
        return replace(whole, train=replace(whole.train, encoded=rows))

    artifact["load_data"] = load_data


def _without(labels: Sequence[int], token: int) -> tuple[int, ...]:
    return tuple(IGNORE_INDEX if label == token else label for label in labels)


# seeds, order, resuming


@mutant("ML307 ML316 ML318", "I35", says="the same seed gives other first values")
def seed_after_the_adapter(artifact: Artifact) -> None:
    """The adapter is drawn before the seed is set."""

    def attach_adapter(model: Any, lora: Any, layers: Any, *, seed: int) -> Any:
        model = SOUND["attach_adapter"](model, lora, layers, seed=int.from_bytes(os.urandom(4)))
        set_seed(seed)
        return model

    artifact["attach_adapter"] = attach_adapter


@mutant("ML316", "I35", says="another seed gives the same first values")
def first_values_without_a_seed(artifact: Artifact) -> None:
    """The adapter's first values are always those of one seed."""

    def attach_adapter(model: Any, lora: Any, layers: Any, *, seed: int) -> Any:
        model = SOUND["attach_adapter"](model, lora, layers, seed=0)
        set_seed(seed)
        return model

    artifact["attach_adapter"] = attach_adapter


def remade(
    artifact: Artifact, change: Callable[[Any], Any], after: Callable[[Any], None] = lambda trainer: None
) -> None:
    """Make the trainer with other settings of training, and change it afterwards."""

    def make_trainer(model: Any, training: Any, *given: Any, **named: Any) -> Any:
        trainer = SOUND["make_trainer"](model, training.model_copy(update=change(training)), *given, **named)
        after(trainer)
        return trainer

    artifact["make_trainer"] = make_trainer


@mutant("ML317", "I35", says="another seed gives the same order")
def order_without_a_seed(artifact: Artifact) -> None:
    """The rows always come in the order of one seed."""
    remade(artifact, lambda training: {"order_seed": 0})


@mutant("ML317", says="training.order_seed")
def order_of_the_other_seed(artifact: Artifact) -> None:
    """The order's own seed is not looked at."""
    remade(artifact, lambda training: {"order_seed": training.seed})


@mutant("ML307 ML317 ML318", says="the same seed gives another order")
def order_by_chance(artifact: Artifact) -> None:
    """The rows come in another order in every run."""
    remade(artifact, lambda training: {"order_seed": int.from_bytes(os.urandom(4))})


@mutant("ML307 ML316 ML317", says="another seed gives the same adapter")
def seed_that_decides_nothing(artifact: Artifact) -> None:
    """Whatever the seed, first values, dropout and order are those of seed 0."""
    artifact["attach_adapter"] = lambda model, lora, layers, seed: SOUND["attach_adapter"](model, lora, layers, seed=0)
    remade(artifact, lambda training: {"seed": 0, "order_seed": 0})


@mutant("ML318", says="broken off and resumed")
def resumed_from_the_first_row(artifact: Artifact) -> None:
    """A resumed run begins its epoch again."""
    remade(artifact, lambda training: {}, lambda trainer: setattr(trainer.args, "ignore_data_skip", True))


@mutant("ML318")
def resumed_without_the_optimizer(artifact: Artifact) -> None:
    """A resumed run has the weights of the checkpoint, and a new optimizer."""
    remade(artifact, lambda training: {}, lambda trainer: _without_method(trainer, "_load_optimizer_and_scheduler"))


@mutant("ML318")
def resumed_with_other_dropout(artifact: Artifact) -> None:
    """A resumed run does not restore the random state."""
    remade(artifact, lambda training: {}, lambda trainer: _without_method(trainer, "_load_rng_state"))


def _without_method(trainer: Any, name: str) -> None:
    setattr(trainer, name, lambda *given: None)


# layers and precision


@mutant("ML315", "I18", says="RuntimeError")
def reentrant_checkpointing(artifact: Artifact) -> None:
    """Activation checkpointing is reentrant, and no input of the layers needs a gradient."""

    def checkpoint_activations(model: Any) -> None:
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        base.disable_input_require_grads()

    artifact["checkpoint_activations"] = checkpoint_activations


@mutant("ML315", "I18", says="tensors lose or gain a gradient")
def reentrant_first_layer(artifact: Artifact) -> None:
    """Only the first layer is checkpointed in the reentrant way: it gets no gradient, and the others train."""

    def checkpoint_activations(model: Any) -> None:
        first = model.get_base_model().model.layers[0]
        own = first.forward
        first.forward = lambda *given, **named: torch.utils.checkpoint.checkpoint(
            lambda *inner: own(*inner, **named), *given, use_reentrant=True
        )

    artifact["checkpoint_activations"] = checkpoint_activations


@mutant("ML319", "I50", says="'kproj'")
def any_name_that_matches(artifact: Artifact) -> None:
    """A target that matches nothing is left out, as PEFT does."""

    def adapted_layers(folder: Path, targets: Sequence[str]) -> Any:
        found = []
        for target in targets:
            try:
                found += SOUND["adapted_layers"](folder, [target])
            except RecipeError:
                continue
        return found

    artifact["adapted_layers"] = adapted_layers


def with_peft(model: Any, seed: int, **config: Any) -> Any:
    """Attach an adapter with PEFT alone, unchecked."""
    set_seed(seed)
    return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **config}))


@mutant("ML301 ML307 ML316 ML317 ML318 ML319 ML322", "I50", says="'q_proj': 2, 'v_proj': 2")
def targets_of_peft(artifact: Artifact) -> None:
    """The target modules do not reach PEFT, which has its own for Mistral; the run then refuses its adapter."""
    artifact["attach_adapter"] = lambda model, lora, layers, seed: with_peft(model, seed, lora_dropout=lora.dropout)


@mutant("ML301 ML302 ML305 ML311 ML318 ML321", says="tensors lose or gain a gradient")
def head_that_is_trained(artifact: Artifact) -> None:
    """The head is trained beside the adapter, which alone is saved."""

    def attach_adapter(model: Any, *given: Any, **named: Any) -> Any:
        model = SOUND["attach_adapter"](model, *given, **named)
        model.get_base_model().lm_head.requires_grad_(True)
        return model

    artifact["attach_adapter"] = attach_adapter


@mutant("ML320", "I49", says="0 of 16 tensors move")
def frozen_adapter(artifact: Artifact) -> None:
    """An adapter that is loaded frozen goes through a run in which nothing moves."""

    def make_trainer(model: Any, *given: Any, **named: Any) -> Any:
        if any(parameter.requires_grad for parameter in model.parameters()):
            return SOUND["make_trainer"](model, *given, **named)
        first = next(model.parameters()).requires_grad_(True)
        trainer = SOUND["make_trainer"](model, *given, **named)
        first.requires_grad_(False)
        model.get_base_model().enable_input_require_grads()
        trainer.remove_callback(StopAtNonFinite)
        return trainer

    artifact["make_trainer"] = make_trainer


@mutant("ML321 ML322", "I44", says="trainable parameters are in torch.bfloat16")
def adapter_in_half_precision(artifact: Artifact) -> None:
    """The adapter has the base's precision; the run then refuses to save it."""

    def attach_adapter(model: Any, *given: Any, **named: Any) -> Any:
        model = SOUND["attach_adapter"](model, *given, **named)
        return model.to(next(model.parameters()).dtype)

    artifact["attach_adapter"] = attach_adapter


def loads(artifact: Artifact, **settings: Any) -> None:
    """Load the base with other settings."""

    def load_base(folder: Path, precision: str, device: str) -> Any:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        model = MistralForCausalLM.from_pretrained(folder, **{"dtype": dtype, **settings})
        model.config.use_cache = False
        return model

    artifact["load_base"] = load_base


@mutant("ML321", "I46", says="the base is in torch.bfloat16")
def precision_of_the_checkpoint(artifact: Artifact) -> None:
    """The base is loaded in the precision that the checkpoint is stored in."""
    loads(artifact, dtype="auto")


@mutant("ML323", "I57", says="the loaded model's window is 4096")
def window_of_the_first_mistral(artifact: Artifact) -> None:
    """The window is the default of transformers, not the checkpoint's."""
    loads(artifact, sliding_window=4096)


@mutant("ML323", "I57", says="the loaded model's window is None")
def no_window(artifact: Artifact) -> None:
    """The checkpoint's window is left out."""
    loads(artifact, sliding_window=None)


# numbers that are not finite


@mutant("ML322", "I45")
def steps_that_are_skipped(artifact: Artifact) -> None:
    """A gradient that is not finite counts as zero, as with a gradient scaler for half precision."""

    class Zero(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    def after(trainer: Any) -> None:
        trainer.remove_callback(StopAtNonFinite)
        trainer.add_callback(Zero())

    remade(artifact, lambda training: {}, after)


# packing


def packed_otherwise(artifact: Artifact, **changes: Any) -> None:
    """Call the model for packed rows with other arguments."""
    artifact["packed_call"] = lambda rows: {**SOUND["packed_call"](rows), **changes}


@mutant("ML313", "I20", says="packed rows see one another")
def no_position_ids(artifact: Artifact) -> None:
    """Packed rows are one text: no position restarts."""
    packed_otherwise(artifact, position_ids=None)


@mutant("ML313", "I21")
def packed_with_a_cache(artifact: Artifact) -> None:
    """Packed rows are passed with a cache, which turns their isolation off."""
    packed_otherwise(artifact, use_cache=True)


@mutant("ML313", "I21")
def packed_with_a_mask(artifact: Artifact) -> None:
    """Packed rows are passed with a mask of ones, which turns their isolation off."""

    def packed_call(rows: Any) -> Any:
        call = SOUND["packed_call"](rows)
        return {**call, "attention_mask": torch.ones_like(call["input_ids"])}

    artifact["packed_call"] = packed_call


# generation and merging


def generates_in_a_batch(artifact: Artifact, *, left: bool, masked: bool) -> None:
    """Generate all rows at once."""

    def generate(model: Any, encoder: Any, rows: Any, *, max_new_tokens: int = 256) -> Any:
        if not rows:
            return []
        prompts = [list(encoder.prompt(row)) for row in rows]
        length = max(map(len, prompts))
        pad = 0 if masked else encoder.vocab_size - 1
        ids = torch.tensor([_padded(prompt, length, pad, left) for prompt in prompts])
        mask = torch.tensor([_padded([1] * len(prompt), length, 0 if masked else 1, left) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=encoder.eos_id, pad_token_id=0)
        with torch.inference_mode():
            found = model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, length:]
        return [_completion(one, encoder, row, index) for index, (one, row) in enumerate(zip(found, rows, strict=True))]

    artifact["generate"] = generate


def _padded(ids: list[int], length: int, pad: int, left: bool) -> list[int]:
    padding = [pad] * (length - len(ids))
    return padding + ids if left else ids + padding


def _completion(found: Any, encoder: Any, row: Any, index: int) -> Any:
    from pytest_mistral_lora.training.generate import Completion, last_turn_ids

    ids = found.tolist()
    ids = tuple(ids[: ids.index(encoder.eos_id) + 1] if encoder.eos_id in ids else ids)
    expected = last_turn_ids(encoder.encode(row))
    stop = "eos" if ids and ids[-1] == encoder.eos_id else "length"
    return Completion(index, 0, ids, encoder.decode(ids), stop, expected, ids == expected)


@mutant("ML301 ML324", "I42", says="as a greedy search by hand does")
def padded_on_the_right(artifact: Artifact) -> None:
    """Prompts of a batch are padded on the right."""
    generates_in_a_batch(artifact, left=False, masked=True)


@mutant("ML301 ML324", "I41")
def batch_without_a_mask(artifact: Artifact) -> None:
    """A batch is padded on the left, and the padding is not masked, so answers differ from those of single prompts."""
    generates_in_a_batch(artifact, left=True, masked=False)


def merges(artifact: Artifact, change: Callable[[Any, Any], None]) -> None:
    """Merge, and change the weights: given the merged model's and the base's, by name."""

    def merged(adapter: Path, base: Path) -> Any:
        model = SOUND["merged"](adapter, base)
        with torch.no_grad():
            change(model.state_dict(), load_file(base / "model.safetensors"))
        return model

    artifact["merged"] = merged


@mutant("ML325", "I15", says="logits are")
def merged_in_bfloat16(artifact: Artifact) -> None:
    """The merged weights are rounded to bfloat16."""

    def change(weights: Any, base: Any) -> None:
        for weight in weights.values():
            weight.copy_(weight.to(torch.bfloat16))

    merges(artifact, change)


@mutant("ML325", "I15")
def merged_into_a_quantised_base(artifact: Artifact) -> None:
    """The base is rounded to 4 bits before the adapter is merged into it."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            if "_proj" in name:
                step = base[name].abs().amax(dim=1, keepdim=True) / 7
                weight.add_((base[name] / step).round() * step - base[name])

    merges(artifact, change)


@mutant("ML325", "I61", says="merged 2.000 times")
def merged_twice(artifact: Artifact) -> None:
    """The adapter is merged into a base that has it already."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            weight.add_(weight - base[name])

    merges(artifact, change)


@mutant("ML325", "I61", says="merged 0.000 times")
def not_merged(artifact: Artifact) -> None:
    """The merged model is the base."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            weight.copy_(base[name])

    merges(artifact, change)
