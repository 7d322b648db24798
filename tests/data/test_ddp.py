"""Two processes: together they see what one process with the doubled batch sees, and count each row once."""

from __future__ import annotations

import pytest
import torch

from uda.data import DataModule, Generated, valid_rows


def run(trainer, recorder, batch, path=None, **kwargs):
    data = DataModule(
        Generated(n=61), "source", "target", batch_size=batch, target_batch_size=batch, epoch_steps=4, seed=2
    )
    model = recorder()
    model.path = path
    trainer(max_epochs=3, **kwargs).fit(model, data)
    return model


@pytest.fixture
def saving(recorder):
    class Saving(recorder):
        def on_fit_end(self):
            if self.path is not None:
                rows = {
                    d: [b["index"][valid_rows(b["index"], self.global_rank, 2)] for b in batches]
                    for d, batches in self.evaluated.items()
                }
                torch.save((self.seen, rows), f"{self.path}/rank{self.global_rank}.pt")

    return Saving


@pytest.mark.slow
def test_two_processes(trainer, saving, tmp_path):
    one = run(trainer, saving, 8).seen
    # Lightning's own sampler stays switched on: the loaders must not let it in
    run(trainer, saving, 4, tmp_path, devices=2, strategy="ddp_fork", use_distributed_sampler=True)
    (first, rows0), (second, rows1) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert len(one) == len(first) == len(second) == 12
    for whole, a, b in zip(one, first, second, strict=True):
        for key in ("sources/source", "target"):
            assert torch.equal(whole[key]["index"], torch.cat([a[key]["index"], b[key]["index"]]))
    for domain, n in ((0, 6), (1, 61)):
        seen = torch.cat(rows0[domain] + rows1[domain]).tolist()
        assert sorted(seen) == sorted(list(range(n)) * 3)  # three epochs
