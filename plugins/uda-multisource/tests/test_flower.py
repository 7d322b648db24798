"""The federation by Flower's interface: a round by messages is one of the simulation. flwr is stood in for."""

from __future__ import annotations

import copy
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from uda_multisource.federation import Federation
from uda_multisource.flower import client, joined_results, strategy, to_arrays, to_state

import uda


def domain(shift, n, seed):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.randn(n, 4, generator=draw) + 2.0 * y[:, None] + shift, y


def passes(x, y):
    return lambda: zip(x.split(10), y.split(10), strict=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


@pytest.fixture
def flwr(monkeypatch):
    """What of flwr's interface is used: NumPyClient, FedAvg, and arrays that travel as a list."""
    names = ("flwr", "flwr.client", "flwr.common", "flwr.server", "flwr.server.strategy")
    modules = {name: types.ModuleType(name) for name in names}

    class FedAvg:
        def __init__(self, **options):
            self.options = options

    modules["flwr.client"].NumPyClient = type("NumPyClient", (), {})
    modules["flwr.server.strategy"].FedAvg = FedAvg
    modules["flwr.common"].ndarrays_to_parameters = lambda arrays: [a.tobytes() for a in arrays]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.mark.parametrize("rule", ["fedgp", "fedda", "fedavg"])
def test_two_rounds_by_messages_are_two_of_the_simulation(flwr, rule):
    data, few = [domain(0.3, 20, 1), domain(-1.0, 30, 2)], domain(0.0, 10, 3)
    simulated = make_net()
    Federation(simulated, [passes(*d) for d in data], passes(*few), sgd, rule=rule, beta=0.3).run(2)
    net = make_net()
    server = strategy(net, clients=3, rule=rule, beta=0.3, fraction_evaluate=0.5)
    assert server.options["min_fit_clients"] == server.options["min_available_clients"] == 3
    assert server.options["fraction_evaluate"] == 0.5
    flwr["flwr.common"].parameters_to_ndarrays = lambda arrays: arrays  # a client's arrays, as they are
    owners = [client(copy.deepcopy(net), passes(*few), sgd, "target")]
    owners += [client(copy.deepcopy(net), passes(*d), sgd) for d in data]
    for number in (1, 2):
        sent = []
        for owner in owners:
            arrays, samples, said = owner.fit(to_arrays(net.state_dict()), {})
            assert set(said) == {"role"}  # nothing else travels beside weights and the number of samples
            sent.append((None, types.SimpleNamespace(parameters=arrays, num_examples=samples, metrics=said)))
        parameters, _ = server.aggregate_fit(number, sent, [])
    assert parameters == [a.tobytes() for a in to_arrays(net.state_dict())]
    for k, v in simulated.state_dict().items():
        torch.testing.assert_close(net.state_dict()[k], v)
    assert server.aggregate_fit(3, [], [ValueError()]) == (None, {})


def test_a_source_that_drops_out_is_left_out():
    start = {"a": torch.zeros(2), "n": torch.tensor(0)}
    target = ([np.array([1.0, 0], "float32"), np.array(4)], 5, {"role": "target"})
    one, gone = ([np.array([0, 3.0], "float32"), np.array(9)], 8, {"role": "source"}), ([], 0, {"role": "source"})
    got = joined_results(start, [one, target, gone], "fedda", 0.25)
    assert got["a"].tolist() == [0.75, 0.75]
    assert int(got["n"]) == 4
    assert joined_results(start, [one], "fedavg")["a"].tolist() == [0, 3]


def test_bad_rounds_are_refused(flwr):
    start = {"a": torch.zeros(2)}
    one, target = ([np.ones(2)], 8, {"role": "source"}), ([np.ones(2)], 5, {"role": "target"})
    with pytest.raises(uda.UDAError, match="No source sent"):
        joined_results(start, [target])
    with pytest.raises(uda.UDAError, match="fedgp needs one target client; 0 sent"):
        joined_results(start, [one])
    with pytest.raises(uda.UDAError, match="needs one target client; 2 sent"):
        joined_results(start, [one, target, target])
    with pytest.raises(uda.UDAError, match="'source'"):
        joined_results(start, [([np.ones(2)], 8, {"role": "sauce"})])
    with pytest.raises(uda.UDAError, match="differ in 'a'"):
        to_state([np.ones(3)], start)
    with pytest.raises(uda.UDAError, match="differ in 'the number"):
        to_state([np.ones(2), np.ones(1)], start)
    with pytest.raises(uda.UDAError, match="'target'"):
        client(make_net(), None, sgd, "targets")
    with pytest.raises(uda.UDAError, match="does not travel"):
        strategy(make_net(), 2, beta="auto")


def test_without_flower_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(uda.UDAError, match=r"uda-multisource\[flower\]"):
        strategy(make_net(), 2)
