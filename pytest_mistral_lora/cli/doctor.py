"""`mistral-lora doctor`: the installation and the machine, and what to change."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.cli.verb import Verb, add_json_option, print_json
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, counted
from pytest_mistral_lora.extras import EXTRAS

if TYPE_CHECKING:
    from pytest_mistral_lora.environment import InstallationFault, LibraryState
    from pytest_mistral_lora.environment.machine import HubState, TorchBuild

_DESCRIPTION = """\
Show the installed versions and the supported ones, faults that are known of their combination, extras, torch's build
with its devices and the precision for each, the cache, and whether a token for the Hub is there. The token itself is
not read. Nothing is sent, unless you give --hub."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hub",
        action="store_true",
        help="ask the Hub whether it answers; not if HF_HUB_OFFLINE is set",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the state of the installation; return 1 if a known fault is installed."""
    from pytest_mistral_lora.environment import installed_versions, library_states, present_faults
    from pytest_mistral_lora.environment.machine import hub_state, machine_facts, torch_build

    installed = installed_versions()
    libraries = list(library_states(installed))
    torch, hub = torch_build(), hub_state(ask=args.hub)
    faults = present_faults(installed, libraries, torch.error)
    code = EXIT_FINDING if any(fault.severity == "error" for fault in faults) else EXIT_OK
    if args.json:
        extras = [{**asdict(extra), "command": extra.command, "missing": extra.missing} for extra in EXTRAS]
        print_json(
            {
                "exit_status": code,
                **machine_facts([{**asdict(library), "state": library.state} for library in libraries], torch),
                "extras": extras,
                "hub": asdict(hub),
                "faults": [asdict(fault) for fault in faults],
            }
        )
        return code
    lines = [f"pytest-mistral-lora {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [*_library_lines(libraries), *_extra_lines(), *_torch_lines(torch), *_hub_lines(hub), ""]
    for fault in faults:
        if not fault.server:
            lines += [*fault_lines(fault), ""]
    lines += [*_server_lines([fault for fault in faults if fault.server]), ""]
    sys.stdout.write("\n".join([*lines, _verdict(faults)]) + "\n")
    return code


def _library_lines(libraries: Sequence[LibraryState]) -> list[str]:
    from pytest_mistral_lora.report.tables import table_lines

    rows = {}
    for library in libraries:
        # list a library of two extras once; the list of extras names missing ones
        if library.name not in rows and (library.version or not library.extra):
            state = "" if library.state == "ok" else library.state
            rows[library.name] = (library.name, library.version or "-", library.supported or "any", state)
    return table_lines(("library", "installed", "supported", ""), rows.values(), shutil.get_terminal_size().columns)


def _extra_lines() -> Iterator[str]:
    yield "extras:"
    for extra in EXTRAS:
        state = f"not installed; to {extra.gives}: {extra.command}" if extra.missing else f"installed: {extra.gives}"
        yield f"  {extra.name:<9} {state}"


def _torch_lines(torch: TorchBuild) -> Iterator[str]:
    if not torch.version:
        yield "torch: not installed: checks that need a model are not checked"
        return
    yield f"torch: {torch.error}" if torch.error else f"torch: {torch.version}, built for {torch.build}"
    for device in torch.devices:
        memory = f", {device.memory / 2**30:.1f} GiB" if device.memory else ""
        yield f"  {device.name}{memory}: computes in {', '.join(device.precisions)}; {device.advice}"


def _hub_lines(hub: HubState) -> Iterator[str]:
    state = hub.reachable or ("HF_HUB_OFFLINE is set" if hub.offline else "not asked: --hub asks it")
    yield f"Hub: {hub.endpoint}; answers: {state}" if hub.reachable else f"Hub: {hub.endpoint}; {state}"
    token = f"there ({hub.token}), not shown" if hub.token else "none; a gated checkpoint needs one: hf auth login"
    yield f"  token: {token}"
    written = "" if hub.writable else ", and cannot be written: set HF_HUB_CACHE to another folder"
    yield f"  cache: {hub.cache} ({hub.free / 2**30:.1f} GiB free{written})"
    yield f"  encoded rows, results and runners: {hub.own_cache}"


def fault_lines(fault: InstallationFault) -> Iterator[str]:
    """Yield the lines of a fault for a terminal."""
    versions = ", ".join(f"{name} {range_}" for name, range_ in fault.versions.items())
    label = "FAULT" if fault.severity == "error" else "note"
    yield f"{label} {fault.id} ({versions})" if versions else f"{label} {fault.id}"
    yield f"  {fault.found}"
    if fault.remark:
        yield f"  {fault.remark}"
    yield f"  change: {fault.change}"
    if fault.source:
        yield f"  source: {fault.source}"


def _server_lines(faults: Sequence[InstallationFault]) -> Iterator[str]:
    """Yield the faults that servers have, wherever they run: a line each, since none may be yours."""
    yield "known of servers; serve-check finds whether yours has them, and docs/known-faults.md has the ways out:"
    for fault in faults:
        ranges = {name: range_.removeprefix("==") for name, range_ in fault.versions.items()}
        of_several = ", ".join(f"{name} {range_}" for name, range_ in ranges.items())
        versions = of_several if len(ranges) > 1 else f"{fault.server} {', '.join(ranges.values())}"
        yield f"  {versions}, {fault.id}: {fault.found}{f'; {fault.remark}' if fault.remark else ''}"


def _verdict(faults: Sequence[Any]) -> str:
    errors = sum(fault.severity == "error" for fault in faults)
    return f"{counted(errors, 'fault')}, {counted(len(faults) - errors, 'note')}"


VERB = Verb(
    "doctor",
    "show versions, extras, devices, known faults, and what to change",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora doctor",
        "mistral-lora doctor --hub",
        "mistral-lora doctor --json",
    ),
    failure="a version is not supported, or a known fault (no note) is installed",
)
