"""Two processes played by two threads, for what plugins exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch


@pytest.fixture
def two_processes(monkeypatch) -> Callable[[ModuleType, Callable[[int], None]], None]:
    """Calls ``work(0)`` and ``work(1)`` at once; ``gather_rows`` and bank writes of ``module`` join what both give."""

    def run(module: ModuleType, work: Callable[[int], None]) -> None:
        slots, meet, rank = [None, None], threading.Barrier(2, timeout=20), threading.local()

        def exchange(tensor):
            slots[rank.number] = tensor.detach()
            meet.wait()
            both = torch.cat(list(slots))
            meet.wait()
            return both

        def write(bank, index, momentum=None, **values):
            index, values = exchange(index), {n: exchange(values[n]) for n in sorted(values)}
            for name, new in values.items():
                getattr(bank, name)[index] = new
            bank.filled[index] = True

        def as_rank(number: int) -> None:
            rank.number = number
            work(number)

        monkeypatch.setattr(module, "gather_rows", exchange)
        monkeypatch.setattr(module.Bank, "write", write)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(as_rank, range(2)))

    return run
