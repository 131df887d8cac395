"""llama.cpp's own HTTP server, from the wheel `xllamacpp`, on the loopback until its input ends.

`python FILE GGUF [SETTINGS]`, the settings as JSON: `lora` and its `scale`, and `repeat_penalty`.
"""

from __future__ import annotations

import json
import sys

import xllamacpp

given = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel = 1024, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.hostnames = ["127.0.0.1"]
params.port = 0
params.use_jinja = True
if "lora" in given:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(given["lora"], given.get("scale", 1.0))]
if "repeat_penalty" in given:
    params.sampling.penalty_repeat = given["repeat_penalty"]
server = xllamacpp.Server(params)
sys.stdout.write(server.listening_address + "\n")
sys.stdout.flush()
# the test closes this pipe, also when it is killed: no server outlives it
sys.stdin.read()
