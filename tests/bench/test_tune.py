"""Tuning: the search sees label-free scores, and nothing that target labels had a part in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from uda.bench.launch import Outcome, prepare
from uda.bench.tune import Study, label_free, suggest
from uda.cli import main
from uda.errors import UDAError

optuna = pytest.importorskip("optuna")


def launch_with(oracle, tried: list):
    """Score: best at weight 0.5. Target accuracies: whatever ``oracle`` says of the weight."""

    def launch(run, clean, environment):
        prepare(run, clean)
        weight = run.config["model"]["plugins"]["align"]["init_args"]["weight"]
        tried.append((run.task, run.seed, weight))
        accuracy = {"last": oracle(weight), "selected": oracle(weight), "oracle": oracle(weight)}
        run.folder.mkdir(parents=True)
        summary = {
            "target_accuracy": accuracy, "target_class_accuracy": accuracy, "source_accuracy": 1.0,
            "scores": {"im": {"last": 0.0, "target_accuracy": accuracy["last"]}},
            "selection": {"score": run.select_by, "value": -((math.log10(weight) - math.log10(0.5)) ** 2)},
        }  # fmt: skip
        (run.folder / "summary.json").write_text(json.dumps(summary))
        return Outcome(0, 0.1, "", {})

    return launch


def study(path, folder, launch, **options) -> Study:
    return Study.of(path, "align", "im", method="dann", runs_dir=folder, launch=launch, **options)


def test_the_search_is_blind_to_target_labels(write_suite, tmp_path):
    tried = {}
    for name, oracle in {
        "agrees": lambda w: 1 - abs(w - 0.5),
        "opposes": lambda w: abs(w - 0.5) / 3,
        "none": lambda w: None,
    }.items():
        tried[name] = []
        s = study(write_suite(), tmp_path / name, launch_with(oracle, tried[name]))
        s.run(8)
        assert all(set(t) == {"trial", "settings", "im"} for t in s._trials())
    assert tried["agrees"] == tried["opposes"] == tried["none"]


def test_a_poisoned_accuracy_stops_whoever_reads_it():
    class Poisoned(dict):
        def __getitem__(self, key):
            if "target" in key or "oracle" in key or "scores" in key:
                raise AssertionError(f"the search read {key}")
            return super().__getitem__(key)

        get = __getitem__

    summary = Poisoned(target_accuracy=1, scores={}, selection=Poisoned(score="im", value=0.5))
    assert label_free(summary, "im") == 0.5
    with pytest.raises(AssertionError, match="target_accuracy"):
        summary["target_accuracy"]
    assert label_free({"selection": {"score": "im", "value": None}}, "im") == -math.inf
    with pytest.raises(UDAError, match="selected by"):
        label_free(summary, "entropy")


def test_it_finds_the_best_score_and_goes_on_where_it_stopped(write_suite, tmp_path, capsys):
    tried: list = []
    path, launch = write_suite(), launch_with(lambda w: 0.25, tried)
    study(path, tmp_path / "s", launch).run(5)
    s = study(path, tmp_path / "s", launch)
    s.run(20)
    assert len(s._trials()) == 20
    assert "target 25" not in capsys.readouterr().out  # accuracies are not shown while it searches
    best = max(s._trials(), key=lambda t: t["im"])
    assert 0.2 < best["settings"]["weight"] < 1.25
    report = s.report()
    assert f"--model.plugins.align.weight={best['settings']['weight']}" in report
    assert " 25.0 " in report


def test_a_trial_is_the_mean_over_tasks_and_seeds(write_suite, tmp_path):
    tried: list = []
    s = study(write_suite(), tmp_path, launch_with(lambda w: 0.5, tried), seeds=[3, 4])
    value = s.value({"weight": 1.0})
    assert {(t, seed) for t, seed, _ in tried} == {("a->b", 3), ("a->b", 4), ("b->a", 3), ("b->a", 4)}
    assert value == pytest.approx(-(math.log10(2) ** 2))
    assert s.runs[0].config["model"]["plugins"]["align"]["init_args"] == {"weight": 1.0}  # not changed


def test_a_config_of_fit_will_do(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "model": {"plugins": {"align": "DANN"}}}))
    tried: list = []
    s = Study.of(path, "align", launch=launch_with(lambda w: 0.5, tried), runs_dir=tmp_path / "t")
    s.run(2)
    assert len(tried) == 2


def test_search_spaces_of_each_form():
    trial = optuna.trial.FixedTrial({"a": 2, "b": 0.1, "c": True, "d": 3.0})
    assert suggest(trial, "a", (1, 4)) == 2
    assert suggest(trial, "b", (0.01, 1.0, "log")) == 0.1
    assert suggest(trial, "c", [False, True]) is True
    assert suggest(trial, "d", (1.0, 4.0)) == 3.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plugin", "aline", "--method", "dann"], "Did you mean 'align'"),
        (["--plugin", "align", "--method", "dan"], "Did you mean 'dann'"),
        (["--plugin", "align", "--tasks", "a->c"], "no task 'a->c'"),
        (["--plugin", "align", "--score", "imm"], "unknown label-free score"),
        (["--plugin", "nothing"], "none has"),
    ],
)
def test_a_slip_is_named(write_suite, capsys, words, message):
    assert main(["bench", "tune", str(write_suite()), *words]) == 2
    assert message in capsys.readouterr().err


def test_trials_share_the_run_that_they_start_from(fake, write_suite, tmp_path):
    dann = {"align": {"class_path": "DANN", "init_args": {"weight": 1.0}}}
    path = write_suite(methods={"plain": {}, "dann": {"plugins": dann, "init_from": "plain"}})
    study = Study.of(path, "align", "im", method="dann", tasks=["a->b"], runs_dir=tmp_path / "tune", launch=fake)
    for weight in (0.1, 0.2):
        study.value({"weight": weight})
    assert fake.done == ["a->b/plain/0", "a->b/dann/0", "a->b/dann/0"]
    assert Path(fake.configs["a->b/dann/0"]["model"]["init_from"]).is_relative_to(tmp_path / "tune")
