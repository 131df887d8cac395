"""The files that serve an adapter or a merged model by Ollama, which runs llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.field.servers.llamacpp.export import LlamaCppExport
from pytest_mistral_lora.field.servers.ollama.go_template import go_template
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.servers import ServedModel, Written, check_command

_MOST_CONTEXT = 32_768
"""Tokens of the context that the Modelfile asks for, if the model has more: the memory of its keys grows with it."""

_NO_THOUGHTS = (
    "Thoughts in a history are left out: the TEMPLATE does not render them, where mistral-common writes [THINK]."
)


class OllamaExport(LlamaCppExport):
    """Writes the files for Ollama."""

    kind, title, takes_probe = "ollama", "Ollama", False

    def write(self, served: ServedModel, folder: Path) -> Written:
        """Write the folders of the converters, `convert.sh` and a Modelfile."""
        if served.template is not None:
            raise InputError(
                "the rows were rendered by a chat template, and no Go template is known to do as it does",
                place=str(served.template),
                next_step="Serve it by llama.cpp or vLLM: --to llamacpp, --to vllm.",
            )
        template = go_template(served.oracle)
        made = super().write(served, folder)
        lines = ["FROM ./model.gguf", *(["ADAPTER ./adapter.gguf"] if served.has_adapter else [])]
        # Ollama's own penalty of repetition is 1.1, which changes greedy answers, and its own context is short
        longest = BaseFolder(served.base).facts.context
        context = min(longest, _MOST_CONTEXT) if type(longest) is int and longest > 0 else _MOST_CONTEXT
        lost = [_NO_THOUGHTS] if served.oracle.facts.thinking and "[THINK]" in served.oracle.control_ids else []
        lines += [f"# {remark}" for remark in lost]
        lines += [f'TEMPLATE """{template}"""', "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {context}"]
        write_text(folder / "Modelfile", "\n".join(lines) + "\n")
        (folder / "serve.sh").unlink()
        ours = (
            "No Go template has exact tools: an older Ollama refuses a request with tools, and one of 2026 renders "
            "every prompt by the Jinja template in the GGUF file, as llama.cpp does.",
            "Spaces at the end of an answer are kept, and system messages one after another are joined.",
            f"Ollama cuts a prompt of more than num_ctx tokens, {context} here, without a word: set what your memory "
            "holds.",
            *lost,
        )
        create = f"ollama create {shlex.quote(served.name)} --file Modelfile"
        return Written((made.commands[0], create), check_command(served, "ollama", 11434), (*made.remarks, *ours))


EXPORT = OllamaExport()
