"""YAML without its numbers of any length: PyYAML multiplies the parts of `1:1:1:…`, base 60, for minutes."""

from __future__ import annotations

from typing import Any

import yaml

_LONGEST_NUMBER = 100
"""Characters: Python itself writes no integer of more than 4,300 digits, and no file of ours has one of 20."""


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a number of more than 100 characters."""

    def construct_scalar(self, node: Any) -> Any:
        """Return the text of a scalar.

        Raises:
            yaml.MarkedYAMLError: If it is a number that is too long.
        """
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _LONGEST_NUMBER:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value):,} characters", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)
