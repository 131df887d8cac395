"""`mistral-lora doctor`: the installation and the machine, and what to change."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.cli.verb import NEW_FOLDER, Verb, add_json_option, print_json, shown_path
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, MachineError, counted
from pytest_mistral_lora.extras import EXTRAS, require_extra

if TYPE_CHECKING:
    from pytest_mistral_lora.environment import InstallationFault, LibraryState
    from pytest_mistral_lora.environment.machine import HubState, TorchBuild

_DESCRIPTION = """\
Show the installed versions and the supported ones, faults that are known of their combination, extras, torch's build
with its devices and the precision for each, the cache, and whether a token for the Hub is there. The token itself is
not read. Nothing is sent, unless you give --hub.

With --gpu, try the GPUs of this machine with the trainer, for some ten minutes: tiny runs in each precision, packed,
checkpointed, in 4 bits, resumed and on all GPUs, whose losses and gradients are compared with those of the CPU; then
steps with the layers of a 7B model, without its weights, beside another trainer that is installed. FOLDER gets
gpu-trial.json and gpu-trial.md, which you can send to us."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hub",
        action="store_true",
        help="ask the Hub whether it answers; not if HF_HUB_OFFLINE is set",
    )
    parser.add_argument(
        "--gpu",
        type=NEW_FOLDER,
        metavar="FOLDER",
        help="try the GPUs of this machine with the trainer, and write what was found",
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the state of the installation; return 1 if a known fault is installed."""
    if args.gpu is not None:
        return _try_gpu(args.gpu)
    from pytest_mistral_lora.environment import installed_versions, library_states, present_faults
    from pytest_mistral_lora.environment.machine import hub_state, torch_build

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
                **_machine([{**asdict(library), "state": library.state} for library in libraries], torch),
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


def _machine(libraries: Any, torch: TorchBuild) -> dict[str, Any]:
    """Return the machine as plain JSON data."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": libraries,
        "torch": asdict(torch),
    }


def _try_gpu(folder: Path) -> int:
    """Try the GPUs, and write the report; return 1 if a run on them failed.

    Raises:
        InputError: If the folder exists.
        MachineError: If torch finds no GPU.
    """
    require_extra("train")
    import torch

    from pytest_mistral_lora.environment import installed_versions
    from pytest_mistral_lora.environment.machine import torch_build
    from pytest_mistral_lora.records.files import require_new
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.gpu_trial.report import GpuReport
    from pytest_mistral_lora.training.gpu_trial.shape import SEVEN_B, TARGETS, measure
    from pytest_mistral_lora.training.gpu_trial.trials import TRIALS, Trials

    require_new(folder)  # before ten minutes of work
    if not torch.cuda.is_available():
        step = "Run it on a machine with a GPU; mistral-lora doctor shows what torch finds."
        raise MachineError("torch finds no CUDA device: no GPU was tried", place="--gpu", next_step=step)
    display = RunDisplay.on_stderr()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    results = []
    with tempfile.TemporaryDirectory() as work:
        trials = Trials(Path(work), device="cuda", devices=torch.cuda.device_count(), has_bf16=has_bf16)
        for trial in TRIALS:
            results.append(found := trials.run(trial))
            display.line(f"{trial.name}: {found.verdict}")
    shapes = []
    for targets in TARGETS if has_bf16 else ():
        display.phase(f"steps of 7B's shape, adapter on {targets}")
        with redirect_stdout(sys.stderr):  # other trainers print their figures
            shapes += measure(SEVEN_B, device="cuda", targets=targets, peers=_peers())
    report = GpuReport(results, shapes, display.seconds, _machine(installed_versions(), torch_build()))
    report.write(folder)
    sys.stdout.write(f"{shown_path(folder)}\n")
    for name in report.failed:
        sys.stderr.write(f"failed: {name}\n")
    return EXIT_FINDING if report.failed else EXIT_OK


def _peers() -> dict[str, Any]:
    """Return what makes the training loop of each other trainer, by its title; None if it is not installed."""
    from pytest_mistral_lora.chat.rows import imported
    from pytest_mistral_lora.extras import is_installed
    from pytest_mistral_lora.runners import TRAINERS

    timed = [trainer for trainer in TRAINERS.values() if trainer.timed]
    return {trainer.title: imported(trainer.timed) if is_installed(trainer.module) else None for trainer in timed}


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
        "mistral-lora doctor --gpu gpu-trial",
    ),
    failure="a version is not supported, a known fault (no note) is installed, or a run on a GPU failed",
)
