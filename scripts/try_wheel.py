"""Try a built wheel where nothing else of the repository is: `python scripts/try_wheel.py dist/NAME.whl`.

Both lines of the README that install the package and run the suite are run as they stand there, each in a new virtual
environment and an empty folder, with the wheel in place of the clone. Then `init --demo`, and the lines of
docs/guard.md in it, with sound labels and with a masked EOS. Nothing is published, and no file of the repository is
imported.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = re.compile(r"PIP_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|\w*_proxy|LANG|TMPDIR|SYSTEMROOT", re.IGNORECASE)
"""Variables of the environment that an install needs; all others are left out, such as PYTHONPATH."""


def readme_lines(readme: str) -> list[str]:
    """Return the lines of the README that install the package and run its suite."""
    return re.findall(r"^\$ (pip install .* && pytest --mistral-golden)$", readme, flags=re.MULTILINE)


def with_wheel(line: str, wheel: Path) -> str:
    """Return a line of the README with a wheel in place of the clone, the wheels of `dist`, or the package's name.

    Raises:
        ValueError: If the line installs neither.
    """
    changed, count = re.subn(
        r'(?:-e "\.|"?pytest-mistral-lora)(\[[\w,]+\])?"?', lambda found: shlex.quote(f"{wheel}{found[1] or ''}"), line
    )
    if not count and "dist/*.whl" in line:
        changed, count = line.replace("dist/*.whl", shlex.quote(str(wheel))), 1
    if not count:
        raise ValueError(f"{line!r} installs neither a clone, nor a wheel, nor the package")
    return changed


def guard_lines(page: str, *, is_sound: bool) -> str:
    """Return the example of the page on the guard; with the labels that it names as wrong if it is not sound."""
    [lines] = [
        code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "TrainingArguments" in code
    ]
    if is_sound:
        return lines
    [masked] = re.findall(r"With `(\"labels\": .*?)`", page)
    changed = lines.replace('"labels": row.labels', masked)
    if changed == lines:
        raise ValueError("docs/guard.md: the labels of the example are not found")
    return changed


class BareEnvironment:
    """A new virtual environment and an empty folder.

    Attributes:
        folder: The empty folder, in which commands run.
    """

    def __init__(self, place: Path) -> None:
        self.folder: Path = place / "work"
        self.folder.mkdir(parents=True)
        venv.create(place / "venv", with_pip=True)
        programs = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        path = os.pathsep.join([str(programs), os.defpath])
        self._environment = {**kept, "PATH": path, "HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
        self._place = place

    def run(self, words: Sequence[str], *, shown: str = "", exit_code: int = 0, needed: str = "") -> None:
        """Run a command and print it with its time and the end of its output.

        Raises:
            SystemExit: If its exit code is another one, or a needed text is missing in its output.
        """
        print(f"$ {shown or shlex.join(words)}", flush=True)
        started = time.monotonic()
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            check=False,
        )
        is_right = done.returncode == exit_code and needed in done.stdout
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        print("\n".join(f"  | {line}" for line in (lines[-6:] if is_right else lines)))
        print(f"  exit code {done.returncode}, {time.monotonic() - started:.0f} s\n", flush=True)
        if not is_right:
            raise SystemExit(f"expected exit code {exit_code}{f' and {needed!r}' if needed else ''}")

    def require_own_package(self) -> None:
        """Check that the package is imported from this environment."""
        code = "import pytest_mistral_lora as package; print(package.__version__, package.__file__)"
        self.run(["python", "-c", code], needed=str(self._place / "venv"))


def main(wheel: Path) -> None:
    """Run the README's lines and the demo with a wheel.

    Raises:
        SystemExit: If a command ends in another way than it should.
    """
    lines = readme_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    if len(lines) != 2:
        raise SystemExit(f"README.md: {len(lines)} lines that install the package and run the suite; expected two")
    page = (ROOT / "docs" / "guard.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="bare-") as temporary:
        for number, line in enumerate(lines):
            environment = BareEnvironment(Path(temporary).resolve() / str(number))
            environment.run(["bash", "-euc", with_wheel(line, wheel.resolve())], shown=line, needed=" passed")
            environment.require_own_package()
            if "[train]" in line:
                environment.run(["mistral-lora", "init", "--demo"], needed="next: mistral-lora check recipe.yaml")
                environment.run(["mistral-lora", "check", "recipe.yaml"], needed=" 0 failed")
                for is_sound, needed in ((True, "no finding"), (False, "ML546")):
                    (environment.folder / "guarded.py").write_text(
                        guard_lines(page, is_sound=is_sound), encoding="utf-8"
                    )
                    environment.run(["python", "guarded.py"], exit_code=0 if is_sound else 1, needed=needed)
    print("the wheel works on its own")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("expected one wheel: python scripts/try_wheel.py dist/NAME.whl")
    main(Path(sys.argv[1]))
