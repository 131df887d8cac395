"""Healthy runs of a real `Trainer`, which the guard lets go on. `scripts/write_docs.py` makes a list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from guard_faults import Stream, with_experts
from guarded_runs import chat_rows, encoded, lora_model
from planned_runs import SIZE, STEPS, Batch, Plan, learned, mean_loss, token_losses
from torch.nn.functional import cross_entropy, kl_div
from transformers import DataCollatorWithFlattening, TrainerCallback

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base


@dataclass(frozen=True)
class Healthy:
    """A healthy run.

    Attributes:
        set_up: Sets up a plan. Its name is that of the run, its docstring says what is special.
        note: The rule of the one note that the guard gives; empty for none.
        says: Words of the note.
        unchecked: Why the guard does not check the loss; empty if it does.
        unchecked_if_sure: The same of a model that has learned the rows by heart; None if it is no other.
        steps: For how many steps the model has learned the rows by heart, in each run.
        is_sampled: Whether each run of the tests has it; the sweeps have the others.
    """

    set_up: Callable[[Plan], None]
    note: str = ""
    says: str = ""
    unchecked: str = ""
    unchecked_if_sure: str | None = None
    steps: tuple[int, ...] = (0,)
    is_sampled: bool = False

    @property
    def name(self) -> str:
        return self.set_up.__name__.replace("_", "-")

    @property
    def words(self) -> str:
        return " ".join((self.set_up.__doc__ or "").split())

    def reason(self, steps: int) -> str:
        """Return why the loss of a model is not checked; empty if it is."""
        return self.unchecked if not steps or self.unchecked_if_sure is None else self.unchecked_if_sure


def healthy(note: str = "", says: str = "", **given: Any) -> Callable[[Callable[[Plan], None]], Healthy]:
    """Make a healthy run of the function that sets it up."""
    return lambda set_up: Healthy(set_up, note, says, **given)


def of_loss(note: str = "", says: str = "", **given: Any) -> Callable[[Callable[[Plan], None]], Healthy]:
    """Make a healthy run whose gradient is special, also of a model that has learned the rows by heart."""
    return healthy(note, says, **{"steps": (0, *STEPS), **given})


def healthy_runs() -> Iterator[Healthy]:
    """Yield the runs in the order in which they are written."""
    yield from (value for value in globals().values() if isinstance(value, Healthy))


# -- the loss


@of_loss(is_sampled=True)
def loss_of_transformers(plan: Plan) -> None:
    """the loss of transformers"""


@of_loss(unchecked_if_sure="the model is too sure of each label")
def label_smoothing(plan: Plan) -> None:
    """`label_smoothing_factor`"""
    plan.settings["label_smoothing_factor"] = 0.1


@of_loss()
def neftune(plan: Plan) -> None:
    """NEFTune"""
    plan.settings |= {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}


@of_loss()
def loss_func_of_the_users(plan: Plan) -> None:
    """a `compute_loss_func` of your own"""

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return token_losses(outputs.logits, labels).sum() / num_items_in_batch

    plan.loss_func = loss


@of_loss()
def shift_labels(plan: Plan) -> None:
    """`shift_labels` of the collator"""

    def change(batch: Batch) -> None:
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()

    plan.collated = change


@of_loss()
def sum_of_losses(plan: Plan) -> None:
    """a sum of the losses"""
    plan.own_loss = lambda logits, batch: token_losses(logits, batch["labels"]).sum()


@of_loss()
def mean_of_rows(plan: Plan) -> None:
    """the mean of each row's mean"""

    def mean(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses = token_losses(logits, batch["labels"])
        return (losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).mean()

    plan.own_loss = mean


@of_loss()
def dynamic_fine_tuning(plan: Plan) -> None:
    """dynamic fine-tuning (DFT)"""

    def weighed(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses = token_losses(logits, batch["labels"])
        return (losses * torch.exp(-losses.detach())).mean()

    plan.own_loss = weighed


@of_loss("ML327", "the labels of a row weigh differently", steps=STEPS)
def focal_loss(plan: Plan) -> None:
    """a focal loss"""

    def weighed(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        losses = token_losses(logits, batch["labels"])
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()

    plan.own_loss = weighed


def _norms(logits: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(logits.float(), -1)[:, :-1] ** 2


@of_loss(unchecked_if_sure="is not that of one token")
def z_loss(plan: Plan) -> None:
    """a z-loss of the labels"""
    plan.own_loss = lambda logits, batch: (
        mean_loss(logits, batch["labels"]) + 1e-4 * _norms(logits)[batch["labels"][:, 1:] != -100].mean()
    )


@of_loss("ML327", "'[INST]' (3) at row 0, token 1")
def z_loss_of_every_token(plan: Plan) -> None:
    """a z-loss of every token"""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["labels"]) + 1e-4 * _norms(logits).mean()


def _distances(logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the KL divergences of each position, `(batch, length - 1)`."""
    sides = logits[:, :-1].float().log_softmax(-1), other[:, :-1].detach().float().log_softmax(-1)
    return kl_div(*sides, log_target=True, reduction="none").sum(-1)


def _beside_the_base(plan: Plan, *, steps: int, of_labels: bool) -> None:
    """Keep the model near a base that has learned the rows for some steps."""
    weights = learned(plan.base)[steps] if steps else None
    base = lora_model(plan.base, adapter=False, weights=weights).eval()

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            other = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        apart = _distances(logits, other)
        apart = apart[batch["labels"][:, 1:] != -100] if of_labels else apart[batch["attention_mask"][:, 1:] == 1]
        return mean_loss(logits, batch["labels"]) + 0.05 * apart.mean()

    plan.own_loss = loss


@of_loss("ML327", "'[INST]' (3) at row 0, token 1")
def small_loss_of_the_prompt(plan: Plan) -> None:
    """a tenth of the loss on the prompt, which nothing declares"""
    plan.own_loss = lambda logits, batch: (
        mean_loss(logits, batch["labels"]) + 0.1 * mean_loss(logits, batch["input_ids"])
    )


@of_loss("ML327", "weigh differently", steps=(0, 40))
def eos_weighs_twice(plan: Plan) -> None:
    """twice the loss of EOS, which nothing declares"""
    plan.own_loss = lambda logits, batch: (
        token_losses(logits, batch["labels"]) * torch.where(batch["labels"][:, 1:] == 2, 2.0, 1.0)
    ).mean()


@of_loss("ML327", "'[INST]' (3) at row 0, token 1")
def kl_to_the_base(plan: Plan) -> None:
    """a KL divergence to the base on every token"""
    _beside_the_base(plan, steps=0, of_labels=False)


@of_loss("ML327", "'[INST]' (3) at row 0, token 1")
def kl_to_a_base_that_is_sure_of_the_prompts(plan: Plan) -> None:
    """a KL divergence to a base that is sure of the prompts"""
    _beside_the_base(plan, steps=100, of_labels=False)


@healthy()
def kl_to_a_sure_base_at_labels(plan: Plan) -> None:
    """a KL divergence to another model on the labels"""
    _beside_the_base(plan, steps=40, of_labels=True)


@of_loss(unchecked="is not that of one token")
def distillation(plan: Plan) -> None:
    """a distillation from the probabilities of a teacher"""
    teacher = lora_model(plan.base, adapter=False, weights=learned(plan.base)[40]).eval()

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits / 2
        return _distances(logits / 2, wanted)[batch["labels"][:, 1:] != -100].mean()

    plan.own_loss = loss


def _weighed(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    weights = batch["loss_weights"][:, 1:]
    return (token_losses(logits, batch["input_ids"]) * weights).sum() / weights.sum()


@of_loss()
def column_of_weights(plan: Plan) -> None:
    """a column of weights"""
    plan.own_loss = _weighed
    plan.collated = lambda batch: batch | {"loss_weights": (batch["labels"] != -100) * (1 + batch["labels"] % 3 / 2)}


@of_loss()
def column_of_the_mask(plan: Plan) -> None:
    """a column with the mask of the loss"""
    plan.own_loss = _weighed
    plan.collated = lambda batch: batch | {"loss_weights": (batch["labels"] != -100).long()}


@of_loss()
def column_of_weights_with_the_prompt(plan: Plan) -> None:
    """a column of weights with a small one for the prompt"""
    plan.own_loss = _weighed
    plan.collated = lambda batch: (
        batch | {"loss_weights": (0.1 + 0.9 * (batch["labels"] != -100)) * batch["attention_mask"]}
    )


# -- the adapter and the model


@healthy()
def lora_plus(plan: Plan) -> None:
    """LoRA+"""

    def optimize(trainer: Any) -> None:
        named = [(name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for name, weight in named if ("lora_B" in name) is of_b], "lr": rate}
            for of_b, rate in ((False, 1e-4), (True, 1.6e-3))
        ]
        trainer.optimizer = torch.optim.AdamW(groups)

    plan.after = optimize


@healthy()
def lora_fa(plan: Plan) -> None:
    """LoRA-FA"""

    def freeze(model: Any) -> None:
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.requires_grad_(False)

    plan.before = freeze


@of_loss()
def pissa(plan: Plan) -> None:
    """PiSSA"""
    plan.lora = {"init_lora_weights": "pissa_niter_4", "lora_dropout": 0.0}


@of_loss()
def dora(plan: Plan) -> None:
    """DoRA"""
    plan.lora = {"use_dora": True}


@healthy()
def rslora(plan: Plan) -> None:
    """rsLoRA"""
    plan.lora = {"use_rslora": True}


@of_loss()
def adapter_on_the_head(plan: Plan) -> None:
    """an adapter on the head"""
    plan.lora = {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0, "init_lora_weights": False}


@of_loss()
def modules_to_save(plan: Plan) -> None:
    """`modules_to_save` with the head and the embeddings"""
    plan.lora = {"modules_to_save": ["lm_head", "embed_tokens"]}


@of_loss()
def full_fine_tune(plan: Plan) -> None:
    """a full fine-tune"""
    plan.lora = None


@healthy()
def experts(plan: Plan) -> None:
    """a model of experts with a loss of its router"""
    with_experts(plan)


@healthy()
def tied_head(plan: Plan) -> None:
    """embeddings that are tied to the head"""
    plan.base = write_tiny_base(plan.folder / "tied", shipped_tokenizer("spm-v3"), tied=True)
    plan.lora = None


class _OwnHead(torch.nn.Module):
    """A head with a bias and a cap of the logits."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.bias = inner, torch.nn.Parameter(torch.linspace(-1, 1, inner.out_features))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh((self.inner(hidden) + self.bias) / 30)


@of_loss()
def head_of_the_users(plan: Plan) -> None:
    """a head of your own, with a bias and a cap"""
    plan.lora = None
    plan.before = lambda model: model.set_output_embeddings(_OwnHead(model.get_output_embeddings()))


# -- the settings


@of_loss(unchecked_if_sure="the model is too sure of each label")
def model_in_bfloat16(plan: Plan) -> None:
    """a model in bfloat16"""
    plan.lora = None
    plan.before = lambda model: model.to(torch.bfloat16)


@of_loss(unchecked_if_sure="the model is too sure of each label")
def loss_in_bfloat16(plan: Plan) -> None:
    """a loss of logits in bfloat16"""
    model_in_bfloat16.set_up(plan)
    plan.own_loss = lambda logits, batch: cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@of_loss(unchecked_if_sure="the model is too sure of each label")
def autocast_to_bfloat16(plan: Plan) -> None:
    """`bf16=True`"""
    plan.settings["bf16"] = True


@healthy()
def gradient_accumulation(plan: Plan) -> None:
    """gradient accumulation"""
    plan.settings |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    plan.settings["average_tokens_across_devices"] = False


@healthy()
def gradient_checkpointing(plan: Plan) -> None:
    """gradient checkpointing"""
    plan.settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@healthy()
def reentrant_checkpointing(plan: Plan) -> None:
    """gradient checkpointing of the reentrant form"""
    plan.settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@healthy()
def warm_up(plan: Plan) -> None:
    """a warm-up, whose first step has a rate of 0"""
    plan.settings |= {"warmup_steps": 2, "max_steps": 3}


class _Scaler(TrainerCallback):  # type: ignore[misc]
    """Divides the gradients before each step, as a GradScaler does, and skips the first one."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad = None if state.global_step == 0 else weight.grad / 2**16


@of_loss()
def scaled_loss_with_a_skipped_step(plan: Plan) -> None:
    """a scaled loss, of which a step is skipped"""
    plan.own_loss = lambda logits, batch: mean_loss(logits, batch["labels"]) * 2**16
    plan.after = lambda trainer: trainer.add_callback(_Scaler())


@healthy(unchecked="is not finite")
def gradient_that_overflows(plan: Plan) -> None:
    """a gradient that overflows in the first step"""

    class Once:
        is_first = True

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        scale = torch.inf if Once.is_first else 1.0
        Once.is_first = False
        return mean_loss(logits, batch["labels"]) * scale

    plan.own_loss = loss
    plan.after = lambda trainer: trainer.add_callback(_Scaler())


# -- the rows and their order


@healthy()
def rows_with_messages(plan: Plan) -> None:
    """rows with their messages"""
    plan.has_messages = True


@healthy(is_sampled=True)
def packed(plan: Plan) -> None:
    """packed rows with positions"""
    plan.after = lambda trainer: setattr(trainer, "data_collator", DataCollatorWithFlattening())


@healthy()
def group_by_length(plan: Plan) -> None:
    """rows grouped by length"""
    plan.settings["train_sampling_strategy"] = "group_by_length"


@healthy(is_sampled=True)
def stream(plan: Plan) -> None:
    """a stream"""
    plan.of_dataset = Stream


@healthy()
def worker_processes(plan: Plan) -> None:
    """worker processes"""
    plan.settings["dataloader_num_workers"] = 2


@healthy()
def evaluation(plan: Plan) -> None:
    """an evaluation before and after each step"""
    plan.evaluation = Dataset.from_list(encoded(plan.oracle, chat_rows(SIZE + 4)[SIZE:]))
    plan.settings |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}


@healthy()
def padding_in_front(plan: Plan) -> None:
    """padding in front"""
    plan.tokenizer.padding_side = "left"


@healthy()
def pad_that_is_eos(plan: Plan) -> None:
    """a pad token that is EOS, and labels that are masked by position"""
    plan.tokenizer.pad_token = plan.tokenizer.eos_token


@healthy()
def last_answers_alone(plan: Plan) -> None:
    """the objective `last-answer`"""
    plan.talk(("user", "What is {}?"), ("assistant", "I guess."), ("user", "Sure?"), ("assistant", "Yes."))
    plan.guarded["objective"] = "last-answer"
    for row in plan.rows:
        end = len(row["labels"]) - row["labels"][::-1].index(-100)
        row["labels"] = [-100] * end + row["labels"][end:]


@healthy()
def resumed(plan: Plan) -> None:
    """a run that is resumed"""
    saving = {"save_strategy": "steps", "save_steps": 2}
    before = Plan(plan.base, plan.folder, settings=saving).trainer()
    before.train()
    plan.settings |= {"max_steps": 4, "resume_from_checkpoint": str(plan.folder / "checkpoint-2")}
