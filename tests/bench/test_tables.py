"""Figures of tables against values computed by hand."""

from __future__ import annotations

import csv
import io
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from uda.bench import tables
from uda.bench.across import suites_table
from uda.bench.render import render
from uda.bench.scores import scores_over, scores_table
from uda.bench.statistics import average_by_seed, by_task_and_seed, p_value, spearman, survives
from uda.errors import UDAError

#: accuracies of two methods, two tasks, three seeds
VALUES = {
    ("m", "t"): [0.50, 0.52, 0.57],
    ("m", "u"): [0.70, 0.70, 0.70],
    ("n", "t"): [0.60, 0.61, 0.65],
    ("n", "u"): [0.71, 0.73, 0.72],
}


def record(method, task, seed, last, selected=None, oracle=None, score=0.0, **more):
    accuracy = {"last": last, "selected": last if selected is None else selected, "oracle": oracle or last}
    return {
        "suite": "s", "method": method, "task": task, "seed": seed, "key": f"{method}{task}{seed}",
        "status": "finished", "select_by": "im", "seconds": 2.0 + seed, "peak_memory_mib": 100.0 + seed,
        "metrics": {"source_accuracy": 0.9, "target_accuracy": accuracy, "target_class_accuracy": accuracy},
        "scores": {"im": {"last": score, "target_accuracy": accuracy["selected"]}}, **more,
    }  # fmt: skip


@pytest.fixture
def records():
    return [
        record(m, t, seed, v, selected=v + 0.01, oracle=v + 0.02, score=v)
        for (m, t), vs in VALUES.items() for seed, v in enumerate(vs)
    ]  # fmt: skip


def test_mean_and_spread_over_seeds_and_the_average_of_each_seed(records):
    table = tables.accuracy_table(tables.frame(records))
    assert table.head == ["method", "t", "u", "average"]
    # m, t: mean of 50, 52, 57 is 53; deviations -3, -1, 4: sqrt(26 / 2) = 3.606
    # averages by seed: 60, 61, 63.5: mean 61.5, deviations -1.5, -.5, 2: sqrt(6.5 / 2) = 1.803
    assert table.rows[0] == ["m", "53.0 ± 3.6", "70.0 ± 0.0", "61.5 ± 1.8"]
    # n: 62 (-2, -1, 3: sqrt(14/2) = 2.646), 72 (1), by seed 65.5, 67, 68.5: 67, sqrt(4.5/2) = 1.5
    assert table.rows[1] == ["n", "62.0 ± 2.6", "72.0 ± 1.0", "67.0 ± 1.5"]
    assert math.isclose(table.numbers.loc[0, "t sd"], math.sqrt(13))
    assert "3 seeds" in table.caption


def test_each_figure_is_its_own_table_and_names_its_rule(records):
    data = tables.frame(records)
    assert tables.accuracy_table(data, "selected").rows[0][1] == "54.0 ± 3.6"
    assert tables.accuracy_table(data, "oracle").rows[0][1] == "55.0 ± 3.6"
    assert "rule: im" in tables.accuracy_table(data, "selected").caption
    assert "no selection" in tables.accuracy_table(data).caption
    assert "upper bound" in tables.accuracy_table(data, "oracle").caption


def test_the_best_is_marked_only_where_the_lead_survives(records):
    # Six pairs, n ahead in each: Wilcoxon's two-sided p is 2 / 2^6 = 0.03125; with 3 pairs no less than 0.25
    table = tables.accuracy_table(tables.frame(records))
    assert table.bold == {(1, 3)}
    assert tables.accuracy_table(tables.frame(records), alpha=0.03).bold == set()
    assert (1, 1) in tables.accuracy_table(tables.frame(records), test="t").bold
    equal = [record(m, "t", s, 0.5 + 0.01 * ((s + (m == "n")) % 2)) for m in "mn" for s in range(8)]
    assert tables.accuracy_table(tables.frame(equal)).bold == set()


