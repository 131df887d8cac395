"""The targets of a run, and their names: those that are given, or the embedded default."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.model_targets import AdapterTarget, GgufTarget
from pytest_mistral_lora.conformance.server_target import ServerTarget
from pytest_mistral_lora.conformance.targets import (
    EMBEDDED,
    EMBEDDED_TRAINING,
    DatasetTarget,
    EncodedTarget,
    RecipeTarget,
    RunnerTarget,
    Target,
)
from pytest_mistral_lora.errors import InputError, RunnerError


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """A runner as it is named: `NAME`, or `NAME=CONFIG` with the runner's own configuration file.

    Attributes:
        runner: Its name, or the path of a script.
        config: The configuration, or None for the stock one.
    """

    runner: str
    config: Path | None = None

    @classmethod
    def parse(cls, text: str, folder: Path) -> RunnerChoice:
        """Return the choice that a text names; its paths are relative to a folder.

        Raises:
            RunnerError: If there is no such runner, or no such file.
        """
        from pytest_mistral_lora.runners import RUNNERS, find_runner

        name, _, config = text.partition("=")
        runner = find_runner(name if name in RUNNERS else str(folder / name))
        path = folder / config if config else None
        if path is not None and not path.is_file():
            raise RunnerError("no such file", place=str(path), expected=f"a configuration of {runner.title}")
        return cls(name if name in RUNNERS else str(folder / name), path)


def name_of(path: Path) -> str:
    """Return the name of a path as a part of node ids."""
    # a file of the Hub's cache is a link to one that is named by its hash
    name = path.resolve().name if path.is_dir() else path.name
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "target"


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: the name itself, or with the first free number from 2 on."""
    return next(free for free in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if free not in taken)


def embedded_targets() -> list[Target]:
    """Return the targets of a run that names none."""
    return [Target(name, trains=name == EMBEDDED_TRAINING) for name in EMBEDDED]


def is_shipped(path: Path) -> bool:
    """Whether a path is our name of a tokenizer that mistral-common ships; a file or folder of that name goes first."""
    return str(path) in EMBEDDED and not path.exists()


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """A server as it is named: `URL`, or `NAME=URL`; NAME may have `@VERSION` and `:PRECISION` behind it.

    Attributes:
        kind: The kind of server: a key of `SERVERS`, a script, or `auto`.
        url: Its address.
        version: Its version, if it reports none; else empty.
        precision: The precision of its weights; empty for the one that it reports.
    """

    kind: str
    url: str
    version: str = ""
    precision: str = ""

    @classmethod
    def parse(cls, text: str) -> ServerChoice:
        """Return the server that a text names.

        Raises:
            InputError: If the kind or the precision is unknown, or the address is none.
        """
        from pytest_mistral_lora.records.judgement import TOLERANCES
        from pytest_mistral_lora.serving.client import require_url
        from pytest_mistral_lora.serving.servers import RECOGNISED, find_server

        # an address may have an equals sign, too
        is_bare = text.startswith(("http://", "https://")) or "=" not in text
        name, _, url = ("", "", text) if is_bare else text.partition("=")
        kind, _, precision = name.partition(":")
        kind, _, version = (kind or RECOGNISED, "", "") if kind.endswith(".py") or not kind else kind.partition("@")
        if precision and precision not in TOLERANCES:
            raise InputError(f"unknown precision {precision!r}", expected=f"one of {', '.join(TOLERANCES)}")
        if kind != RECOGNISED:
            find_server(kind)
        return cls(kind, require_url(url), version, precision)

    def __str__(self) -> str:
        """Return the server as it was named."""
        version = f"@{self.version}" if self.version else ""
        return f"{self.kind}{version}{f':{self.precision}' if self.precision else ''}={self.url}"

    @property
    def name(self) -> Path:
        """A name for the server: its kind and address, without the scheme."""
        return Path(f"{Path(self.kind).stem}-{self.url.partition('://')[2].replace('/', '-')}")

    def target(self, name: str, judge: Target, adapter: Path | None = None, **more: Any) -> ServerTarget:
        """Return the target of the server; `more` are further attributes."""
        own: dict[str, Any] = {"kind": self.kind, "url": self.url, "version": self.version, "precision": self.precision}
        return ServerTarget(name, judge=judge, adapter=adapter, **own, **more)


