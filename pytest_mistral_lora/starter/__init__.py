"""The files that guard a repository: `mistral-lora init` plans them first, and writes all or none, and its goldens."""

from pytest_mistral_lora.starter.files import GOLDENS, StartPlan, record_missing, write_plan

__all__ = ["GOLDENS", "StartPlan", "record_missing", "write_plan"]
