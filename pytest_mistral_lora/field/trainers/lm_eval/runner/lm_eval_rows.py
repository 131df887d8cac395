"""The prompts that `lm_eval run --config FILE` feeds a model, each with the chat that it is made of."""

from __future__ import annotations

import functools
import inspect
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from harness import arguments, versions

_PACKAGES = ("lm-eval", "transformers", "tokenizers", "datasets", "mistral-common", "torch")

_SET = {
    "model": "hf",
    "device": "cpu",
    "batch_size": 1,
    # metrics need answers
    "predict_only": True,
    "use_cache": None,
    "trust_remote_code": False,
}
"""What is another in each run, with another value: the ids of prompts do not depend on it."""
_DROPPED = ("max_batch_size", "cache_requests", "wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
_OF_MODELS = (
    *("pretrained", "revision", "subfolder", "tokenizer", "dtype", "device", "device_map", "parallelize"),
    *("peft", "delta", "autogptq", "gptqmodel", "gguf_file", "quantization_config", "trust_remote_code"),
)
"""Arguments of a model that name another model, its place or its precision."""

LIMIT = 50
"""The documents of each task, if the configuration has no limit."""


class Prompts:
    """Takes the prompts out of the harness's own model class, whose answers it leaves empty."""

    def __init__(self) -> None:
        """Begin without prompts."""
        self.records: list[dict[str, Any]] = []
        self.unconditional = 0
        self._chats: dict[str, list[dict[str, Any]]] = {}
        self._few_shot: dict[str, int] = {}
        self._fed: list[int] = []
        self._requests: Iterator[Any] = iter(())

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Replace what feeds the model, until the end of the block."""
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM

        replaced: Any = {
            (HFLM, "apply_chat_template"): self._rendering(HFLM.apply_chat_template),
            (HFLM, "loglikelihood"): self._naming(HFLM.loglikelihood),
            (HFLM, "_loglikelihood_tokens"): lambda _, requests, **__: [self._scored(*each) for each in requests],
            (HFLM, "loglikelihood_rolling"): lambda _, requests, **__: [self._unconditional() for _ in requests],
            (HFLM, "generate_until"): self._one_by_one(HFLM.generate_until),
            (HFLM, "_model_generate"): self._fed_alone,
            (ConfigurableTask, "fewshot_context"): self._counting(ConfigurableTask.fewshot_context),
        }
        originals = {(owner, name): getattr(owner, name) for owner, name in replaced}
        for (owner, name), function in replaced.items():
            setattr(owner, name, function)
        try:
            yield
        finally:
            for (owner, name), function in originals.items():
                setattr(owner, name, function)

    def _rendering(self, render: Any) -> Any:
        @functools.wraps(render)
        def rendering(model: Any, chat_history: Any, *args: Any, **options: Any) -> str:
            # a copy: a task may use its messages again
            chat = json.loads(json.dumps(chat_history))
            text: str = render(model, chat_history, *args, **options)
            self._chats[text] = chat
            return text

        return rendering

    def _counting(self, make: Any) -> Any:
        @functools.wraps(make)
        def counting(task: Any, doc: Any, num_fewshot: int, *args: Any, **options: Any) -> Any:
            made = make(task, doc, num_fewshot, *args, **options)
            for text in [made] if isinstance(made, str) else made:
                self._few_shot[text] = num_fewshot
            return made

        return counting

    def _naming(self, score: Any) -> Any:
        @functools.wraps(score)
        def naming(model: Any, requests: Any, **options: Any) -> Any:
            self._requests = iter(requests)
            return score(model, requests, **options)

        return naming

    def _scored(self, texts: tuple[str, str], prompt_ids: list[int], answer_ids: list[int]) -> tuple[float, bool]:
        context, answer = texts
        request = next(self._requests)
        if context:
            self._add(request, context, prompt_ids, answer, answer_ids)
        else:
            self._unconditional()
        return 0.0, False

    def _unconditional(self) -> float:
        self.unconditional += 1
        return 0.0

    def _one_by_one(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def generating(model: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for request in requests:
                # alone, so that it is not padded to the length of another
                texts += generate(model, [request], disable_tqdm=True)
                self._add(request, request.args[0], self._fed)
            return texts

        return generating

    def _fed_alone(self, *, context: Any, **_: Any) -> Any:
        self._fed = context[0].tolist()
        return context

    def _add(
        self, request: Any, context: str, prompt_ids: list[int], answer: str = "", answer_ids: list[int] | None = None
    ) -> None:
        place = f"{request.task_name}, document {request.doc_id}"
        record = {"place": place, "few_shot": self._few_shot.get(context, 0), "prompt_ids": list(map(int, prompt_ids))}
        chat = self._chats.get(context)
        if chat is not None:
            record["messages"] = chat
        if answer_ids is not None:
            record |= {"answer": answer, "answer_ids": list(map(int, answer_ids))}
        self.records.append(record)


def configuration(
    given: Path, checkpoint: Path, output: Path, known: Container[str], parsed: Callable[[str], dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration for the tiny model, and notes on what is another than in the given one.

    Args:
        given: The given configuration.
        checkpoint: The folder of the tiny model.
        output: The folder of the results.
        known: The names of the arguments that the harness's own model class takes.
        parsed: Reads arguments of a model that are written as one text.

    Raises:
        TypeError: If the configuration has no keys.
    """
    config = yaml.safe_load(given.read_text(encoding="utf-8")) or {}
    if not isinstance(config, dict):
        raise TypeError("the configuration has no keys at its top; expected tasks, apply_chat_template, ...")
    notes = []
    model = config.get("model", "hf")
    if model != "hf":
        notes.append(f"model {model} is replaced by hf: these are the prompts of lm-eval's own tokenization")
    model_args = config.get("model_args") or {}
    if isinstance(model_args, str):
        model_args = parsed(model_args)
    kept = {name: value for name, value in model_args.items() if name in known and name not in _OF_MODELS}
    model_args = {**kept, "pretrained": str(checkpoint), "dtype": "float32"}
    if config.get("limit") is None and config.get("samples") is None:
        config["limit"] = LIMIT
        notes.append(f"the first {LIMIT} documents of each task: the configuration has no limit")
    config = {name: value for name, value in config.items() if name not in _DROPPED}
    return {**config, **_SET, "model_args": model_args, "output_path": str(output)}, notes


def evaluate(given: Path, checkpoint: Path, folder: Path) -> tuple[Prompts, list[str]]:
    """Run the harness's own command, and return the prompts that it feeds a model, and notes.

    Args:
        given: The given configuration.
        checkpoint: The folder of the tiny model.
        folder: An empty folder for files.
    """
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string

    known = inspect.signature(HFLM.__init__).parameters
    config, notes = configuration(given, checkpoint, folder / "results", known, simple_parse_args_string)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    sys.argv = ["lm_eval", "run", "--config", str(file)]
    prompts = Prompts()
    with prompts.taken():
        cli_evaluate()
    return prompts, notes


def main(evaluated: Callable[[Path, Path, Path], tuple[Prompts, list[str]]] = evaluate) -> None:
    """Write the prompts of the tasks that a configuration names.

    Args:
        evaluated: Runs the evaluation of a configuration; see `evaluate`.
    """
    given = arguments()
    with tempfile.TemporaryDirectory() as temporary, given.output.open("w", encoding="utf-8") as output:
        output.write(json.dumps({"environment": versions(_PACKAGES)}) + "\n")
        try:
            prompts, notes = evaluated(given.config, given.checkpoint, Path(temporary))
        except Exception as error:
            traceback.print_exc()
            sys.exit(f"{type(error).__name__}: {error}")
        if prompts.unconditional:
            notes.append(f"{prompts.unconditional} texts are scored without a prompt, and are not judged")
        for note in notes:
            output.write(json.dumps({"note": note}) + "\n")
        for number, record in enumerate(prompts.records):
            output.write(json.dumps({"row": number, **record}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
