from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from uda.errors import UDAError
from uda.nn import Bank, gather_domain, gather_rows
from uda.testing import forks


def test_write_read_and_filled():
    bank = Bank(5, features=(3,), score=(), logits=2)
    assert {k: tuple(v.shape) for k, v in bank.state_dict().items()} == {
        "features": (5, 3), "score": (5,), "logits": (5, 2), "filled": (5,),
    }  # fmt: skip
    f = torch.randn(2, 3, requires_grad=True)
    bank.write(
        torch.tensor([4, 1]), features=f, score=torch.tensor([0.1, 0.2]), logits=torch.ones(2, 2).half()
    )
    assert torch.equal(bank.read("features", torch.tensor([1, 4])), f.detach().flip(0))
    assert not bank.read("features").requires_grad
    assert bank.read("logits").dtype == torch.float32
    assert bank.filled.tolist() == [False, True, False, False, True]
    assert bank.score.tolist() == pytest.approx([0, 0.2, 0, 0, 0.1])


def test_last_duplicate_counts():
    bank = Bank(3, v=())
    bank.write(torch.tensor([2, 0, 2, 2, 0]), v=torch.arange(5.0))
    assert bank.v.tolist() == [4, 0, 3]


def test_momentum_mixes_known_rows_and_takes_new_ones_whole():
    bank = Bank(3, v=(2,))
    bank.write(torch.tensor([0]), v=torch.tensor([[1.0, 2.0]]), momentum=0.9)
    assert bank.v[0].tolist() == [1, 2]
    bank.write(torch.zeros(0, dtype=torch.long), v=torch.zeros(0, 2), momentum=0.9)
    bank.write(torch.tensor([0, 1, 0]), v=torch.tensor([[9.0, 9], [4, 5], [2, 4]]), momentum=0.75)
    torch.testing.assert_close(bank.v, torch.tensor([[1.25, 2.5], [4, 5], [0, 0]]))


def test_autocast_does_not_touch_the_rows():
    bank = Bank(2, v=())
    value = torch.tensor([1.2345678, 2.3456789])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bank.write(torch.tensor([0, 1]), v=value)
        bank.write(torch.tensor([0, 1]), v=value * 3, momentum=0.5)
    torch.testing.assert_close(bank.v, value * 2)


def test_state_round_trip_and_fingerprint():
    bank = Bank(4, v=(2,))
    empty = bank.fingerprint()
    bank.write(torch.tensor([3]), v=torch.ones(1, 2))
    fresh = Bank(4, v=(2,))
    assert fresh.fingerprint() == empty != bank.fingerprint()
    fresh.load_state_dict(bank.state_dict())
    assert fresh.fingerprint() == bank.fingerprint() == copy.deepcopy(bank).fingerprint()


@pytest.mark.parametrize(("index", "values", "message"), [
    ([4], {"v": torch.ones(1, 2)}, "holds 4 rows.*from 4 to 4"),
    ([-1], {"v": torch.ones(1, 2)}, "from -1"),
    ([0], {"w": torch.ones(1, 2)}, "got no value for 'v'"),
    ([0], {}, "got no value for 'v'"),
    ([0], {"v": torch.ones(1, 3)}, r"shape \(2,\).*\(1, 3\)"),
    ([0, 1], {"v": torch.ones(1, 2)}, "2 indices"),
])  # fmt: skip
def test_bad_writes_are_refused(index, values, message):
    with pytest.raises(UDAError, match=message):
        Bank(4, v=(2,)).write(torch.tensor(index), **values)


def test_bad_names_are_refused():
    for name in ("filled", "train", "momentum"):
        with pytest.raises(UDAError, match=name):
            Bank(4, **{name: (2,)})
    with pytest.raises(UDAError, match="named shape"):
        Bank(4)
    with pytest.raises(UDAError, match="Did you mean 'features'"):
        Bank(4, features=2).read("feature")


def test_without_a_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(gather_rows(x), x.detach())
    out = gather_domain(4, torch.tensor([2, 0, 3]), x)
    assert torch.equal(out, torch.stack([x[1], torch.zeros(2), x[0], x[2]]).detach())
    y = gather_domain(3, torch.tensor([1]), torch.tensor([True]))
    assert y.dtype == torch.bool
    assert y.tolist() == [False, True, False]


def _two_ranks(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    bank = Bank(6, features=(2,), score=())
    batches = {0: [[0, 1, 2], [5, 3], []], 1: [[2, 4], [], []]}[rank]  # uneven, one empty, sample 2 on both
    for batch in batches:
        n = len(batch)
        values = {"score": torch.full((n,), float(rank)), "features": torch.randn(n, 2, generator=generator)}
        bank.write(torch.tensor(batch, dtype=torch.long), momentum=0.5, **values)
    rows = gather_rows(torch.full((rank + 1, 2), rank == 1))
    index = torch.tensor([[0, 2], [1]][rank])
    domain = gather_domain(4, index, index * 10 + 1)
    torch.save((bank.state_dict(), bank.fingerprint(), rows, domain), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_equal_banks(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    method = "fork" if forks.can_fork() else "spawn"
    mp.start_processes(_two_ranks, args=(port, str(tmp_path)), nprocs=2, start_method=method)
    (state, print0, rows, domain), (_, print1, rows1, domain1) = (
        torch.load(tmp_path / f"{r}.pt") for r in (0, 1)
    )
    assert print0 == print1
    assert state["score"].tolist() == [0, 0, 1, 0, 1, 0]  # rank 1 is later in the gathered order
    assert state["filled"].all()
    assert torch.equal(rows, rows1)
    assert rows.tolist() == [[False] * 2, [True] * 2, [True] * 2]
    assert domain.tolist() == domain1.tolist() == [1, 11, 21, 0]
