"""llama.cpp's own HTTP server, from the wheel `xllamacpp`, on the loopback until its input ends.

`python FILE GGUF [SETTINGS]`, the settings as JSON: `lora` and its `scale`, several `loras`, `template` and `draft`,
files, and `set`, parameters of llama.cpp by their names, such as `sampling.penalty_repeat`. Or the options of
`llama-server`, which the wheel has not: those that an exported serve.sh gives.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def settings_of(words: list[str]) -> dict[str, Any]:
    """Return the settings that a command line has."""
    if not words[0].startswith("--"):
        return {"model": words[0], **(json.loads(words[1]) if len(words) > 1 else {})}
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--alias", "--lora", "--host"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    # without it the server renders by a template of its own
    parser.add_argument("--jinja", action="store_true")
    return {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}


given = settings_of(sys.argv[1:])
params = xllamacpp.CommonParams()
params.model.path = given["model"]
params.n_ctx, params.n_parallel = 1024, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.hostnames = [given.get("host", "127.0.0.1")]
params.port = given.get("port", 0)
params.use_jinja = given.get("jinja", True)
if "alias" in given:
    params.model_alias = {given["alias"]}
if "lora" in given:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(given["lora"], given.get("scale", 1.0))]
if "loras" in given:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 1.0) for file in given["loras"]]
if "draft" in given:
    params.speculative.draft.mparams.path = given["draft"]
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
if "template" in given:
    params.chat_template = Path(given["template"]).read_text()
for name, value in given.get("set", {}).items():
    *parents, last = name.split(".")
    setattr(functools.reduce(getattr, parents, params), last, value)
server = xllamacpp.Server(params)
sys.stdout.write(server.listening_address + "\n")
sys.stdout.flush()
# the test closes this pipe, also when it is killed: no server outlives it
sys.stdin.read()
