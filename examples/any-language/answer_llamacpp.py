"""A program for run.py: it renders a chat template by Jinja2 and encodes the text by llama.cpp, without labels.

Usage: python answer_llamacpp.py MODEL.gguf chat_template.jinja (it needs xllamacpp, the wheel of llama.cpp, and jinja2)
"""

import json
import sys
import urllib.request
from pathlib import Path

import jinja2.sandbox
import xllamacpp


def refuse(message):
    """Raise the error of a template."""
    raise ValueError(message)


def to_json(value, **options):
    """Return JSON as transformers writes it in a template."""
    return json.dumps(value, ensure_ascii=False, **options)


def encode(text):
    """Return the ids that llama.cpp's server gives a text; control tokens are in the text."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["tokens"]


params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel = 256, 1
params.hostnames, params.port = ["127.0.0.1"], 0
server = xllamacpp.Server(params)
environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
environment.filters["tojson"] = to_json
environment.globals["raise_exception"] = refuse
template = environment.from_string(Path(sys.argv[2]).read_text(encoding="utf-8"))
for line in sys.stdin:
    row = json.loads(line)["row"]
    try:
        answer = {"input_ids": encode(template.render(**row, bos_token="<s>", eos_token="</s>"))}
    except (ValueError, jinja2.TemplateError) as error:
        answer = {"refused": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