def test_p_values_of_pairs():
    a = np.array([1.0, 2, 3, 4, 5, 6])
    assert p_value(a, a - 1 - 0.1 * a, "wilcoxon") == pytest.approx(2 / 64)
    assert p_value(a, a) == 1.0
    assert p_value(a[:1], a[:1] - 1) == 1.0
    # t = mean / (sd / sqrt n) of 1, 2, 3 = 2 / (1 / sqrt 3) = 3.4641; with 2 degrees of freedom
    t = 2 * math.sqrt(3)
    assert p_value(np.array([1.0, 2, 3]), np.zeros(3), "t") == pytest.approx(1 - t / math.sqrt(2 + t * t))
    with pytest.raises(UDAError, match="unknown test"):
        p_value(a, a, "anova")


@pytest.mark.parametrize("n", [2, 5, 8, 9])
def test_ties_and_zeros_give_the_p_value_of_all_signs(n):
    draw = np.random.default_rng(n)
    for _ in range(3):
        d = draw.integers(-3, 4, n).astype(float)
        d[:2] = [2, -2]
        ranks, some = rankdata(np.abs(d[d != 0])), d[d != 0]
        sums = [sum(r for r, up in zip(ranks, ups, strict=True) if up) for ups in product((0, 1), repeat=len(some))]
        own = ranks[some > 0].sum()
        tails = [sum(s <= own for s in sums), sum(s >= own for s in sums)]
        assert p_value(d, np.zeros(n)) == min(1.0, 2 * min(tails) / len(sums))


def test_a_pair_counts_where_all_methods_have_it():
    values = pd.DataFrame([[1.0, 2, 3, 4, 5, 6, np.nan], [0.5, 1, 1, 1, 1, 1, 99]], index=["a", "b"])
    assert survives(values, "wilcoxon", 0.05) == "a"
    assert survives(values.iloc[:1], "wilcoxon", 0.05) is None


def test_a_seed_without_all_tasks_is_in_no_average(records):
    kept = [r for r in records if not (r["task"] == "u" and r["seed"] == 2 and r["method"] == "m")]
    table = tables.accuracy_table(tables.frame(kept))
    assert table.rows[0][3] == "60.5 ± 0.7"  # seeds 0 and 1: 60, 61
    assert "1 of 12 runs are missing" in table.caption
    none = [r for r in records if not (r["task"] == "u" and r["method"] == "m")]
    assert tables.accuracy_table(tables.frame(none)).rows[0] == ["m", "53.0 ± 3.6", "-", "-"]
    columns = pd.MultiIndex.from_tuples([("t", 0), ("u", 0), ("t", 1)], names=["task", "seed"])
    values = by_task_and_seed(pd.DataFrame([[1.0, 3.0, 5.0]], columns=columns), ["u", "t"])
    np.testing.assert_array_equal(values, [[[3.0, np.nan], [1.0, 5.0]]])
    np.testing.assert_array_equal(average_by_seed(values), [[2.0, np.nan]])


def test_three_figures_side_by_side(records):
    table = tables.figures_table(tables.frame(records))
    assert table.rows[0] == ["m", "61.5 ± 1.8", "62.5 ± 1.8", "63.5 ± 1.8", "90.0", "3.0", "102"]
    assert "label-free score im" in table.caption


def test_rank_correlation_of_scores():
    # ranks of accuracy 1 2 3 4, of the score 2 1 4 3: rho = 1 - 6 * 4 / (4 * 15) = 0.6
    assert spearman(pd.Series([1.0, 2, 3, 4]), pd.Series([20.0, 10, 40, 30])) == pytest.approx(0.6)
    assert math.isnan(spearman(pd.Series([1.0, 1, 1]), pd.Series([1.0, 2, 3])))
    assert spearman(pd.Series([1.0, 2, 3, np.inf]), pd.Series([1.0, 2, 3, 0])) == pytest.approx(1.0)
    rows = [
        record("m", "t", i, a, score=s) for i, (a, s) in enumerate(zip([0.1, 0.2, 0.3, 0.4], [2, 1, 4, 3], strict=True))
    ]
    rows += [record("m", "u", i, 0.1 * i, score=-i, selected=0.1 * i + 0.01) for i in range(4)]
    table = scores_table(tables.frame(rows))
    assert table.rows[0][:4] == ["im", "-0.20", "-1.00", "+0.60"]


