"""An entry of `datasets` in a configuration of TRL."""

from __future__ import annotations

from pydantic import BaseModel


class TrlEntry(BaseModel, extra="allow", strict=True):
    """The supported keys of TRL's `DatasetConfig`."""

    path: str | None = None
    data_files: str | list[str] | None = None
