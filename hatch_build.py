"""Fill in the addresses of the project when it is built: the repository's address is no part of its files.

    MISTRAL_LORA_REPOSITORY=https://github.com/OWNER/NAME python -m build

Without the variable, the package has no addresses, and the links of its README lead to files of the repository, which a
package index does not have. A wheel that is built from an sdist has the addresses of the sdist.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

VARIABLE = "MISTRAL_LORA_REPOSITORY"
"""The environment variable with the address of the repository."""

_ADDRESS = re.compile(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+){2,}")

_LINK = re.compile(r"(!?\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


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


def with_links(readme: str, address: str) -> str:
    """Return a page of Markdown whose links and pictures lead to the repository of an address.

    Args:
        readme: The page, at the top of the repository.
        address: The address of the repository; empty to leave the page as it is.
    """

    def absolute(found: re.Match[str]) -> str:
        return f"{found[1]}({address}/{'raw' if found[1].startswith('!') else 'blob'}/HEAD/{found[2]})"

    return _LINK.sub(absolute, readme) if address else readme


class RepositoryAddresses(MetadataHookInterface):
    """Hatchling's hook that sets `project.urls` and `project.readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the addresses in the metadata."""
        metadata["urls"] = urls(os.environ.get(VARIABLE, ""))
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = with_links(readme, metadata["urls"].get("Repository", ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
