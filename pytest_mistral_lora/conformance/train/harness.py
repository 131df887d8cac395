"""The trainer on a tiny model: single steps of its own loop and whole short runs, for the laws to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.chat.encoded import EncodedRow
    from pytest_mistral_lora.checkpoint.encoder import Encoder
    from pytest_mistral_lora.training.recipe import Recipe

_RANK = 8
_ALPHA = 16
SCALE = _ALPHA / _RANK
"""Factor of the adapter's update: `W + SCALE * B @ A`."""

ROWS_OF_STEP = 4
"""Rows of a measured step. They differ in length, so that padding and ragged micro-batches show."""

_DECODERS = {text.decoder for text in TEXT_MODELS.values()}

# transformers 4 and 5.24 name the cache in a decoder's output differently.
_CACHE_KEYS = {"past_key_values", "cache"}


@dataclass(frozen=True)
class DecoderCall:
    """One forward pass of the model's decoder.

    Attributes:
        training: Whether the model was in training mode.
        ids: The input ids of all rows, flattened.
        has_cache: Whether the pass returned a key-value cache.
    """

    training: bool
    ids: tuple[int, ...]
    has_cache: bool


@contextmanager
def record_decoder_calls(on_call: Callable[[list[DecoderCall], Any], Any] | None = None) -> Iterator[list[DecoderCall]]:
    """Record every forward pass of the decoder of a text model in this process.

    Args:
        on_call: Called with the passes so far and the output of the last one, which it may change; it may raise.
    """
    # a hook for all modules: the laws must see every pass, whatever makes or wraps the model
    from torch.nn import Embedding
    from torch.nn.modules.module import register_module_forward_hook

    calls: list[DecoderCall] = []
    embedded: list[Any] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(module, Embedding):
            embedded[:] = args
        if type(module).__name__ not in _DECODERS:
            return
        # a model with images passes embeddings instead of ids to its text decoder
        (ids,) = embedded
        has_cache = not _CACHE_KEYS.isdisjoint(output)
        calls.append(DecoderCall(module.training, tuple(ids.flatten().tolist()), has_cache))
        if on_call is not None:
            on_call(calls, output)

    handle = register_module_forward_hook(look, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of the trainer's loop, recorded before the optimizer changes a weight.

    Attributes:
        loss: The logged loss, in nats per supervised token.
        gradients: Gradients of the trainable tensors, by the adapter's names; CPU float32.
        calls: The forward passes, in order.
        predicting: Ids of the tokens whose last hidden state has a gradient: the loss uses their predictions.
    """

    loss: float
    gradients: Mapping[str, torch.Tensor]
    calls: Sequence[DecoderCall] = ()
    predicting: Sequence[int] = ()


@dataclass(frozen=True)
class TinyFolder:
    """The folder of a tiny run: `base`, `rows.jsonl` and, after the run, `adapter`."""

    folder: Path

    @property
    def base(self) -> Path:
        """The tiny base checkpoint."""
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        """The training rows, a JSONL file."""
        return self.folder / "rows.jsonl"

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / "adapter"


@dataclass(frozen=True)
class TrainerHarness(TinyFolder):
    """Runs the trainer on the base and the rows of a tiny run.

    Attributes:
        folder: The folder of the tiny run.
        scratch: An existing folder for the outputs of measured runs.
        device: `auto`, `cpu` or `cuda`.
    """

    scratch: Path
    device: str

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer of the base, by mistral-common."""
        from pytest_mistral_lora.checkpoint.encoder import make_encoder
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        return make_encoder("mistral-common", CheckpointTokenizer(self.base))

    @cached_property
    def encoded(self) -> list[EncodedRow]:
        """Every training row as ids and labels."""
        from pytest_mistral_lora.chat.row_files import read_rows

        return [self.encoder.encode(row) for row in read_rows(self.rows)]

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base's weights: no law changes them."""
        from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

        return BaseFolder(self.base).weights_sha256

    def recipe(self, output: Path | str = "out", *, lora: Mapping[str, Any] | None = None, **training: Any) -> Recipe:
        """Return the one recipe of the tiny runs and the laws, with changes.

        Args:
            output: Folder of the adapter; a relative one is below `scratch`.
            lora: Changes to the section `lora`.
            training: Changes to the section `training`, which by default makes one step of `ROWS_OF_STEP` rows.
        """
        from pytest_mistral_lora.training.recipe import parse_recipe

        settings = {
            "steps": 1,
            "batch_size": ROWS_OF_STEP,
            "learning_rate": 0.01,
            "schedule": "constant",
            # the passes of the dry run would be recorded with those of the step
            "dry_run": False,
            # `auto` would be bfloat16 on a GPU, whose rounding hides what the laws look for
            "precision": "fp32",
            "logging_steps": 1,
            "device": self.device,
        }
        data = {
            "base": {"path": "base", "weights_sha256": self.base_sha256},
            "data": {"train": [self.rows.name]},
            "lora": {"r": _RANK, "alpha": _ALPHA, **(lora or {})},
            "training": settings | training,
            "output": str((self.scratch / output).absolute()),
        }
        return parse_recipe(data, folder=self.folder, place=Place.of("the tiny run's recipe"))

    def new_model(self, recipe: Recipe, base: Path | None = None) -> Any:
        """Return a base (by default the tiny one) with a new adapter on it, by the functions of the trainer."""
        from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
        from pytest_mistral_lora.checkpoint.base_model import load_base
        from pytest_mistral_lora.training.adapter import attach_adapter
        from pytest_mistral_lora.training.devices import on_gpu, precision_of
        from pytest_mistral_lora.training.layers import planned_layers

        folder, training = BaseFolder(base or self.base), recipe.training
        model = load_base(folder, precision_of(training), "cuda" if on_gpu(training) else "cpu")
        layers = planned_layers(folder, recipe.lora)
        return attach_adapter(model, recipe.lora, layers, seed=training.seed)

    def perturbed_model(self) -> Any:
        """Return the base with an adapter of fixed random values, the same for any seed of the trainer."""
        import torch

        model = self.new_model(self.recipe())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    # a new adapter has B = 0, and dL/dA = scale * B^T dL/dW x^T would always be zero
                    scale = 0.02 if ".lora_B." in name else 0.05
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return model

    def trainer(self, model: Any, recipe: Recipe, *, held_out: int = 0) -> Any:
        """Return the trainer's own loop on the first rows, with the first `held_out` rows for the held-out loss."""
        from pytest_mistral_lora.training.loop import make_trainer

        rows, work = self.encoded, self.scratch / "work"
        return make_trainer(model, recipe.training, rows[:ROWS_OF_STEP], rows[:held_out], work=work)

    def step(
        self,
        *,
        change_batch: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        held_out: int = 0,
        **training: Any,
    ) -> StepRecord:
        """Train one step on the first rows and record it; every call uses the same model and rows.

        Args:
            change_batch: Changes the collated batch before the trainer sees it.
            held_out: Number of rows for the held-out loss.
            training: Changes to the recipe's section `training`.
        """
        from transformers import TrainerCallback

        # clipping by the norm would scale all gradients alike, and hide a wrong factor
        recipe = self.recipe(max_grad_norm=0, **training)
        trainer = self.trainer(self.perturbed_model(), recipe, held_out=held_out)
        trainer.args.save_strategy = "no"
        if change_batch is not None:
            original_step = trainer.training_step
            trainer.training_step = lambda model, batch, *given: original_step(model, change_batch(batch), *given)
        gradients: dict[str, torch.Tensor] = {}
        predicting: list[int] = []

        class KeepGradients(TrainerCallback):
            # after the last micro-batch, and before the optimizer: the gradients of the whole step
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        gradients.setdefault(name.replace(".default.", "."), parameter.grad.float().cpu().clone())

        def note_predicting(calls: Sequence[DecoderCall], output: Any) -> None:
            ids = calls[-1].ids

            def look(gradient: torch.Tensor) -> None:
                places = gradient.abs().amax(dim=-1).flatten().nonzero().flatten().tolist()
                predicting.extend(ids[place] for place in places)

            # dL/dh is zero at each position whose prediction the loss does not use: no logit is needed to see the mask
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(look)

        trainer.add_callback(KeepGradients())
        with record_decoder_calls(note_predicting) as calls:
            trainer.train()
        loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
        return StepRecord(loss, gradients, calls, predicting)

    @cached_property
    def whole_step(self) -> StepRecord:
        """The step with all its rows in one micro-batch, as the reference for other splits."""
        return self.step()


Figures: TypeAlias = Mapping[str, Any]
"""Measured values of a law, as plain JSON data; for a law that does not apply, the reason as `not measured`."""


@dataclass(frozen=True, slots=True)
class TrainingLaw:
    """A property that training must have, with its measurement and its verdict.

    Attributes:
        name: Its rule, or its name within its rule, such as `ML311.mean`.
        measure: Takes the figures; laws with the same function share one measurement.
        judge: Yields findings about the figures, given the device of the measurement (`cpu` or `cuda`).
        needs_adapter: Whether the measurement reads the adapter of the tiny run.
    """

    name: str
    measure: Callable[[TrainerHarness], Figures]
    judge: Callable[[Figures, str], Iterator[Finding]]
    needs_adapter: bool = False

    @property
    def rule(self) -> str:
        """Id of its rule."""
        return self.name.partition(".")[0]

    def result(self, figures: Figures, device: str) -> Result:
        """Return the law's findings about figures; a failed measurement is also a finding."""
        if "not measured" in figures:
            return Result(not_checked=figures["not measured"])
        if "failed" in figures:
            place = Place.of("the trainer on the tiny model")
            found: Iterable[Finding] = [Finding(self.rule, figures["failed"], place, "figures to judge")]
        else:
            found = self.judge(figures, device)
        return Result(tuple(replace(finding, name=self.name if self.name != self.rule else "") for finding in found))
