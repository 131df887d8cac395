"""An entry of the `dataset_info.json` of LLaMA-Factory."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class LlamaFactoryEntry(BaseModel, extra="allow", strict=True):
    """The supported keys of LLaMA-Factory's `DatasetAttr`."""

    file_name: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None
