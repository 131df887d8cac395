"""`python -m pytest_mistral_lora.cli VERB ...` is `mistral-lora VERB ...`."""

from __future__ import annotations

import sys

from pytest_mistral_lora.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