def test_accuracy_lost_by_selecting_with_a_score():
    rows = [
        record("m", "t", 0, 0.50, selected=0.52, oracle=0.56, score=1.0),
        record("n", "t", 0, 0.60, selected=0.60, oracle=0.61, score=3.0),  # taken, and the best
        record("m", "t", 1, 0.58, selected=0.50, oracle=0.60, score=2.0),  # taken, 4 points below n
        record("n", "t", 1, 0.62, selected=0.62, oracle=0.62, score=1.0),
    ]
    table = scores_table(tables.frame(rows))
    # epochs: (4 + 1 + 10 + 0) / 4; methods: (0 + 4) / 2; no score: (6 + 1 + 2 + 0) / 4 and (10 + 0 + 4 + 0) / 4
    assert table.rows[0][4:] == ["3.75", "2.00", "5.75"]
    assert table.rows[1] == ["no score", "", "", "", "2.25", "3.50", "5.75"]


def test_scores_over_two_ledgers_keep_their_tasks_apart():
    def rows(sign):
        return [record("m", "t", i, 0.1 * i, score=sign * i, selected=0.1 * i, oracle=0.1 * i) for i in range(4)]

    table = scores_over([tables.frame(rows(1)), tables.frame(rows(-1))])  # one task name, two tasks
    assert table.rows[0][1:4] == ["+0.00", "-1.00", "+1.00"]
    assert "2 tasks" in table.caption


def test_class_means_and_runs_without_target_labels(records):
    for r in records:
        r["metrics"]["target_class_accuracy"] = {"last": 0.25, "selected": None, "oracle": None}
    data = tables.frame(records, "target_class_accuracy")
    assert tables.accuracy_table(data, measure="target_class_accuracy").rows[0][1] == "25.0 ± 0.0"
    assert tables.figures_table(data).rows[0][2:4] == ["-", "-"]
    with pytest.raises(UDAError, match="no finished run"):
        tables.frame([])


def test_formats(records):
    table = tables.accuracy_table(tables.frame(records))
    lines = render(table).splitlines()
    assert lines[0].split("|")[1].strip() == "method"
    assert "**67.0 ± 1.5**" in lines[3]
    assert len({len(line) for line in lines[:4]}) == 1
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert float(rows[0]["average"]) == 61.5
    assert rows[0]["t n"] == "3"
    latex = render(table, "latex")
    assert r"\textbf{67.0 $\pm$ 1.5} \\" in latex
    assert r"Target accuracy in \%" in latex
    assert latex.count(r"\\") == 3


def test_order_and_choice_of_rows(records):
    data = tables.frame(records)
    assert [r[0] for r in tables.accuracy_table(data, methods=["n", "m", "absent"]).rows] == ["n", "m"]
    with pytest.raises(UDAError, match="Did you mean"):
        tables.pick(["dann", "mcc"], ["dan"], "method")


def test_suites_side_by_side(records):
    base = [record("source_only", t, seed, v) for t, v in (("t", 0.55), ("u", 0.70)) for seed in range(3)]
    other = [
        {**record(m, "x", seed, v), "suite": "z"} for m, v in (("source_only", 0.4), ("n", 0.5)) for seed in range(3)
    ]
    table = suites_table(tables.frame([*base, *records, *other]))
    assert table.head == ["method", "s", "z", "all tasks", "gain", "better on"]
    # n: tasks 62, 72, 50 against 55, 70, 40; m has no run in z: 53 and 70 against 55 and 70
    assert table.rows[0] == ["n", "67.0 ± 1.5", "50.0 ± 0.0", "61.3", "+6.3", "3 of 3"]
    assert table.rows[1] == ["source_only", "62.5 ± 0.0", "40.0 ± 0.0", "55.0", "", ""]
    assert table.rows[2] == ["m", "61.5 ± 1.8", "-", "-", "-1.0", "0 of 2"]
    assert table.bold == set()  # nine differences of one sign, but of three tasks alone
    with pytest.raises(UDAError, match="no method 'erm'"):
        suites_table(tables.frame(records), baseline="erm")


def test_the_gain_is_tested_by_task():
    """Six tasks of one sign: p = 0.031, with one seed or with three."""
    for seeds in (1, 3):
        runs = [
            record(method, f"t{task}", seed, start + task / step)
            for method, start, step in (("source_only", 0.5, 100), ("n", 0.6, 50))
            for task in range(6)
            for seed in range(seeds)
        ]
        assert suites_table(tables.frame(runs)).bold == {(0, 3)}
        fewer = [r for r in runs if r["task"] != "t5"]
        assert suites_table(tables.frame(fewer)).bold == set()