def named_targets(
    *,
    tokenizers: Sequence[Path] = (),
    recipes: Sequence[Path] = (),
    datasets: Sequence[Path] = (),
    adapters: Sequence[Path] = (),
    encoded: Sequence[Path] = (),
    runners: Sequence[RunnerChoice] = (),
    ggufs: Sequence[Path] = (),
    servers: Sequence[ServerChoice] = (),
    server_rows: Sequence[Path] = (),
    judges: Sequence[Path] = (),
    base: Path | None = None,
    oracle: str | None = None,
) -> list[Target]:
    """Return a target for each path, named after it; equal names get a number.

    Args:
        tokenizers: Tokenizer files, checkpoint folders, or names of shipped tokenizers.
        recipes: Recipe files.
        datasets: Files of chat rows; each is judged with every tokenizer, or else with every recipe's.
        adapters: Adapter folders.
        encoded: Encoded-rows files; they are held to the first tokenizer or recipe.
        runners: Runners; each is judged with every tokenizer and recipe, or else with an embedded tokenizer.
        ggufs: GGUF files; each is held to the first tokenizer or recipe, or else to the one that it is recognised by.
        servers: Running servers; each is held to the first tokenizer or recipe, and to the transcripts of each adapter.
        server_rows: Files of rows to ask each server in place of the packaged ones.
        judges: Tokenizers that encode the rows of the other targets, and are no targets themselves.
        base: The base checkpoint's folder of the adapters.
        oracle: The declared oracle of tokenizers and recipes without a Mistral tokenizer file, or None.
    """
    names: list[str] = []  # parts of node ids, so that two targets must not share one

    def name(path: Path) -> str:
        names.append(free_name(name_of(path), names))
        return names[-1]

    def tokenizer(path: Path, *, trains: bool) -> Target:
        if not is_shipped(path):
            return Target(name(path), path, trains=trains, oracle_name=oracle)
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer

        return Target(name(path), shipped_tokenizer(str(path)), trains=trains)

    targets = [tokenizer(path, trains=True) for path in tokenizers]
    encoders = [*(tokenizer(path, trains=False) for path in judges), *targets]
    made = [RecipeTarget(name(path), path, trains=True, oracle_name=oracle) for path in recipes]
    targets += made
    for judge in encoders or made:
        many = f"-{judge.name}" if len(encoders or made) > 1 else ""
        targets += [DatasetTarget(name(Path(f"{name_of(path)}{many}")), path, judge=judge) for path in datasets]
    every = [*encoders, *made] or [Target(EMBEDDED_TRAINING)]
    targets += [EncodedTarget(name(path), path, judge=every[0]) for path in encoded]
    for one in runners:
        title = name_of(Path(one.runner)).removesuffix(".py")
        for judge in every:
            of_judge = name(Path(f"{title}-{judge.name}"))
            targets.append(RunnerTarget(of_judge, one.config, runner=one.runner, judge=judge))
    targets += [AdapterTarget(name(path), path, base=base, beside=tuple(adapters)) for path in adapters]
    targets += [
        GgufTarget(
            name(path),
            path,
            oracle_name=oracle,
            judge=next(iter((*encoders, *made)), None),
            base=base,
            folders=tuple(adapters),
        )
        for path in ggufs
    ]
    targets += [
        one.target(
            name(Path(f"{one.name}-{name_of(adapter)}") if adapter and len(adapters) > 1 else one.name),
            every[0],
            adapter,
            rows=tuple(server_rows),
        )
        for one in servers
        for adapter in adapters or (None,)
    ]
    return targets
