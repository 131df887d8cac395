"""The command line `mistral-lora VERB ...`: one parser, one table of verbs, one of exit codes."""

from pytest_mistral_lora.cli.program import EXIT_CODES, VERBS, main

__all__ = ["EXIT_CODES", "VERBS", "main"]
