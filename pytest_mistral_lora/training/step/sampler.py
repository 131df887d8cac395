"""Which rows an optimizer step has: decided by the seed and the step's number, however many processes share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]]):
    """For each optimizer step, the rows of one process; together the processes have every row once.

    The last step of an epoch has what is left, and none is repeated to fill it.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make a sampler.

        Args:
            rows: Rows in the dataset.
            batch_size: Rows of a step, over all processes.
            process: Number of this process.
            processes: How many there are.
            seed: Decides the order, anew in each epoch; None for the order of the dataset.
            epoch: Says which epoch begins.
        """
        self._rows, self._batch_size = rows, batch_size
        self._process, self._processes = process, processes
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-self._rows // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each step of the epoch that begins: their places in the dataset."""
        order = self._order()
        for start in range(0, self._rows, self._batch_size):
            yield order[start : start + self._batch_size][self._process :: self._processes].tolist()

    def _order(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if self._seed is None:
            return np.arange(self._rows)
        return np.random.default_rng((self._seed, self._epoch())).permutation(self._rows)
