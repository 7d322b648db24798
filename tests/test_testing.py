"""The testing kit: sound plugins pass, and each broken one fails in the check meant for it."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import uda
from uda.testing import CHECKS, CheckFailed, PluginWarning, check_plugin, check_plugins_ddp, forks

HERE = Path(__file__).parent


def load(name: str):
    """A module of this folder, under a name of its own."""
    full = f"uda_test_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


broken, sound = load("broken_plugins"), load("sound_plugins")


@pytest.mark.parametrize("cls", broken.BROKEN, ids=lambda c: c.__name__)
def test_broken_plugin_fails_in_its_check(cls):
    with pytest.raises(CheckFailed) as caught:
        check_plugin(cls, only=["construction", broken.BROKEN[cls]])
    assert caught.value.check == broken.BROKEN[cls], str(caught.value)
    text = str(caught.value)
    assert text.startswith(f"{cls.__name__}: check '{caught.value.check}' failed: ")
    assert "What to do: " in text


@pytest.mark.slow
@pytest.mark.parametrize("cls", broken.BROKEN, ids=lambda c: c.__name__)
def test_broken_plugin_passes_the_checks_before(cls):
    """No other check complains first, with a text that would mislead."""
    with pytest.raises(CheckFailed) as caught:
        check_plugin(cls, ddp=False)
    assert caught.value.check == broken.BROKEN[cls], str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("cls", broken.BROKEN_UNDER_DDP, ids=lambda c: c.__name__)
def test_broken_under_two_processes(cls):
    with pytest.raises(CheckFailed, match=broken.BROKEN_UNDER_DDP[cls]) as caught:
        check_plugin(cls, only=["ddp"], ddp_timeout=4 if cls is broken.WaitsForEver else 180)
    assert caught.value.check == "ddp"


FEW = (sound.TwoPhases, sound.TeacherAndBank)  # they fill most hooks between them


@pytest.mark.parametrize(
    "cls",
    [c if c in FEW else pytest.param(c, marks=pytest.mark.slow) for c in sound.SOUND],
    ids=lambda c: c.__name__,
)
def test_sound_plugin_passes(cls):
    report = check_plugin(cls, ddp=False)
    assert set(report.passed) == set(CHECKS) - {"ddp"}
    assert report.skipped == {"ddp": "ddp=False"}


@pytest.mark.slow
def test_sound_plugin_passes_under_two_processes_that_are_no_forks_of_this_one(monkeypatch):
    """As beside an accelerator, or on another system than Linux."""
    monkeypatch.setattr(forks, "can_fork", lambda: False)
    assert check_plugin(sound.TeacherAndBank, only=["ddp"]).passed == ["ddp"]


@pytest.mark.slow
def test_several_plugins_share_a_pair_of_processes():
    check_plugins_ddp([(sound.TeacherAndBank, {}), (sound.TwoPhases, {})])
    wrong, message = next(iter(broken.BROKEN_UNDER_DDP.items()))
    with pytest.raises(CheckFailed, match=message) as caught:
        check_plugins_ddp([(sound.TwoPhases, {}), (wrong, {}), (sound.TeacherAndBank, {})])
    assert caught.value.plugin == wrong.__name__


def second_dies(text):
    print(text, os.environ["LOCAL_RANK"])
    if os.environ["LOCAL_RANK"] == "1":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def speak(text):
    print(text)
    logging.getLogger("uda.test").error("logged")


@pytest.mark.slow
def test_a_process_writes_to_its_files_whatever_became_of_the_streams_of_this_one(tmp_path):
    handler = logging.StreamHandler(io.StringIO())
    handler.stream.close()  # as pytest does at the end of a test
    logging.getLogger("uda.test").addHandler(handler)
    try:
        done = forks.run(speak, "said", folder=tmp_path)
    finally:
        logging.getLogger("uda.test").removeHandler(handler)
    assert (done.returncode, done.stdout) == (0, "said\n")
    if forks.can_fork():
        assert "logged" in done.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_other(tmp_path):
    wrong, outputs = forks.run_ranks(second_dies, "this is rank", folder=tmp_path)
    assert wrong == "process 1 failed"
    assert outputs[0].strip() == "this is rank 1"
    assert all(k not in os.environ for k in ("LOCAL_RANK", "WORLD_SIZE"))


@pytest.mark.parametrize("sources", [1, 2])
def test_images_and_several_sources(sources):
    report = check_plugin(
        sound.TeacherAndBank,
        kind="images",
        sources=sources,
        only=["construction", "lifecycle", "liveness", "resume"],
    )
    assert report.objectives == ["teacher", "memory"]


def test_description_needs_plain_arguments():
    with pytest.raises(CheckFailed, match="no numbers and names") as caught:
        check_plugin(broken.TakesModule, init_args={"net": torch.nn.Linear(2, 2)})
    assert caught.value.check == "construction"


def test_undocumented_argument_warns():
    with pytest.warns(PluginWarning, match="'strength' is not in the docstring"):
        report = check_plugin(broken.Undocumented, only=["construction"])
    assert len(report.warnings) == 1
    assert "strength" in str(report)


def test_suspects_are_named():
    with pytest.raises(CheckFailed, match="no checkpoint holds: count"):
        check_plugin(broken.PlainCounter, only=["resume"])


def test_local_class_is_refused_for_two_processes():
    class Local(uda.Plugin):
        @uda.hookimpl
        def align_features(self, step):
            return {"gap": step.target.features.mean()}

    with pytest.raises(CheckFailed, match="top level of a module"):
        check_plugin(Local, only=["ddp"])


def test_partners_take_part():
    partners = {"mean": "uda.testing.task.MeanGap"}
    report = check_plugin(sound.WeighsOnly, partners=partners, only=["lifecycle", "liveness"])
    assert report.passed == ["lifecycle", "liveness"]


class MovesStatistics(uda.Plugin):
    """Acts on BatchNorm alone, which the task's own networks lack where effects are looked for."""

    @uda.hookimpl
    def adapt(self, model, batch):
        """Predictions by the batch's statistics."""
        for m in model.backbone.modules():
            if isinstance(m, torch.nn.BatchNorm1d):
                m.train()
        return model.head(model.bottleneck(model.backbone(batch.x)))


def test_a_plugin_may_bring_its_network():
    given = {"only": ["liveness"], "data_args": {"eval_batch_size": 8}}
    with pytest.raises(CheckFailed, match="no effect on this task"):
        check_plugin(MovesStatistics, **given)
    made = []
    check_plugin(MovesStatistics, backbone=lambda: made.append(uda.nn.MLP([8])) or made[-1], **given)
    assert len({id(net) for net in made}) == len(made) > 2  # no run goes on with another's weights


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    check_plugin(sound.RejectsOnly, only=["lifecycle"])
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_unknown_check_is_named():
    with pytest.raises(ValueError, match="resum"):
        check_plugin(sound.RejectsOnly, skip={"resum": "no reason"})
