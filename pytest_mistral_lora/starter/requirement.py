"""The requirement with which a job installs the package that is installed here."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution

PACKAGE = "pytest-mistral-lora"


def installed_requirement() -> tuple[str, str, str]:
    """Return the requirements of the light install and of the one that trains, and a note for the user.

    A package that was installed from a version control system is installed from the same commit.
    """
    try:
        found = distribution(PACKAGE)
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        version = found.version
    except (PackageNotFoundError, ValueError):
        return PACKAGE, f"{PACKAGE}[train]", ""
    # PEP 610: https://packaging.python.org/en/latest/specifications/direct-url/
    source = origin.get("vcs_info")
    if source:
        where = f" @ {source['vcs']}+{origin['url']}@{source['commit_id']}"
        return f"{PACKAGE}{where}", f"{PACKAGE}[train]{where}", ""
    pin, url = f"=={version}", origin.get("url")
    note = f"{PACKAGE} {version} is installed from {url}: your jobs install {version} from the index" if url else ""
    return f"{PACKAGE}{pin}", f"{PACKAGE}[train]{pin}", note
