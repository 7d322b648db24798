"""Plans keep their marginals, whatever the shape of the problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uda_transport.coot import coot
from uda_transport.ucoot import ucoot

sizes = st.integers(1, 7)
quiet = settings(max_examples=20, deadline=None, derandomize=True)


def pair(n, d, m, e, seed):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)), draw.normal(size=(m, e))


@quiet
@given(sizes, sizes, sizes, sizes, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_coot(n, d, m, e, epsilon, epsilon_features, seed):
    x, y = pair(n, d, m, e, seed)
    found = coot(x, y, (epsilon, epsilon_features), inner_iter=5000, inner_tol=1e-9)
    for plan, (rows, columns) in ((found.samples, (n, m)), (found.features, (d, e))):
        assert plan.min() >= 0
        np.testing.assert_allclose(plan.sum(1), 1 / rows, atol=1e-6)
        np.testing.assert_allclose(plan.sum(0), 1 / columns, atol=1e-6)


@pytest.mark.slow
@settings(quiet, max_examples=8)
@given(sizes, sizes, sizes, sizes, st.sampled_from([0.5, 2.0]), st.integers(0, 99))
def test_ucoot_approaches_the_marginals(n, d, m, e, epsilon, seed):
    """What holds the marginals, made large, makes them those of COOT."""
    x, y = pair(n, d, m, e, seed)
    found = ucoot(x, y, (100.0, 100.0), (epsilon, epsilon), max_iter=20)
    for plan, (rows, columns) in ((found.samples, (n, m)), (found.features, (d, e))):
        assert np.isfinite(plan).all()
        assert plan.min() >= 0
        np.testing.assert_allclose(plan.sum(1) / plan.sum(), 1 / rows, atol=0.06)
        np.testing.assert_allclose(plan.sum(0) / plan.sum(), 1 / columns, atol=0.06)
