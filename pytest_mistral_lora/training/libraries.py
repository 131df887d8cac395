"""What a recipe asks of libraries and devices that are not everywhere: refused before any weight is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.devices import on_gpu, precision_of
from pytest_mistral_lora.training.recipe import Recipe

_BITSANDBYTES = "0.46.1"
_BITSANDBYTES_OPTIMIZERS_ON_CPU = "0.50"
_LIGER = "0.5"


def require_environment(recipe: Recipe) -> None:
    """Check that this machine has what the recipe asks for.

    Raises:
        RecipeError: If a device or a library is not there, or is too old.
    """
    training, gpu = recipe.training, on_gpu(recipe.training)
    precision_of(training)
    if recipe.base.quantization:
        _require("bitsandbytes", _BITSANDBYTES, "base.quantization", recipe.base.quantization)
    if training.optimizer != "adamw":
        least = _BITSANDBYTES if gpu else _BITSANDBYTES_OPTIMIZERS_ON_CPU
        _require("bitsandbytes", least, "training.optimizer", training.optimizer)
        if training.optimizer.startswith("paged") and not gpu:
            found = f"{training.optimizer!r} pages out of a GPU, and the run is on the CPU"
            raise RecipeError(found, place="training.optimizer", expected="adamw or adamw_8bit")
    if training.kernels:
        if not gpu:
            found = f"{training.kernels!r} are kernels for a GPU, and the run is on the CPU"
            raise RecipeError(found, place="training.kernels", expected="no kernels")
        _require("liger-kernel", _LIGER, "training.kernels", training.kernels)


def _require(package: str, least: str, place: str, value: str) -> None:
    try:
        found = version(package)
    except PackageNotFoundError:
        found = ""
    if not found or Version(found) < Version(least):
        raise RecipeError(
            f"{value!r} needs {package}, and {f'{found} is' if found else 'it is not'} installed",
            place=place,
            expected=f"{package} {least} or newer",
            next_step=f'Install it: pip install "{package}>={least}"',
        )
