from __future__ import annotations

import numpy as np
import pytest

from uda.data.rendered import FONTS, _drawn, glyph, handwritten_digits, render_digits
from uda.errors import UDAError


def test_is_a_function_of_its_arguments_alone():
    np.random.seed(1)
    x, y = render_digits(50, seed=3)
    kept, _ = render_digits(50, seed=3)
    kept[:] = 0  # what is drawn once and kept is not the caller's array
    assert np.array_equal(x, render_digits(50, seed=3)[0])
    np.random.seed(2)
    _drawn.cache_clear()
    again, labels = render_digits(50, seed=3)
    assert np.array_equal(x, again)
    assert np.array_equal(y, labels)
    assert not np.array_equal(x, render_digits(50, seed=4)[0])


def test_shapes_range_and_balance():
    x, y = render_digits(205, seed=0)
    assert x.shape == (205, 1, 8, 8)
    assert x.dtype == np.float32
    assert y.shape == (205,)
    assert y.dtype == np.int64
    assert x.min() == 0.0
    assert x.max() == 1.0
    assert np.array_equal(x * 16, np.round(x * 16))  # counts of 16 pixels, as in the target
    counts = np.bincount(y, minlength=10)
    assert counts.min() == 20
    assert counts.max() == 21


def test_every_image_fills_the_height_as_the_handwritten_digits_do():
    for x in (render_digits(200, seed=1)[0], handwritten_digits()[0]):
        assert (x[:, 0, 0].max(axis=1) > 0).all()
        assert (x[:, 0, -1].max(axis=1) > 0).all()


@pytest.mark.parametrize("font", FONTS)
def test_font_draws_ten_different_digits_within_the_canvas(font):
    drawn = [glyph(font, digit, stroke=2) for digit in range(10)]
    assert len({image.tobytes() for image in drawn}) == 10
    for image in drawn:
        assert (image > 127).sum() > 100
        assert not image[[0, -1]].any()
        assert not image[:, [0, -1]].any()
    # A missing glyph would be the same empty box or a letter: figures differ in a good part of their pixels.
    overlap = [(a > 127)[b > 127].mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert max(overlap) < 0.99


@pytest.mark.parametrize(("wobble", "floor"), [(0.0, 0.85), (5.0, 0.7)])
def test_classes_are_told_apart_across_samples(wobble, floor):
    x, y = render_digits(600, seed=0, wobble=wobble)
    other, labels = render_digits(200, seed=1, wobble=wobble)
    flat, probe = x.reshape(600, -1), other.reshape(200, -1)
    nearest = ((probe[:, None] - flat[None]) ** 2).sum(-1).argmin(1)
    assert (y[nearest] == labels).mean() > floor


def test_wobble_bends_strokes_and_leaves_the_rest():
    straight, y = render_digits(50, seed=0, wobble=0.0)
    bent, same = render_digits(50, seed=0)
    assert (y == same).all()
    assert 0.05 < abs(straight - bent).mean() < 0.4
    assert (render_digits(50, seed=0, wobble=0.01)[0] == straight).mean() > 0.9


def test_handwritten_digits():
    x, y = handwritten_digits()
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == np.float32
    assert y.shape == (1797,)
    assert y.dtype == np.int64
    assert x.min() == 0.0
    assert x.max() == 1.0
    assert set(y.tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"n": 0}, "n=0"),
        ({"fonts": ()}, "font"),
        ({"fonts": ("DejaVuSan",)}, "DejaVuSans"),
        ({"stretch": 1.5}, "stretch"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(UDAError, match=word):
        render_digits(**{"n": 5, **arguments})
