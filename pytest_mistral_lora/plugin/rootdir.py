"""Tell whether pytest has missed the user's configuration because of a path that follows one of our options.

pytest looks for its configuration before it knows a plugin's options, and takes each word that is a path for a place
of tests: `--mistral-tokenizer /models/x` makes it look in `/models/x` and above, `--mistral-tokenizer=/models/x` not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_FILES = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")


def unread_configuration(config: pytest.Config, flags: tuple[str, ...]) -> str:
    """Return a sentence that names the configuration that pytest did not read, or nothing.

    Args:
        config: A configured session's.
        flags: The options that take a path.
    """
    params = config.invocation_params
    flag = next((word for word in params.args if word in flags), None)
    if flag is None or config.getoption("rootdir") or config.getoption("inifilename"):
        return ""
    folders = (params.dir, *params.dir.parents)
    if config.inipath is not None and config.inipath.parent in folders:
        return ""
    missed = next((path for folder in folders for name in _FILES if (path := Path(folder, name)).is_file()), None)
    return f"pytest has not read {missed}: write {flag}=PATH, with an equals sign" if missed else ""
