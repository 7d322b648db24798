from __future__ import annotations

import threading
import time

import pytest

from uda.bench.claims import Claims
from uda.bench.launch import Outcome, prepare
from uda.bench.ledger import Ledger
from uda.bench.listing import duration, estimate, listing
from uda.bench.runner import run_all
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError


def ledger_of(suite) -> Ledger:
    return Ledger(suite.ledger)


def test_every_run_once_and_a_line_for_each(load, fake):
    suite = load()
    tally = run_all(suite.runs(), ledger_of(suite), launch=fake)
    assert len(tally.finished) == 8
    assert sorted(fake.done) == sorted(r.label for r in suite.runs())
    line = ledger_of(suite).read()[0]
    assert line["status"] == "finished"
    assert (line["suite"], line["task"], line["method"], line["seed"]) == ("toy", "a->b", "plain", 0)
    assert line["metrics"]["target_accuracy"].keys() == {"last", "selected", "oracle"}
    assert line["scores"]["im"]["last"] == 1.0
    assert line["config"]["seed_everything"] == 0
    assert line["select_by"] == DEFAULT_SCORE


def test_a_finished_run_is_not_run_again(load, fake):
    suite = load()
    run_all(suite.runs("a->b"), ledger_of(suite), launch=fake)
    fake.done.clear()
    run_all(suite.runs(), ledger_of(suite), launch=fake)
    assert len(fake.done) == 4
    assert all(label.startswith("b->a") for label in fake.done)
    fake.done.clear()
    assert run_all(suite.runs(), ledger_of(suite), launch=fake).finished == []
    assert fake.done == []


def test_a_changed_config_is_run_again_and_only_it(load, fake):
    suite = load()
    run_all(suite.runs(), ledger_of(suite), launch=fake)
    fake.done.clear()
    changed = load(
        methods={
            "plain": {},
            "dann": {"plugins": {"align": {"class_path": "DANN", "init_args": {"weight": 2.0}}}},
        }
    )
    run_all(changed.runs(), ledger_of(changed), launch=fake)
    assert sorted(fake.done) == sorted(r.label for r in changed.runs("dann"))
    assert fake.configs["a->b/dann/0"]["model"]["plugins"]["align"]["init_args"] == {"weight": 2.0}


def test_a_failure_is_recorded_and_the_rest_goes_on(load, capsys, launcher):
    suite, launch = load(), launcher(fail=("a->b/dann",))
    tally = run_all(suite.runs(), ledger_of(suite), launch=launch)
    assert len(tally.finished) == 6
    assert tally.failed == ["a->b/dann/0", "a->b/dann/1"]
    failed = [r for r in ledger_of(suite).read() if r["status"] == "failed"]
    assert failed[0]["error"].endswith("RuntimeError: out of luck")
    assert failed[0]["exit_code"] == 1
    assert "RuntimeError: out of luck" in capsys.readouterr().out
    launch.fail = ()
    launch.done.clear()
    assert len(run_all(suite.runs(), ledger_of(suite), launch=launch).finished) == 2  # tried again next time
    assert len(launch.done) == 2


def test_a_run_without_a_summary_has_failed(load):
    suite = load()

    def silent(run, clean, environment):
        prepare(run, clean)
        return Outcome(0, 0.1, "", {})

    tally = run_all(suite.runs("a->b/plain/0"), ledger_of(suite), launch=silent)
    assert tally.failed == ["a->b/plain/0"]
    assert ledger_of(suite).read()[0]["error"] == "the run ended without a summary"


def test_what_cannot_be_started_is_a_failure_too(load, monkeypatch, fake):
    suite = load(overrides={"data.reader.path": "${NOWHERE_AT_ALL}/x"})
    tally = run_all(suite.runs("a->b"), ledger_of(suite), launch=fake)
    assert len(tally.failed) == 4
    assert "NOWHERE_AT_ALL is not set" in ledger_of(suite).read()[0]["error"]


def test_workers_share_the_runs(load, fake):
    suite = load(seeds=list(range(10)))
    assert len(run_all(suite.runs(), ledger_of(suite), workers=4, launch=fake).finished) == 40
    assert len(fake.done) == len(set(fake.done)) == 40


def test_workers_take_the_gpus_in_turn(load, fake):
    suite, seen = load(), set()

    def launch(run, clean, environment):
        seen.add(environment["CUDA_VISIBLE_DEVICES"])
        time.sleep(0.02)
        return fake(run, clean, environment)

    run_all(suite.runs(), ledger_of(suite), workers=2, launch=launch, gpus=["4", "7"])
    assert seen == {"4", "7"}


