from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time

import pytest

from uda.bench.claims import Claims
from uda.bench.ledger import Ledger, latest


def record(key: str, **more) -> dict:
    return {"key": key, "status": "finished", "task": "t", "method": "m", "seed": 0, "suite": "s", **more}


def test_what_is_appended_is_read(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.read() == []
    ledger.append(record("a"))
    ledger.append(record("b", status="failed"))
    assert [r["key"] for r in ledger.read()] == ["a", "b"]
    assert list(ledger.finished()) == ["a"]
    assert ledger.failures() == {"b": 1}


def test_a_torn_line_costs_that_line_only(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(record("a"))
    with ledger.path.open("a") as file:
        file.write('{"key": "torn", "status": "fini')  # a crash in mid-write
    ledger.append(record("b"))
    with pytest.warns(UserWarning, match=r"1 line\(s\) are no records"):
        assert [r["key"] for r in ledger.read()] == ["a", "b"]


def write_many(path: str, name: str, count: int) -> None:
    ledger = Ledger(path)
    for i in range(count):
        ledger.append(record(f"{name}{i}", padding="x" * 5000))


def test_two_writers_lose_no_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(str(path), name, 60)) for name in "ab"]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 120
    assert {json.loads(line)["key"] for line in lines} == {f"{n}{i}" for n in "ab" for i in range(60)}


def test_the_latest_run_of_a_cell_counts():
    rows = [
        record("old", seed=0),
        record("other", seed=1),
        record("new", seed=0),
        record("bad", status="failed"),
    ]
    assert [r["key"] for r in latest(rows)] == ["new", "other"]


def test_a_claim_excludes_others_until_it_is_released(tmp_path):
    claims = Claims(tmp_path / "ledger.jsonl")
    assert claims.take("k")
    assert claims.holder("k")["pid"] == os.getpid()
    assert not claims.take("k")
    claims.release("k")
    assert claims.holder("k") is None
    assert claims.take("k", done=lambda: False)
    claims.release("k")
    assert not claims.take("k", done=lambda: True)


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path):
    claims = Claims(tmp_path / "ledger.jsonl")
    child = multiprocessing.get_context("fork").Process(target=claims.take, args=("k",))
    child.start()
    child.join()
    assert (claims.folder / "k.json").is_file()
    assert claims.take("k")


def test_a_new_process_with_an_old_number_does_not_keep_a_claim_alive(tmp_path):
    claims = Claims(tmp_path / "ledger.jsonl")
    assert claims.take("k")
    file = claims.folder / "k.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "started": "1"}))
    assert claims.holder("k") is None


def test_a_claim_of_another_machine_lives_by_its_signs_of_life(tmp_path):
    claims = Claims(tmp_path / "ledger.jsonl", stale_after=60)
    assert claims.take("k")
    file = claims.folder / "k.json"
    file.write_text(json.dumps({"host": f"not-{socket.gethostname()}", "pid": 1, "started": None}))
    assert not claims.take("k")
    old = time.time() - 61
    os.utime(file, (old, old))
    assert claims.take("k")


def test_a_torn_claim_is_none(tmp_path):
    claims = Claims(tmp_path / "ledger.jsonl")
    claims.folder.mkdir()
    (claims.folder / "k.json").write_text('{"host": ')
    assert claims.take("k")


def take_and_say(folder: str, barrier, won) -> None:
    claims = Claims(folder)
    barrier.wait()
    if claims.take("k"):
        won.put(os.getpid())
        time.sleep(0.5)  # stays alive while the others try


def test_of_many_that_reach_for_a_stale_claim_one_gets_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    context = multiprocessing.get_context("fork")
    dead = context.Process(target=Claims(path).take, args=("k",))
    dead.start()
    dead.join()
    barrier, won = context.Barrier(6), context.Queue()
    racers = [context.Process(target=take_and_say, args=(path, barrier, won)) for _ in range(6)]
    for r in racers:
        r.start()
    for r in racers:
        r.join()
    assert won.get(timeout=5)
    assert won.empty()
