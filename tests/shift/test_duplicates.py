"""Duplicates against comparison of all pairs."""

from __future__ import annotations

import numpy as np
import torch

from uda.shift.duplicates import difference_hash, exact_duplicates, exact_hashes, near_by_cosine, near_by_hash


def test_exact_duplicates_by_all_pairs():
    rng = np.random.default_rng(0)
    s, t = rng.integers(0, 3, (60, 3)).astype(np.float32), rng.integers(0, 3, (40, 3)).astype(np.float32)
    y = rng.integers(0, 2, 60)
    found = exact_duplicates(exact_hashes(torch.from_numpy(s)), exact_hashes(torch.from_numpy(t)), y)
    same = lambda a, b: (a == b).all()  # noqa: E731
    assert found["source"] == sum(any(same(s[i], s[j]) for j in range(i)) for i in range(60))
    assert found["target"] == sum(any(same(t[i], t[j]) for j in range(i)) for i in range(40))
    assert found["across"] == sum(any(same(row, other) for other in s) for row in t)
    groups = {tuple(row): {int(y[j]) for j in range(60) if same(s[j], row)} for row in s}
    assert found["conflicts"] == sum(len(v) > 1 for v in groups.values()) > 0


def test_two_zeros_are_one():
    a, b = exact_hashes(torch.tensor([[0.0, 1.0], [-0.0, 1.0]]))
    assert a == b


def test_near_duplicates_by_all_pairs():
    rng = np.random.default_rng(1)
    s, t = rng.normal(size=(1100, 3)), rng.normal(size=(30, 3))  # more rows than a block
    t[4] = s[1050] + 1e-3
    mean = np.concatenate((s, t)).mean(0)
    u, v = s - mean, t - mean
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    found = near_by_cosine(s, t, 0.999)
    assert found["target"] == sum(any(cosine(v[i], v[j]) > 0.999 for j in range(30) if j != i) for i in range(30))
    assert found["across"] == sum(any(cosine(a, b) > 0.999 for b in u) for a in v) >= 1
    some = list(range(0, 1100, 50))
    partner = [any(cosine(u[i], u[j]) > 0.999 for j in range(1100) if j != i) for i in some]
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    table = unit @ unit.T > 0.999
    np.fill_diagonal(table, False)
    assert partner == table.any(1)[some].tolist()
    assert found["source"] == int(table.any(1).sum())


def test_perceptual_hash_survives_what_leaves_the_picture():
    x = torch.rand(6, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.avg_pool2d(x, 9, 1, 4)
    changed = (0.8 * x + 0.1 + 0.002 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    larger = torch.nn.functional.interpolate(x, scale_factor=2)
    h = difference_hash(x)
    assert h.shape == (6, 64)
    grey = x[0].mean(0)  # by loops: 8 x 9 cells of an image of 72 x 72
    rows = [slice(9 * i, 9 * i + 9) for i in range(8)]
    columns = [slice(8 * j, 8 * j + 8) for j in range(9)]
    cell = [[float(grey[r, c].mean()) for c in columns] for r in rows]
    assert h[0].tolist() == [cell[i][j + 1] > cell[i][j] for i in range(8) for j in range(8)]
    for other in (changed, larger):
        bits = (difference_hash(other) != h).sum(1)
        assert bits.max() <= 4
    assert near_by_hash(h, difference_hash(changed), most=4) == {"source": 0, "target": 0, "across": 6}
