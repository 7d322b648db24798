"""The equations against plain loops, and the plugin in uda's testing kit."""

from __future__ import annotations

import math

import pytest
import torch
from uda_sample import CentroidLabels
from uda_sample.centroids import similarities, soft_centroids

import uda
from uda.testing import check_plugin


def test_centroids_against_plain_loops():
    features, probs = torch.randn(6, 4), torch.rand(6, 3).softmax(1)
    centroids, mass = soft_centroids(features, probs)
    for c in range(3):
        weights = [float(probs[i, c]) for i in range(6)]
        assert float(mass[c]) == pytest.approx(sum(weights), rel=1e-5)
        for k in range(4):
            rows = [
                float(features[i, k]) / math.sqrt(sum(float(v) ** 2 for v in features[i])) for i in range(6)
            ]
            mean = sum(w * r for w, r in zip(weights, rows, strict=True)) / sum(weights)
            assert float(centroids[c, k]) == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_similarity_is_a_cosine():
    features, centroids = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    half = 0.5**0.5
    torch.testing.assert_close(similarities(features, centroids), torch.tensor([[1.0, 0.0], [half, half]]))


def test_unknown_classes_are_never_given():
    plugin = CentroidLabels()
    plugin.register_buffer("centroids", torch.eye(3))
    plugin.register_buffer("known", torch.tensor([True, False, True]))
    label, confidence = plugin.nearest(torch.tensor([[0.1, 5.0, 0.0], [0.0, 5.0, 0.1]]))
    assert label.tolist() == [0, 2]
    assert ((confidence > 0) & (confidence <= 1)).all()


def test_bad_arguments():
    with pytest.raises(uda.UDAError, match="temperature=0"):
        CentroidLabels(temperature=0)


@pytest.mark.parametrize("init_args", [{"weight": 1.0}, {"predict_nearest": True, "warmup": 0.0}])
def test_plugin(init_args):
    report = check_plugin(CentroidLabels, init_args=init_args, ddp=False)
    assert report.objectives == ["self_training"]
    assert not report.warnings


@pytest.mark.slow
def test_plugin_under_two_processes():
    check_plugin(CentroidLabels, only=["ddp"])
