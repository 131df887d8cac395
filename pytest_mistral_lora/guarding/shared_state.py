"""State that a forked process shares with its parent: memory for several processes, connections, devices, threads."""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from pytest_mistral_lora.runners import TRAINERS

_MOST_OBJECTS = 20_000
"""Most objects to look at: a dataset may hold a million rows."""
_MOST_OF_ONE = 1_000

_KINDS: tuple[tuple[str, str, str], ...] = (
    ("socket", "socket", "a socket"),
    ("sqlite3", "Connection", "a connection to a database"),
    ("multiprocessing.connection", "_ConnectionBase", "a connection to another process"),
    ("multiprocessing.managers", "BaseProxy", "an object of another process"),
    ("multiprocessing.queues", "Queue", "a queue between processes"),
    ("multiprocessing.queues", "SimpleQueue", "a queue between processes"),
    ("multiprocessing.shared_memory", "SharedMemory", "shared memory"),
    ("multiprocessing.sharedctypes", "SynchronizedBase", "shared memory"),
    ("multiprocessing.synchronize", "SemLock", "a lock between processes"),
    ("concurrent.futures", "Executor", "a pool of workers"),
    ("multiprocessing.pool", "Pool", "a pool of workers"),
    ("subprocess", "Popen", "another process"),
)
"""Classes whose objects belong to several processes: module, name and words. A module that is not imported has none."""

_WHOLES = (
    ("torch.nn", "Module"),
    ("torch.optim", "Optimizer"),
    ("transformers.trainer", "Trainer"),
    ("transformers.trainer_callback", "TrainerCallback"),
    ("accelerate", "Accelerator"),
    ("logging", "Logger"),
)
"""Classes of objects of the run that a collator may lead to, and whose state is not one of the rows."""

_LIBRARIES = frozenset(("accelerate", "builtins", "datasets", "numpy", "peft", "torch", "transformers"))


@cache
def _libraries() -> frozenset[str]:
    """Return the modules whose functions hold nothing of a run: libraries, and trainers that are used as one."""
    return _LIBRARIES | {trainer.module for trainer in TRAINERS.of_this_package() if trainer.is_library}


def shared_with_copy(parts: Iterable[Any]) -> str:
    """Return what objects hold that a forked process would share with this one, in words; empty if nothing is found.

    Args:
        parts: A dataset, a sampler, a collator.
    """
    kinds = [(found, words) for module, name, words in _KINDS if (found := _loaded(module, name))]
    wholes = tuple(found for module, name in _WHOLES if (found := _loaded(module, name)))
    waiting = deque(parts)
    seen: set[int] = set()
    kept = []  # an id is used again once its object is gone
    while waiting and len(seen) < _MOST_OBJECTS:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, wholes):
            continue
        seen.add(id(value))
        kept.append(value)
        words = _shared_words(value, kinds)
        if words:
            return words
        waiting.extend(islice(_held(value), _MOST_OF_ONE))
    return ""


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _shared_words(value: Any, kinds: list[tuple[type, str]]) -> str:
    if isinstance(value, torch.Tensor):
        if value.device.type not in ("cpu", "meta"):
            return f"a tensor on the device {value.device}"
        is_shared: Any = value.is_shared  # without types
        return "a tensor in shared memory" if is_shared() else ""
    mmap, threading = sys.modules.get("mmap"), sys.modules.get("threading")
    if mmap is not None and isinstance(value, mmap.mmap) and not value.closed:
        with memoryview(value) as view:
            return "" if view.readonly else "a file that is mapped into memory for writing"
    if threading is not None and isinstance(value, threading.Thread) and value is not threading.main_thread():
        return "a thread" if value.is_alive() else ""
    return next((words for kind, words in kinds if isinstance(value, kind)), "")


def _held(value: Any) -> Iterator[Any]:
    """Yield the objects that an object holds, and those that its functions use."""
    if isinstance(value, str | bytes | int | float | ModuleType | BuiltinFunctionType | torch.Tensor):
        return
    if isinstance(value, type):
        return
    if isinstance(value, np.ndarray):
        yield value.base  # which the garbage collector does not see
    if isinstance(value, FunctionType):
        yield from _used_by(value)
        return
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
        return
    for cls in type(value).__mro__:
        if str(cls.__module__).partition(".")[0] not in _libraries():
            yield from (item for item in vars(cls).values() if isinstance(item, FunctionType))
    yield from gc.get_referents(value)


def _used_by(function: FunctionType) -> Iterator[Any]:
    """Yield what a function has captured, its defaults, and the global objects that it names."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    if str(function.__module__).partition(".")[0] in _libraries():
        return
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
