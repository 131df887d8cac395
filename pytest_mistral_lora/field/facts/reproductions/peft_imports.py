"""PEFT asks transformers for a class that version 5 has no more, and cannot be imported."""

from __future__ import annotations

import importlib


def main() -> None:
    """Import PEFT."""
    try:
        importlib.import_module("peft")
    except ImportError as error:
        state = "still true" if "HybridCache" in str(error) else "could not run"
        print(f"{state}: {error}")
    else:
        print("no longer true: peft can be imported")


if __name__ == "__main__":
    main()
