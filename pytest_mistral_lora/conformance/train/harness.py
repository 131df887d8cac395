"""A bed to try the trainer on: the tiny base with the target's rows, and single steps of the trainer's own loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.finding import Finding

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
    from pytest_mistral_lora.training.recipe import Recipe


_RANK = 8
_ALPHA = 16
SCALE = _ALPHA / _RANK
"""How much the adapter's update counts: alpha / r."""

_CACHES = {"past_key_values", "cache"}
"""What a decoder's output calls its cache: transformers 4, and 5.24."""

ROWS = 4
"""Rows of a step; they are of different lengths."""


@dataclass(frozen=True)
class Call:
    """One pass through the model's decoder.

    Attributes:
        training: Whether the model was in training mode.
        ids: The ids that it was given, of all rows.
        cache: Whether it made a key-value cache.
    """

    training: bool
    ids: tuple[int, ...]
    cache: bool


@dataclass(frozen=True)
class Step:
    """What the trainer's loop did in one optimizer step, before it changed a weight.

    Attributes:
        loss: The loss that it logged, in nats a supervised token.
        gradients: Gradient of each trainable tensor that has one, by the adapter's names; CPU float32.
        calls: The passes through the model, in order.
        predicting: The tokens whose last hidden state has a gradient: the loss looks at what follows them.
    """

    loss: float
    gradients: Mapping[str, torch.Tensor]
    calls: Sequence[Call]
    predicting: Sequence[int]


@dataclass(frozen=True)
class Bed:
    """A folder of a tiny run, to judge the trainer in.

    Attributes:
        folder: It has `base`, `rows.jsonl` and the trained `adapter`.
        scratch: An existing folder for what is made in judging.
        device: `auto`, `cpu` or `cuda`.
    """

    folder: Path
    scratch: Path
    device: str

    @property
    def base(self) -> Path:
        """The base checkpoint."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The adapter that the tiny run saved."""
        return self.folder / "adapter"

    @cached_property
    def encoder(self) -> Encoder:
        """The backend of the run."""
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        return make_encoder("mistral-common", CheckpointTokenizer(self.base))

    @cached_property
    def encoded(self) -> list[EncodedRow]:
        """Every row of the run, by Mistral's own tokenization."""
        from pytest_mistral_lora.chat.rows import read_rows

        return [self.encoder.encode(row) for row in read_rows(self.folder / "rows.jsonl")]

    @cached_property
    def _weights_sha256(self) -> str:
        from pytest_mistral_lora.records.hashing import base_weights_sha256

        return base_weights_sha256(self.base)

    def recipe(self, output: str = "out", *, lora: Mapping[str, Any] | None = None, **training: Any) -> Recipe:
        """Return a recipe for the rows of the run, with these settings of training."""
        from pytest_mistral_lora.training.recipe import parse_recipe

        settings = {
            "steps": 1,
            "batch_size": ROWS,
            "learning_rate": 0.01,
            "schedule": "constant",
            "dry_run": False,
            "precision": "fp32",
            "logging_steps": 1,
            "device": self.device,
        }
        data = {
            "base": {"path": str(self.base), "weights_sha256": self._weights_sha256, "name": "base"},
            "data": {"train": [str(self.folder / "rows.jsonl")]},
            "lora": {"r": _RANK, "alpha": _ALPHA, **(lora or {})},
            "training": settings | training,
            "output": output,
        }
        return parse_recipe(data, folder=self.scratch, place="the tiny run's recipe")

    def new_model(self, recipe: Recipe, base: Path | None = None) -> Any:
        """Return the base with a new adapter on it, as the trainer makes them."""
        from pytest_mistral_lora.checkpoint.base_model import load_base
        from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
        from pytest_mistral_lora.training.devices import on_gpu, precision_of

        base = base or self.base
        training = recipe.training
        layers = adapted_layers(base, recipe.lora.target_modules)
        model = load_base(base, precision_of(training), "cuda" if on_gpu(training) else "cpu")
        return attach_adapter(model, recipe.lora, layers, seed=training.seed)

    def model(self) -> Any:
        """Return the base with an adapter that no seed decides, away from its start, where half has no gradient."""
        import torch

        model = self.new_model(self.recipe())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    scale = 0.02 if ".lora_B." in name else 0.05
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return model

    def trainer(self, model: Any, recipe: Recipe, *, held_out: int = 0) -> Any:
        """Return the trainer's own loop on the rows of a step."""
        from pytest_mistral_lora.training.loop import make_trainer

        return make_trainer(
            model,
            recipe.training,
            self.encoded[:ROWS],
            self.encoded[:held_out],
            work=self.scratch / "work",
            progress="none",
        )

    def step(
        self,
        *,
        collated: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        held_out: int = 0,
        **training: Any,
    ) -> Step:
        """Return one step of the trainer on the first rows: the same rows, whatever the settings.

        Args:
            collated: A change to the rows of the step, as they are collated.
            held_out: Rows whose loss is evaluated too.
            training: Settings that differ from the usual ones.
        """
        trainer = self.trainer(self.model(), self.recipe(max_grad_norm=0, **training), held_out=held_out)
        trainer.args.save_strategy = "no"
        if collated is not None:
            own, change = trainer.training_step, collated
            trainer.training_step = lambda model, batch, *given: own(model, change(batch), *given)
        gradients: dict[str, torch.Tensor] = {}
        predicting: list[int] = []
        trainer.add_callback(_keeper(gradients))
        with watched(partial(_note_predicting, predicting)) as calls:
            trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return Step(losses[0], gradients, calls, predicting)

    @cached_property
    def whole(self) -> Step:
        """The step with all its rows in one batch."""
        return self.step()


