"""The federation over a network, by Flower (extra ``flower``): clients and a server around the same functions.

    flwr.client.start_client(server_address=..., client=client(net, batches, optimizer, "source").to_client())
    flwr.server.start_server(..., strategy=strategy(net, clients=3))

Each client holds its own data; what travels is the weights and how many samples they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from uda.errors import UDAError, check_choice
from uda_multisource.aggregation import RULES, State, difference, joined, moved
from uda_multisource.federation import Batches, trained

ROLES = ("source", "target")
Result = tuple[Sequence[np.ndarray], int, dict[str, Any]]


def to_arrays(state: State) -> list[np.ndarray]:
    """A state's entries in their order."""
    return [v.detach().cpu().numpy() for v in state.values()]


def to_state(arrays: Sequence[np.ndarray], like: State) -> State:
    """The reverse of :func:`to_arrays`, with the names, types and devices of ``like``.

    Raises:
        UDAError: other shapes: the clients' networks differ.
    """
    shapes, known = [tuple(np.shape(a)) for a in arrays], [tuple(v.shape) for v in like.values()]
    if shapes != known:
        where = next((k for k, a, b in zip(like, shapes, known, strict=False) if a != b), "the number of entries")
        raise UDAError(f"The networks of server and client differ in {where!r}: build both from one config.")
    return {k: torch.tensor(a).to(v) for (k, v), a in zip(like.items(), arrays, strict=True)}


def joined_results(start: State, results: Sequence[Result], rule: str = "fedgp", beta: float = 0.5) -> State:
    """The server's new state from what the clients of a round send.

    Args:
        start: what they started from.
        results: of each client its arrays, number of samples, and ``{"role": "source" or "target"}``; a client that
            dropped out is left out.
        rule, beta: as in :class:`~uda_multisource.federation.Federation`; ``auto`` needs updates of single batches,
            which do not travel.

    Raises:
        UDAError: no source, no single target (where the rule needs one), or another network.
    """
    by_role: dict[str, list[tuple[State, int]]] = {role: [] for role in ROLES}
    for arrays, samples, said in results:
        role = said.get("role")
        check_choice("A client of the federation", "role", str(role), ROLES)
        if samples > 0:
            by_role[role].append((to_state(arrays, start), samples))
    sources, targets = by_role["source"], by_role["target"]
    if not sources:
        raise UDAError("No source sent an update in this round.")
    if len(targets) > 1 or (rule != "fedavg" and not targets):
        raise UDAError(f"{rule} needs one target client; {len(targets)} sent an update in this round.")
    end = (targets or sources)[0][0]
    change = joined(
        difference(end, start), [difference(s, start) for s, _ in sources], [n for _, n in sources], beta, rule
    )
    return moved(start, change, end)


def _flwr() -> Any:
    try:
        import flwr.client
        import flwr.common
        import flwr.server.strategy
    except ImportError as error:
        raise UDAError("A federation over a network needs flwr: pip install uda-multisource[flower].") from error
    return flwr


def client(
    net: nn.Module, batches: Batches, optimizer: Callable[[Any], torch.optim.Optimizer], role: str = "source"
) -> Any:
    """A ``flwr.client.NumPyClient`` that trains the server's weights for one pass over its own batches.

    Args:
        net: a network of the server's architecture; batches, optimizer: as in
            :class:`~uda_multisource.federation.Federation`.
        role: ``source``, or ``target`` for the one client with few labelled target samples.

    Raises:
        UDAError: flwr is not installed, or an unknown role.
    """
    check_choice("client", "role", role, ROLES)

    class Client(_flwr().client.NumPyClient):
        """One domain's owner."""

        def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray]:
            """The network's weights."""
            return to_arrays(net.state_dict())

        def fit(self, parameters: Sequence[np.ndarray], config: dict[str, Any]) -> Result:
            """One pass from the server's weights."""
            end, samples, _ = trained(net, to_state(parameters, net.state_dict()), batches(), optimizer)
            return to_arrays(end), samples, {"role": role}

    return Client()


def strategy(net: nn.Module, clients: int, rule: str = "fedgp", beta: float = 0.5, **options: Any) -> Any:
    """A ``flwr.server.strategy.FedAvg`` with FedGP, FedDA or FedAvg over sources alone in the place of its mean.

    Args:
        net: the server's; holds the joined weights after each round.
        clients: how many take part, the target's among them; a round waits for them.
        rule, beta: see :func:`joined_results`.
        options: of flwr's ``FedAvg``.

    Raises:
        UDAError: flwr is not installed; an unknown rule, or a beta that is no share.
    """
    check_choice("strategy", "rule", rule, RULES)
    if isinstance(beta, str) or not 0 <= beta <= 1:
        raise UDAError(f"strategy: beta is a share in [0, 1], not {beta!r}; 'auto' needs what does not travel.")
    flwr = _flwr()

    class Joined(flwr.server.strategy.FedAvg):
        """The server's side of a round."""

        def aggregate_fit(self, server_round: int, results: Sequence[Any], failures: Sequence[Any]) -> Any:
            """Join the updates of the clients that answered."""
            if not results:
                return None, {}
            read = flwr.common.parameters_to_ndarrays
            sent = [(read(r.parameters), r.num_examples, dict(r.metrics)) for _, r in results]
            start = {k: v.clone() for k, v in net.state_dict().items()}
            net.load_state_dict(joined_results(start, sent, rule, float(beta)))
            return flwr.common.ndarrays_to_parameters(to_arrays(net.state_dict())), {"clients": len(results)}

    given = {
        "min_fit_clients": clients, "min_available_clients": clients, "fraction_evaluate": 0.0,
        "initial_parameters": flwr.common.ndarrays_to_parameters(to_arrays(net.state_dict())),
    }  # fmt: skip
    return Joined(**given | options)
