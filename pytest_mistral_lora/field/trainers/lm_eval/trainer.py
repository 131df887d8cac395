"""lm-evaluation-harness: how its own code is run, and which values of its configuration name code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pytest_mistral_lora.runners.configuration import Reading, is_set, short
from pytest_mistral_lora.runners.trainer import Trainer

_MODEL_ARGS = re.compile(
    r"backend|truncation|max_length|add_bos_token|prefix_token_id|use_fast_tokenizer|chat_template_args|enable_thinking"
    r"|think_end_token|logits_cache|softmax_dtype|batch_size|max_batch_size|trust_remote_code|pretrained|tokenizer|revision"
    r"|subfolder|dtype|device|device_map|parallelize|peft|delta|autogptq|gptqmodel|gguf_file"
)
_TASK = re.compile(r"[\w.*?,:+|-]+")


class LmEval(Trainer):
    """lm-evaluation-harness."""

    def require_no_code(self, reading: Reading) -> None:
        """Refuse tasks of files, and leave out arguments of the model that change more than ids."""
        _refuse_task_files(reading)
        made = reading.made
        if "model_args" in made.data:
            made.data["model_args"] = _known_model_args(made.data["model_args"], made.left_out)


def _refuse_task_files(reading: Reading) -> None:
    """Refuse tasks of files: their `!function`, classes and Jinja templates without a sandbox are code."""
    tasks = reading.made.data.get("tasks") or []
    for task in tasks.split(",") if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [tasks]:
        is_name = isinstance(task, str) and _TASK.fullmatch(task.strip()) and not os.path.lexists(task.strip())
        if not is_name or task.strip().endswith((".yaml", ".yml", ".json", ".py")):
            found = f"`tasks: {short(task)}` is no name of a task of lm-eval, and the file of a task names code"
            raise reading.refusal("tasks", found)


def _known_model_args(given: Any, left_out: list[str]) -> Any:
    """Return the arguments of lm-eval's model that change no more than ids: a mapping, or a text such as `a=b,c=d`."""
    parts = dict(part.partition("=")[::2] for part in given.split(",")) if isinstance(given, str) else given
    if not isinstance(parts, dict):
        return {}
    left_out += [f"model_args.{key}" for key in parts if not _MODEL_ARGS.fullmatch(str(key).strip()) and is_set(key)]
    kept = {key: value for key, value in parts.items() if _MODEL_ARGS.fullmatch(str(key).strip())}
    return ",".join(f"{key}={value}" for key, value in kept.items()) if isinstance(given, str) else kept


LM_EVAL = LmEval.packaged(
    Path(__file__).parent,
    "lm-eval",
    "lm-evaluation-harness",
    "lm_eval",
    "lm_eval run --config",
    is_evaluation=True,
)
