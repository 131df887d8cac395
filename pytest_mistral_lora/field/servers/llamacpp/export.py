"""The files that serve an adapter or a merged model by llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_mistral_lora.field.servers.llamacpp.converters import ADAPTER, MODEL, write_adapter, write_model
from pytest_mistral_lora.programs.facts import works
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.servers import (
    ServedModel,
    ServerExport,
    Written,
    check_command,
    remark_on_calls,
    script,
    wrapped,
)

_OUTTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_CONVERT = "# usage: sh convert.sh LLAMA_CPP, the folder with llama.cpp's converters\n"


class LlamaCppExport(ServerExport):
    """Writes the files for llama.cpp."""

    kind, title, takes_probe = "llamacpp", "llama.cpp", True

    def faults(self, served: ServedModel) -> Iterator[str]:
        """Yield each property of an adapter that llama.cpp refuses or silently ignores."""
        yield from super().faults(served)
        config = served.folder.config
        if config.get("alpha_pattern"):
            yield "alpha_pattern gives layers a scale of their own: a GGUF adapter has one alpha"
        if config.get("rank_pattern") and config.get("use_rslora"):
            yield "rank_pattern with use_rslora gives layers a scale of their own: a GGUF adapter has one alpha"
        others = [name for name in served.folder.tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
        if others:
            yield f"{others[0]} is not a pair of matrices, the only form that llama.cpp's converter takes"

    def write(self, served: ServedModel, folder: Path) -> Written:
        """Write the folders of the converters, `convert.sh` and `serve.sh`."""
        write_model(folder / MODEL, served.base, served.tokenizer, served.template)
        lines = ['LLAMA_CPP="${1:?give the folder with convert_hf_to_gguf.py}"']
        outtype = _OUTTYPES.get(served.dtype, "auto")
        tekken = served.oracle.kind == "tekken"
        written = "unnamed.gguf" if tekken else "model.gguf"
        lines += [f'python "$LLAMA_CPP/convert_hf_to_gguf.py" {MODEL} --outtype {outtype} --outfile {written}']
        if tekken:
            # the converter recognises a splitter by the ids of one text, and mistakes a Tekken of 2024-09 for Llama 3
            lines += ["gguf-new-metadata --force --pre-tokenizer tekken unnamed.gguf model.gguf", "rm unnamed.gguf"]
        serve = ["llama-server", "--model", "model.gguf", "--alias", served.name]
        if served.has_adapter:
            write_adapter(folder / ADAPTER, served.folder)
            convert = f'python "$LLAMA_CPP/convert_lora_to_gguf.py" {ADAPTER} --base {MODEL} --outtype f32'
            lines += [f"{convert} --outfile adapter.gguf"]
            serve += ["--lora", "adapter.gguf"]
        write_text(folder / "convert.sh", script("\n".join(lines), _CONVERT))
        serve += ["--jinja", "--host", "127.0.0.1", "--port", "8080"]
        write_text(folder / "serve.sh", script(wrapped(serve)))
        remarks = [
            "Text that spells a control token becomes that control token (ML906); docs/deviations.md has the others."
        ]
        if tekken:
            remarks.append("Hindi, Tamil, Thai and other text with combining marks gets other ids (ML915).")
        if served.oracle.facts.writes_call_ids and served.oracle.facts.calls_as == "markers":
            remarks.append(remark_on_calls("served-call-ids-in-another-order", served))
        # a build outside of Git, as in Python wheels, reports no number, and the deviations are known of numbers alone
        build = works("llamacpp-serves-exports").versions["llama.cpp"]
        check = check_command(served, f"llamacpp@{build}", 8080)
        return Written(("sh convert.sh LLAMA_CPP", "sh serve.sh"), check, tuple(remarks))


EXPORT = LlamaCppExport()
