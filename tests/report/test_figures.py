"""Figures hold the data they were given, as SVG that fits into a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from uda.report import figures, measures
from uda.report.style import PRINT, Plot, data_uri, inline_svg, save


def test_curves_hold_their_points() -> None:
    line = figures.Line("a", np.array([1.0, 2, 3]), np.array([0.1, 0.4, 0.2]), marks=((2, 0.4, "*"),))
    axes = figures.curves(PRINT, [line], percent=True).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 10], [2, 40], [3, 20]]
    assert axes.collections[0].get_offsets().tolist() == [[2, 40]]


def test_the_confusion_matrix_shows_shares_of_each_row() -> None:
    axes = figures.confusion(PRINT, np.array([[3, 1], [0, 2]]), ["cat", "dog"]).axes[0]
    texts = {(t.get_position()): t.get_text() for t in axes.texts}
    assert texts == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}  # column, row
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog"]
    assert axes.yaxis_inverted()


def test_class_accuracies_are_sorted_and_extremes_stand_for_many() -> None:
    counts = np.array([[4, 0, 0], [1, 3, 0], [2, 0, 2]])
    axes = figures.class_accuracy(PRINT, [counts], ["a", "b", "c"], ["run"], ["#000000"]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50, 75, 100]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["c  (4)", "b  (4)", "a  (4)"]
    values = np.arange(100.0)
    assert figures.shown_classes(values, 6).tolist() == [0, 1, 2, 97, 98, 99]
    assert figures.shown_classes(np.array([0.5, np.nan, 0.1])).tolist() == [2, 0]


def test_reliability_draws_every_bin() -> None:
    r = measures.reliability(np.repeat([0.3, 0.9], [2, 8]), np.repeat([0, 1], [4, 6]), bins=10)
    figure = figures.reliability(PRINT, [("target", r, "#ff0000")])
    top = figure.axes[0]
    points = np.concatenate(
        [c.get_offsets() for c in top.collections if len(c.get_offsets()) and hasattr(c, "get_sizes")]
    )
    assert sorted(np.round(points, 6).tolist()) == [[0.3, 0], [0.9, 0.75]]
    assert "ECE 18.0 %" in top.get_legend().get_texts()[0].get_text()  # 0.2 * 0.3 + 0.8 * 0.15


def test_wilson_against_a_known_interval() -> None:
    low, high = figures.wilson(np.array([0.0, 0.5]), np.array([10, 10]))
    assert low == pytest.approx([0.0, 0.2366], abs=1e-3)
    assert high == pytest.approx([0.2775, 0.7634], abs=1e-3)


def test_priors_show_all_kinds_of_shares() -> None:
    shares = np.array([0.2, 0.8])
    axes = figures.priors(PRINT, ["a", "b"], shares, {"BBSE": shares[::-1]}, shares, shares).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [20, 80]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {
        "predicted on the target", "source, labels", "target, true (oracle)", "BBSE",
    }  # fmt: skip


def test_an_inline_figure_is_sound_themed_and_self_contained() -> None:
    line = figures.Line("a <b>", np.array([1.0, 2]), np.array([1.0, 2]))
    plot = Plot("x", "", 'rises "fast"', lambda t: figures.curves(t, [line], title="t & u"))
    svg = inline_svg(plot)
    root = ElementTree.fromstring(svg)  # well-formed
    assert (root.get("role"), root.get("aria-label")) == ("img", 'rises "fast"')
    assert "http" not in svg
    assert "var(--ink)" in svg
    assert not re.search("#0[0-9a]0[0-9b]0[0-9c]\\b", svg)
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^)"]+)', svg)
    assert used
    assert set(used) <= set(ids)
    assert save(plot, "png").startswith(b"\x89PNG")
    assert b"<svg" in save(plot, "svg")


def test_pictures_are_data_uris_of_bounded_size() -> None:
    assert data_uri(np.zeros((900, 600, 3), np.uint8)).startswith("data:image/png;base64,")
    assert len(data_uri(np.random.default_rng(0).integers(0, 255, (900, 600, 3), dtype=np.uint8))) < 110_000