@contextmanager
def watched(seen: Callable[[list[Call], Any], Any] | None = None) -> Iterator[list[Call]]:
    """Write down every pass through a Mistral decoder, whoever makes it.

    Args:
        seen: Called with the passes so far and the output of the last one; may change it, or raise.
    """
    from torch.nn.modules.module import register_module_forward_hook

    calls: list[Call] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if type(module).__name__ != "MistralModel":
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        calls.append(Call(module.training, tuple(ids.flatten().tolist()), not _CACHES.isdisjoint(output)))
        if seen is not None:
            seen(calls, output)

    handle = register_module_forward_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _note_predicting(tokens: list[int], calls: Sequence[Call], output: Any) -> None:
    """Write down, in the backward pass, the tokens whose last hidden state has a gradient."""
    ids = calls[-1].ids

    def look(gradient: torch.Tensor) -> None:
        places = gradient.abs().amax(dim=-1).flatten().nonzero().flatten().tolist()
        tokens.extend(ids[place] for place in places)

    if output.last_hidden_state.requires_grad:
        output.last_hidden_state.register_hook(look)


def _keeper(gradients: dict[str, torch.Tensor]) -> Any:
    """Return a callback that copies the gradients of the first step."""
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients.setdefault(name.replace(".default.", "."), parameter.grad.float().cpu().clone())

    return Keeper()


Figures = Mapping[str, Any]
"""Plain JSON data."""

TOLERANCE = {"cpu": 2e-4, "cuda": 5e-3}
"""How far float32 may be from the same sum in another order, against the largest value: a fused loss needs 1e-4."""


@dataclass(frozen=True, slots=True)
class Law:
    """One law, and how it is seen to hold.

    Attributes:
        case: Name of its check.
        rule: Id of its rule.
        measure: Takes the figures; laws that share it share the figures.
        judge: Finds what is wrong with figures taken on a device, `cpu` or `cuda`.
        of_adapter: Whether it needs an adapter that the tiny run trained.
    """

    case: str
    rule: str
    measure: Callable[[Bed], Figures]
    judge: Callable[[Figures, str], Iterator[Finding]]
    of_adapter: bool = False

    def findings(self, figures: Figures, device: str) -> Iterator[Finding]:
        """Judge figures, or say what kept them from being taken."""
        if "failed" in figures:
            yield Finding(self.rule, figures["failed"], "the trainer on the tiny model", "figures to judge")
        else:
            yield from self.judge(figures, device)


def take(measure: Callable[[Bed], Figures], bed: Bed) -> Figures:
    """Take figures; a trainer that raises where it should not, or gives no number, is a figure too: `failed`."""
    try:
        figures = measure(bed)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    odd = [name for name, value in _numbers(figures) if not math.isfinite(value)]
    return {"failed": f"not a finite number: {', '.join(odd)}"} if odd else figures


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of plain data with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int | float):
        yield name, value