def test_two_suites_at_once_do_each_run_once(load, launcher):
    suite, launch = load(seeds=list(range(5))), launcher()
    tallies = []
    calls = [
        threading.Thread(target=lambda: tallies.append(run_all(suite.runs(), ledger_of(suite), 2, launch)))
        for _ in range(2)
    ]
    for c in calls:
        c.start()
    for c in calls:
        c.join()
    assert len(launch.done) == len(set(launch.done)) == 20
    assert len(ledger_of(suite).read()) == 20
    assert sum(len(t.finished) for t in tallies) == 20


def test_a_run_that_another_process_has_is_waited_for(load, fake, monkeypatch):
    monkeypatch.setattr("uda.bench.runner._POLL", 0.05)
    suite = load()
    runs, claims = suite.runs("a->b/plain"), Claims(suite.ledger)
    assert claims.take(runs[0].key)
    out = []
    call = threading.Thread(target=lambda: out.append(run_all(runs, ledger_of(suite), launch=fake)))
    call.start()
    time.sleep(0.3)
    assert call.is_alive()
    assert fake.done == ["a->b/plain/1"]
    ledger_of(suite).append({"key": runs[0].key, "status": "finished", "task": "", "method": "", "seed": 0})
    claims.release(runs[0].key)
    call.join(10)
    assert out[0].others == ["a->b/plain/0"]
    assert fake.done == ["a->b/plain/1"]


def test_a_run_whose_holder_gave_up_is_taken_over(load, fake, monkeypatch):
    monkeypatch.setattr("uda.bench.runner._POLL", 0.05)
    suite = load()
    runs, claims = suite.runs("a->b/plain/0"), Claims(suite.ledger)
    assert claims.take(runs[0].key)
    threading.Timer(0.3, claims.release, [runs[0].key]).start()
    assert run_all(runs, ledger_of(suite), launch=fake).finished == ["a->b/plain/0"]


def test_one_run_under_two_names_is_refused(load, fake):
    suite = load(methods={"plain": {}, "same": {}})
    with pytest.raises(UDAError, match="are the same run"):
        run_all(suite.runs(), ledger_of(suite), launch=fake)


def test_an_interrupted_run_goes_on_from_its_checkpoint_and_a_failed_one_begins_anew(load):
    run = load().runs()[0]
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").write_text("x")
    assert "--ckpt_path" not in prepare(run, clean=False)[0]  # no run.json: not a run's directory
    assert not run.folder.exists()
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").write_text("x")
    (run.folder / "run.json").write_text("{}")
    argv = prepare(run, clean=False)[0]
    assert argv[-2:] == ["--ckpt_path", "last"]
    assert f"--seed_everything={run.seed}" in argv
    assert run.folder.exists()
    assert "--ckpt_path" not in prepare(run, clean=True)[0]
    assert not run.folder.exists()


def test_the_time_is_estimated_from_the_nearest_finished_runs(load):
    runs = {r.label: r for r in load().runs()}
    records = [
        {"status": "finished", "task": "a->b", "method": "plain", "wall_seconds": s} for s in (10.0, 20.0, 60.0)
    ] + [{"status": "failed", "task": "a->b", "method": "dann", "wall_seconds": 999.0}]  # fmt: skip
    guess = estimate(list(runs.values()), records)
    assert guess[runs["a->b/plain/1"].key] == 20.0
    assert guess[runs["b->a/plain/0"].key] == 20.0  # the same method
    assert guess[runs["a->b/dann/0"].key] == 20.0  # the same task
    assert set(estimate(list(runs.values()), []).values()) == {None}
    assert [duration(s) for s in (8, 200, 3900)] == ["8 s", "3 min 20 s", "1 h 05 min"]


def test_the_listing_tells_what_is_left(load, launcher):
    suite, launch = load(), launcher(fail=("a->b/dann/0",))
    assert "8 to run: no finished run to estimate" in listing(suite.runs(), ledger_of(suite))
    run_all(suite.runs("a->b/*/0"), ledger_of(suite), launch=launch)
    text = listing(suite.runs(), ledger_of(suite), workers=2)
    assert text.splitlines()[0].startswith("finished")
    assert text.splitlines()[1].startswith("failed")
    assert "8 runs, 1 finished, 7 to run: about" in text
