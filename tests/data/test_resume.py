"""A resumed run sees exactly the batches that the interrupted one would have seen."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from uda.data import DataModule, Generated
from uda.plugin import DataNeeds

NEEDS = DataNeeds(held_out=True, views=frozenset({"strong"}), source_views=frozenset({"weak"}))


def data(**kwargs):
    # 117 source and 130 target rows in batches of 8 and 12: no domain's pass ends with an epoch
    reader = Generated("blobs", n=130, classes=3)
    kwargs = {"batch_size": 8, "target_batch_size": 12, "epoch_steps": 5, "seed": 3, **kwargs}
    return DataModule(reader, "source", "target", **kwargs)


@pytest.fixture
def run(trainer, recorder):
    def go(ckpt_path=None, stop_after=None, data_args=None, **kwargs):
        model = recorder(NEEDS, stop_after)
        try:
            trainer(max_epochs=4, **kwargs).fit(model, data(**(data_args or {})), ckpt_path=ckpt_path)
        except KeyError:
            assert stop_after is not None
        return model.seen

    return go


def batches_done(path):
    state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return state["total"]["processed"]


CASES = {
    "every batch": {},
    "validation in the epoch": {"val_check_interval": 2},
    "accumulation": {"accumulate_grad_batches": 2},
    "short epochs": {"limit_train_batches": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_resume_after_any_batch(run, same, tmp_path, case):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(enable_checkpointing=True, callbacks=[saver], **CASES[case])
    for step in (1, 3, 4, 5, 7, 10):  # within, at the end and at the start of an epoch
        path = tmp_path / f"step={step}.ckpt"
        resumed = run(ckpt_path=path, **CASES[case])
        done = batches_done(path)
        assert len(resumed) == len(whole) - done, step
        assert same(resumed, whole[done:]), step


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_after_a_crash_with_workers(run, same, tmp_path, workers):
    whole = run()
    saver = OnExceptionCheckpoint(tmp_path, filename="crash")
    args = {"num_workers": workers}
    first = run(stop_after=8, callbacks=[saver], enable_checkpointing=True, data_args=args)
    resumed = run(ckpt_path=tmp_path / "crash.ckpt", data_args=args)
    assert len(first) == 8
    assert same(first + resumed, whole)


@pytest.mark.parametrize("where", ["validation end", "epoch end"])
def test_resume_after_validation_or_epoch_end(run, same, tmp_path, where):
    saver = ModelCheckpoint(
        tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=where == "epoch end"
    )
    whole = run(enable_checkpointing=True, callbacks=[saver], val_check_interval=3)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for path in paths:
        assert same(run(ckpt_path=path, val_check_interval=3), whole[batches_done(path) :]), path


def test_resume_with_a_schedule_over_the_whole_run(trainer, recorder, same, tmp_path):
    class Scheduled(recorder):
        def configure_optimizers(self):
            # asking for the number of steps sets the loaders up before the counters are restored
            steps = int(self.trainer.estimated_stepping_batches)
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    whole = Scheduled(NEEDS)
    trainer(max_epochs=4, enable_checkpointing=True, callbacks=[saver]).fit(whole, data())
    resumed = Scheduled(NEEDS)
    trainer(max_epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "step=7.ckpt")
    assert same(resumed.seen, whole.seen[7:])


def test_resume_with_other_settings_warns(run, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    run(enable_checkpointing=True, callbacks=[saver])
    with pytest.warns(UserWarning, match=r"other data settings.*seed 3 -> 4"):
        run(ckpt_path=next(iter(tmp_path.glob("*.ckpt"))), data_args={"seed": 4})


def test_epochs_go_on_where_the_last_one_ended(run, same):
    few_long, many_short = run(data_args={"epoch_steps": 10}), run(data_args={"epoch_steps": 5})
    assert len(few_long) == 2 * len(many_short)
    assert same(few_long[: len(many_short)], many_short)
