from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import uda
from uda.data import DataModule
from uda.described import describe
from uda.errors import UDAError
from uda.nn import (
    MLP,
    DomainBatchNorm,
    Identity,
    PerDomain,
    SmallCNN,
    active_domain,
    convert_batchnorm,
    domain_context,
    domain_feature_size,
    feature_size,
    spread_batchnorm,
)


def test_contexts_nest_and_end():
    assert active_domain() is None
    with domain_context("photo", "source") as outer:
        assert active_domain() == outer
        with domain_context("sketch", "target"):
            assert active_domain().name == "sketch"
        assert active_domain().role == "source"
    with pytest.raises(RuntimeError), domain_context("photo", "source"):
        raise RuntimeError
    assert active_domain() is None


def test_each_domain_has_its_statistics():
    norm = DomainBatchNorm(nn.BatchNorm1d(3))
    reference = {"source": nn.BatchNorm1d(3), "target": nn.BatchNorm1d(3)}
    data = {"source": torch.randn(16, 3) * 5 + 2, "target": torch.randn(16, 3)}
    for role, x in data.items():
        with domain_context("any", role):
            torch.testing.assert_close(norm(x), reference[role](x))
    norm.eval()
    with domain_context("any", "source"):
        torch.testing.assert_close(norm(data["source"]), reference["source"].eval()(data["source"]))
    # outside of any domain, and for held-out samples, the target's
    expected = reference["target"].eval()(data["source"])
    torch.testing.assert_close(norm(data["source"]), expected)
    with domain_context("any", "held_out"):
        torch.testing.assert_close(norm(data["source"]), expected)


def test_affine_is_separate_or_shared():
    separate, shared = (DomainBatchNorm(nn.BatchNorm1d(3), separate_affine=s) for s in (True, False))
    assert len(list(separate.parameters())) == 4
    assert len(list(shared.parameters())) == 2
    clone = copy.deepcopy(shared)
    assert clone.norms["source"].weight is clone.norms["target"].weight
    fresh = DomainBatchNorm(nn.BatchNorm1d(3), separate_affine=False)
    nn.init.normal_(shared.norms["source"].weight)
    fresh.load_state_dict(shared.state_dict())
    assert torch.equal(fresh.norms["target"].weight, shared.norms["source"].weight)


def test_domain_names_come_before_roles():
    norm = DomainBatchNorm(nn.BatchNorm1d(2), roles=["clip.art", "source", "target"])
    x = torch.randn(8, 2)
    with domain_context("clip.art", "source"):
        norm(x)
    assert {k: int(n.num_batches_tracked) for k, n in norm.norms.items()} == {
        "clip_art": 1,
        "source": 0,
        "target": 0,
    }


def test_what_has_no_domain_is_refused():
    norm = DomainBatchNorm(nn.BatchNorm1d(2), roles=["source"])
    with pytest.raises(UDAError, match="DomainBatchNorm has nothing for the default domain 'target'"):
        norm(torch.randn(4, 2))
    with pytest.raises(UDAError, match="forward_mode"), domain_context("a", "joint"):
        norm(torch.randn(4, 2))
    with pytest.raises(UDAError, match="at least one role"):
        DomainBatchNorm(nn.BatchNorm1d(2), roles=[])


def test_conversion_keeps_the_function_and_is_idempotent():
    net = SmallCNN(1, widths=(4, 4))
    net(torch.randn(8, 1, 8, 8))  # statistics other than the initial ones
    x = torch.randn(4, 1, 8, 8)
    expected = net.eval()(x)
    assert convert_batchnorm(net) is net
    assert sum(isinstance(m, DomainBatchNorm) for m in net.modules()) == 2
    torch.testing.assert_close(net(x), expected)
    again = copy.deepcopy(net.state_dict())
    assert convert_batchnorm(net).state_dict().keys() == again.keys()
    assert isinstance(convert_batchnorm(nn.BatchNorm2d(3)), DomainBatchNorm)


@pytest.mark.parametrize("bare", [False, True])
def test_branches_start_from_the_weights_of_a_plain_net(bare):
    plain = nn.BatchNorm2d(4) if bare else SmallCNN(1, widths=(4, 4))
    x = torch.randn(8, 4 if bare else 1, 8, 8)
    plain(x)
    fresh = convert_batchnorm(nn.BatchNorm2d(4) if bare else SmallCNN(1, widths=(4, 4)))
    fresh.load_state_dict(spread_batchnorm(fresh, plain.state_dict()))
    plain.eval(), fresh.eval()
    for role in ("source", "target"):
        with domain_context(role, role):
            torch.testing.assert_close(fresh(x), plain(x))
    own = fresh.state_dict()
    assert spread_batchnorm(fresh, own).keys() == own.keys()


def test_a_backbone_a_domain():
    net = PerDomain({"source": MLP((4,), in_features=6), "target": MLP((4,), in_features=3)}).eval()
    assert not net.joint_forward
    assert net.out_features == 4
    assert feature_size(net, (3,)) == 4
    with domain_context("surf", "source"):
        x = torch.randn(2, 6)
        assert torch.equal(net(x), net.backbones["source"](x))
        assert feature_size(net, (6,)) == 4
    assert describe(net)["init_args"]["backbones"]["source"]["init_args"]["in_features"] == 6
    assert PerDomain({"source": "identity", "target": Identity()}).out_features is None


def test_backbones_that_do_not_fit_are_refused():
    with pytest.raises(UDAError, match="equally many"):
        PerDomain({"source": MLP((4,), in_features=6), "target": MLP((5,), in_features=6)})
    with pytest.raises(UDAError, match="in_features"):
        PerDomain({"source": "mlp", "target": "mlp"})
    with pytest.raises(UDAError, match="at least one"):
        PerDomain({})


def test_features_of_domains_of_different_shapes():
    net = PerDomain({"s": MLP((4,), in_features=6), "target": MLP((4,), in_features=3)})
    assert domain_feature_size(net, {"s": [6], "t": [3]}, "t") == 4
    with pytest.raises(UDAError, match="does not accept"):
        domain_feature_size(net, {"s": [3], "t": [6]}, "t")
    with pytest.raises(UDAError, match="equally many"):
        domain_feature_size(Identity(), {"s": [6], "t": [3]}, "t")


def test_heterogeneous_data_size_the_model():
    data = DataModule.from_datasets(rows(6), rows(3), batch_size=4, heterogeneous=True)
    assert data.spec["input_shapes"] == {"source": [6], "target": [3]}
    net = {"source": MLP((4,), in_features=6), "target": MLP((4,), in_features=3)}
    model = uda.UDA(PerDomain(net), bottleneck=0, **data.spec)
    assert model.feature_dim == 4
    assert model(torch.zeros(2, 3)).shape == (2, 2)


def rows(width):
    return TensorDataset(torch.randn(20, width), torch.arange(20) % 2)
