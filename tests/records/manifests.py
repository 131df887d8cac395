"""Valid manifests for the tests."""

from __future__ import annotations

from typing import Any

SHA = "ab" * 32
COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"
FOUR_KEYS = {"base": "mistralai/Mistral-7B-v0.3", "revision": COMMIT, "dataset_sha256": SHA, "seed": 42}


def adapter() -> dict[str, Any]:
    """Return what every run records."""
    removed = {
        "rows_dropped": {},
        "rows_truncated": 0,
        "rows_without_loss": 0,
        "tokens_removed": 0,
        "supervised_tokens_removed": 0,
    }
    data_file = {"path": "train.jsonl", "sha256": SHA, "rows": 5}
    return {
        "schema_version": 3,
        "kind": "adapter",
        **FOUR_KEYS,
        "base_weights_sha256": SHA,
        "tokenizer": {
            "backend": "mistral-common",
            "version": "v3",
            "file": "tokenizer.model.v3",
            "sha256": SHA,
            "files": {"tokenizer.model.v3": SHA},
            "vocab_size": 32768,
        },
        "template": {
            "source": "checkpoint",
            "file": "chat_template.jinja",
            "sha256": SHA,
            "probe": "probe-1",
            "probe_sha256": SHA,
        },
        "dataset": {
            "files": [data_file],
            "eval_files": [data_file],
            "held_out": 0.0,
            "rows_sha256": SHA,
            "rows": 5,
            "rows_used": 5,
            **removed,
            "held_out_rows": 5,
            "held_out_rows_sha256": SHA,
            "held_out_removed": removed,
            "truncation": "error",
            "unsupervised": "error",
        },
        "masking": {
            "policy": "assistant turns of weight 1, to EOS",
            "tokens": 100,
            "supervised_tokens": 30,
            "ids_sha256": SHA,
            "labels_sha256": SHA,
        },
        "lora": {
            "r": 8,
            "alpha": 16.0,
            "dropout": 0.0,
            "rslora": False,
            "dora": False,
            "modules_to_save": [],
            "seed": 42,
            "target_modules": ["q_proj", "v_proj"],
            "layers": 64,
            "parameters": 1000,
            "tensors_sha256": SHA,
        },
        "training": {
            "steps": 10,
            "epochs": 1.0,
            "learning_rate": 2e-4,
            "schedule": {"name": "cosine", "warmup_steps": 0, "total_steps": 10},
            "optimizer": "AdamW",
            "batch_size": 8,
            "micro_batch_tokens": 1,
            "devices": 1,
            "max_length": 4096,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "order_seed": 42,
            "precision": "bf16",
            "quantization": None,
            "skipped_steps": 0,
            "kernels": None,
            "memory_relief": [],
            "adapter_dtype": "float32",
            "device": "cuda",
            "activation_checkpointing": True,
            "sliding_window": None,
            "resumed_from_step": None,
        },
        "recipe": {"base": {"repo": "mistralai/Mistral-7B-v0.3", "revision": COMMIT}, "output": "lora-out"},
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "processor": "AVX2",
            "threads": 1,
            "gpu": "H100",
            "packages": {"torch": "2.13.0"},
            "code": {"commit": COMMIT, "dirty": False},
        },
        "files": {"adapter_model.safetensors": {"sha256": SHA, "size": 10}},
        "evaluation": [{"command": "train", "results": {"loss": 0.5}}],
        "seal": SHA,
    }


def merged() -> dict[str, Any]:
    data = {key: value for key, value in adapter().items() if key not in ("lora", "training", "masking")}
    parent = {"manifest_sha256": SHA, "tensors_sha256": SHA, "merge_dtype": "float32"}
    return {**data, "kind": "merged", "parent": parent}
