"""The example of each rule of `train`: a change that breaks the rule, and its sound twin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import mutants_train_layers as layers
import mutants_train_loaded as loaded
import mutants_train_loss as loss
import mutants_train_rows as rows
import mutants_train_saved as saved
import mutants_train_seeds as seeds
from gallery import Artifact, Example
from guarded_runs import grown_model
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss


class ML301(Example):
    mutant = saved.another_answer

    def sound(self, artifact: Artifact) -> None:
        rows = artifact["folder"] / "rows.jsonl"
        rows.write_text(rows.read_text().replace("Lyon.", "Paris."))
        artifact["losses"][:] = [2.5, 1.1, 0.3]


class ML302(Example):
    mutant = saved.changed_base

    def sound(self, artifact: Artifact) -> None:
        artifact["base_tensors"]["lm_head.weight"] = artifact["base_tensors"]["lm_head.weight"] + 0


class ML303(Example):
    mutant = saved.still_layer

    def sound(self, artifact: Artifact) -> None:
        artifact["tensors"][artifact["layer"]] = artifact["initial"][artifact["layer"]] + 0.01


class ML305(Example):
    mutant = saved.another_alpha

    def sound(self, artifact: Artifact) -> None:
        config = artifact["folder"] / "adapter" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))


class ML307(Example):
    mutant = seeds.seed_after_the_adapter

    def sound(self, artifact: Artifact) -> None:
        def attach_adapter(model, lora, layers, *, seed, own=artifact["attach_adapter"]):
            return own(model, lora, layers, seed=seed)

        def make_trainer(*given, own=artifact["make_trainer"], **named):
            return own(*given, **named)

        artifact.update(attach_adapter=attach_adapter, make_trainer=make_trainer)


class ML311(Example):
    mutant = loss.mean_over_every_token

    def sound(self, artifact: Artifact) -> None:
        def collate(rows, own=artifact["collate"]):
            batch = own(rows)
            return {**batch, "labels": batch["labels"]}

        def supervised_losses(model, rows, own=artifact["supervised_losses"], **_):
            return own(lambda **call: model(**{**call, "use_cache": False}), rows, inner=model)

        def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):
            return supervised_losses(model, rows)[0].sum() / num_items_in_batch

        artifact.update(collate=collate, supervised_losses=supervised_losses, compute_loss=compute_loss)


class ML313(Example):
    mutant = rows.packed_with_a_cache

    def sound(self, artifact: Artifact) -> None:
        artifact["packed_call"] = lambda rows, own=artifact["packed_call"]: {**own(rows), "use_cache": False}


class ML314(Example):
    mutant = rows.rows_that_are_cut

    def sound(self, artifact: Artifact) -> None:
        def load_data(recipe, encoder, own=artifact["load_data"]):
            return own(recipe, encoder)

        artifact["load_data"] = load_data


class ML315(Example):
    mutant = layers.reentrant_checkpointing

    def sound(self, artifact: Artifact) -> None:
        def checkpoint_activations(model):
            base = model.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()

        artifact["checkpoint_activations"] = checkpoint_activations


class ML318(Example):
    mutant = seeds.resumed_from_the_first_row

    def sound(self, artifact: Artifact) -> None:
        def make_trainer(*given, own=artifact["make_trainer"], **named):
            trainer = own(*given, **named)
            trainer.args.ignore_data_skip = False
            return trainer

        artifact["make_trainer"] = make_trainer


class ML319(Example):
    mutant = layers.any_name_that_matches

    def sound(self, artifact: Artifact) -> None:
        def adapted_layers(folder, targets, own=artifact["adapted_layers"]):
            return own(folder, list(targets))

        artifact["adapted_layers"] = adapted_layers


class ML320(Example):
    mutant = layers.frozen_adapter

    def sound(self, artifact: Artifact) -> None:
        def make_trainer(model, *given, own=artifact["make_trainer"], **named):
            if not any(one.requires_grad for one in model.parameters()):
                [one.requires_grad_() for name, one in model.named_parameters() if ".lora_" in name]
            return own(model, *given, **named)

        artifact["make_trainer"] = make_trainer


class ML321(Example):
    mutant = layers.precision_of_the_checkpoint

    def sound(self, artifact: Artifact) -> None:
        def load_base(folder, precision, device, own=artifact["load_base"]):
            return own(folder, precision, device)

        artifact["load_base"] = load_base


class ML322(Example):
    mutant = loss.loss_of_zero_for_nan

    def sound(self, artifact: Artifact) -> None:
        def compute_loss(trainer, model, rows, *_, num_items_in_batch=None, **__):
            loss = artifact["supervised_losses"](model, rows)[0].sum() / num_items_in_batch
            return loss

        artifact["compute_loss"] = compute_loss


class ML324(Example):
    def broken(self, artifact: Artifact) -> None:
        def generate(model, encoder, rows, own=artifact["generate"], **named):
            return [replace(one, ids=one.ids[1:]) for one in own(model, encoder, rows, **named)]

        artifact["generate"] = generate

    def sound(self, artifact: Artifact) -> None:
        def generate(model, encoder, rows, own=artifact["generate"], **named):
            return [replace(one, ids=one.ids) for one in own(model, encoder, rows, **named)]

        artifact["generate"] = generate


class ML325(Example):
    mutant = saved.merged_in_bfloat16

    def sound(self, artifact: Artifact) -> None:
        artifact["merged"] = lambda adapter, base, own=artifact["merged"]: own(adapter, base).float()


class ML326(Example):
    mutant = loss.labels_shifted_twice

    def sound(self, artifact: Artifact) -> None:
        def compute_loss(outputs, labels, num_items_in_batch=None):
            logits = outputs.logits
            return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)

        artifact["compute_loss_func"] = compute_loss


class ML327(Example):
    mutant = loss.eos_counted_twice

    def sound(self, artifact: Artifact) -> None:
        def compute_loss(outputs, labels, num_items_in_batch=None):
            return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        artifact["compute_loss_func"] = compute_loss


class ML328(Example):
    mutant = loaded.theta_that_is_changed_later

    def sound(self, artifact: Artifact) -> None:
        loaded.with_theta(artifact, 10_000.0)


class ML329(Example):
    mutant = loaded.rows_that_nobody_trains

    def sound(self, artifact: Artifact) -> None:
        artifact["guarded"] = {"model": partial(grown_model, modules_to_save=["embed_tokens"])}
