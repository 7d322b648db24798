"""LanDA against its equations in loops, and that no image of the target takes part."""

from __future__ import annotations

import sys

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional as F
from uda_multisource import LanDA
from uda_multisource.landa import direction_loss, extended_distance, word_loss
from uda_multisource.language import JointEncoder, OpenClip, prompts

import uda
from uda.testing import TinyTask, check_plugin

DOMAINS = {"a": "a sketch of a {}", "b": ["a photo of a {}", "a picture of a {}"], "target": "a painting of a {}"}
CLASSES = ["cat", "dog", "fox"]


class Letters(JointEncoder):
    """Words by their letters."""

    def __init__(self, dim=4):
        self.dim = dim

    def images(self, x):
        return x.flatten(1)

    def texts(self, texts):
        return torch.tensor([[float(sum(map(ord, t[i :: self.dim])) % 17 + 1) for i in range(self.dim)] for t in texts])


@pytest.fixture
def file(tmp_path):
    torch.save(prompts(Letters(), DOMAINS, CLASSES), tmp_path / "words.pt")
    return str(tmp_path / "words.pt")


def unit(v):
    return v / np.linalg.norm(v)


def test_prompts_are_means_of_directions():
    found = prompts(Letters(), DOMAINS, CLASSES)
    assert found["text"].shape == (3, 3, 4)
    one, other = (Letters().texts([f"a {w} of a dog"]).numpy()[0] for w in ("photo", "picture"))
    np.testing.assert_allclose(found["text"][1, 1], unit(unit(one) + unit(other)), rtol=1e-5)


def test_losses_by_loops():
    draw = np.random.default_rng(0)
    moved, z, towards, words = (draw.normal(size=s) for s in ((5, 4), (5, 4), (5, 4), (3, 4)))
    y, other_y, other = np.array([0, 2, 1, 1, 0]), np.array([2, 0, 1]), draw.normal(size=(3, 4))
    value = np.mean([1 - unit(m - x) @ unit(t) for m, x, t in zip(moved, z, towards, strict=True)])
    assert float(direction_loss(*map(torch.tensor, (moved, z, towards)))) == pytest.approx(value)
    total = 0.0
    for m, c in zip(moved, y, strict=True):
        s = [unit(m) @ unit(w) / 0.2 for w in words]
        total -= s[c] - np.log(np.exp(s).sum())
    got = word_loss(torch.tensor(moved), torch.tensor(words), torch.tensor(y), 0.2)
    assert float(got) == pytest.approx(total / 5)
    cost = np.zeros((5, 3))
    for i, j in np.ndindex(5, 3):
        cost[i, j] = ((moved[i] - other[j]) ** 2).sum() + 0.7 * (1 - unit(words[y[i]]) @ unit(words[other_y[j]]))
    plan = ot.sinkhorn(np.full(5, 0.2), np.full(3, 1 / 3), cost, 0.5 * cost.mean(), stopThr=1e-10)
    given = [torch.tensor(v) for v in (moved, other, y, other_y, words)]
    given[0].requires_grad_()
    got = extended_distance(*given, 0.7, 0.5)
    assert float(got.detach()) == pytest.approx((plan * cost).sum(), rel=1e-3)
    plain = np.array([sum(plan[i, j] * 2 * (moved[i] - other[j]) for j in range(3)) for i in range(5)])
    np.testing.assert_allclose(torch.autograd.grad(got, given[0])[0], plain, rtol=1e-2, atol=1e-4)


def test_objectives_of_a_step(make_step, file):
    """Mean over sources; the classifier learns from moved samples, which it does not move; weights count."""
    plugin = LanDA(file, direction=0.3, words=0.2, transport=0.0, weight=0.5, temperature=0.2)
    model, step = make_step({"align": plugin}, class_names=CLASSES)
    found = plugin.align_features(step)
    text, total = plugin.text, dict.fromkeys(("direction", "words", "extended"), 0.0)
    for i, b in enumerate(step.sources.values()):
        z = F.normalize(b.x, dim=1)
        made = F.normalize(z + plugin.augmenters[i].net(z), dim=1)
        total["direction"] += 0.3 / 2 * (1 - F.cosine_similarity(made - z, (text[2] - text[i])[b.y])).mean()
        total["words"] += 0.2 / 2 * F.cross_entropy(made @ F.normalize(text[2], dim=1).T / 0.2, b.y)
        total["extended"] += 0.5 / 2 * F.cross_entropy(model.head(made), b.y)
    for name, value in total.items():
        torch.testing.assert_close(found[name], value)
    own, head = list(plugin.augmenters.parameters()), list(model.head.parameters())
    assert all(g is None for g in torch.autograd.grad(found["extended"], own, retain_graph=True, allow_unused=True))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(found["extended"], head))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(found["direction"] + found["words"], own))
    plugin.transport = 1.0
    assert float(plugin.align_features(step)["transport"].detach()) > 0
    assert not plugin.data_needs().target


def test_embeddings_move_as_the_words_do(make_step, file):
    plugin = LanDA(file, words=0.0, transport=0.0)
    _, step = make_step({"align": plugin})
    optimizer = torch.optim.Adam(plugin.augmenters.parameters(), 0.01)
    values = []
    for _ in range(30):
        loss = plugin.align_features(step)["direction"]
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]


def test_bad_input_is_refused(make_step, file, tmp_path, monkeypatch):
    with pytest.raises(uda.UDAError, match="weights must not be negative"):
        LanDA(file, weight=-1.0)
    _, step = make_step({"align": (gone := LanDA(str(tmp_path / "nowhere.pt")))})
    with pytest.raises(uda.UDAError, match=r"no file .*nowhere.pt.*prompts"):
        gone.align_features(step)
    with pytest.raises(uda.UDAError, match="no words for domain 'c'"):
        make_step({"align": LanDA(file)}, names=("a", "c"))
    with pytest.raises(uda.UDAError, match="in another order"):
        make_step({"align": LanDA(file)}, class_names=["dog", "cat", "fox"])
    torch.save(prompts(Letters(5), DOMAINS, CLASSES), tmp_path / "wide.pt")
    with pytest.raises(uda.UDAError, match=r"in 5 dimensions.*features of 4.*one encoder"):
        make_step({"align": LanDA(str(tmp_path / "wide.pt"))})
    torch.save({"text": 1}, tmp_path / "other.pt")
    with pytest.raises(uda.UDAError, match=r"other.pt' is no file of"):
        make_step({"align": LanDA(str(tmp_path / "other.pt"))})
    with pytest.raises(uda.UDAError, match="templates of domain 'a' need"):
        prompts(Letters(), {"a": "a sketch"}, CLASSES)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(uda.UDAError, match=r"uda-multisource\[clip\]"):
        OpenClip()


@pytest.mark.slow
def test_plugin(tmp_path):
    domains = {name: f"{name} {{}}" for name in (*TinyTask("features", 2).domains(), "target")}
    torch.save(prompts(Letters(8), domains, CLASSES), tmp_path / "words.pt")
    given = {"prompts": str(tmp_path / "words.pt"), "hidden": 8}
    check_plugin(LanDA, init_args=given, sources=2, ddp=False)
