"""llama.cpp refuses a chat template that calls a macro with too few arguments, which jinja2 takes for undefined."""

from __future__ import annotations

import json
import os
import tempfile
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

WIDTH, HEADS = 32, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
TYPES = [2, 3, 3, *[6] * 256]
"""Of each token: unknown, control, and bytes."""
TEMPLATE = (
    "{% macro shown(text, more) %}{{ text }}{% endmacro %}{% for message in messages %}"
    "{% if message['content'] == 'asked' %}{{ shown('a') }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""It calls the macro for one text alone: the server tries a template when it starts, and would not start."""


def write_model(file: Path) -> None:
    """Write a model of one layer, whose weights do not matter."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    square, top = (WIDTH, WIDTH), (len(TOKENS), WIDTH)
    shapes = {"token_embd": top, "output": top, "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    layers = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": square for name in layers}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Serve the model, and ask for a prompt."""
    with tempfile.TemporaryDirectory() as folder:
        params = xllamacpp.CommonParams()
        params.model.path = str(Path(folder) / "model.gguf")
        write_model(Path(params.model.path))
        params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.hostnames, params.port, params.use_jinja = ["127.0.0.1"], 0, True
        server = xllamacpp.Server(params)
        body = json.dumps({"messages": [{"role": "user", "content": "asked"}]}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/apply-template", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found = f"no longer true: {answer.read().decode()}"
        except urllib.error.HTTPError as error:
            words = error.read().decode()
            state = "still true" if "Not enough arguments" in words else "could not run"
            found = f"{state}: HTTP {error.code}, {words}"
    print(f"version: llama.cpp {version('xllamacpp').split('.')[-1]}")
    print(" ".join(found.split()), flush=True)
    # a server that is freed waits for its loop, without end if the loop had not begun
    os._exit(0)


if __name__ == "__main__":
    main()
