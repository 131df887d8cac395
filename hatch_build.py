"""Fill in the addresses of the project when it is built: the repository's address is no part of its files.

    MISTRAL_LORA_REPOSITORY=https://github.com/OWNER/NAME python -m build

Without the variable, the package has no addresses. A wheel that is built from an sdist has those of the sdist.
"""

from __future__ import annotations

import os
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "MISTRAL_LORA_REPOSITORY"
"""The environment variable with the address of the repository."""

_ADDRESS = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+){2,}")


def urls(address: str) -> dict[str, str]:
    """Return the addresses of a package whose repository has an address; none for an empty one.

    Raises:
        ValueError: If it is not the `https` address of a repository, or has more than its path, such as a password.
    """
    address = address.strip().removesuffix("/").removesuffix(".git")
    if not address:
        return {}
    if not _ADDRESS.fullmatch(address) or {".", ".."} & {*address.split("/")}:
        # a password may stand in it, so it is not printed
        expected = "https://github.com/OWNER/NAME, without a user, a query or a fragment"
        raise ValueError(f"{VARIABLE} is not the address of a repository; expected {expected}")
    return {
        "Repository": address,
        "Documentation": f"{address}/blob/HEAD/docs/index.md",
        "Changelog": f"{address}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


class RepositoryAddresses(MetadataHookInterface):
    """Hatchling's hook that sets `project.urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the addresses in the metadata."""
        metadata["urls"] = urls(os.environ.get(VARIABLE, ""))
