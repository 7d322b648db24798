"""JUMBOT: Unbalanced Minibatch Optimal Transport; Applications to Domain Adaptation (Fatras et al., ICML 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.errors import check_choice
from uda_transport.joint import JointTransport
from uda_transport.solvers import REFERENCES, unbalanced_plan


class JUMBOT(JointTransport):
    """Transport features and labels of a batch together, and leave out what fits nowhere (Fatras et al. 2021).

    ``L = L_cls + weight * ramp(p) * sum_ij P_ij (eta1 |g_i - g_j|^2 + eta2 CE(y_i, f(g_j)))``. The plan P, a constant,
    is that of unbalanced entropic transport: see :func:`~uda_transport.solvers.unbalanced_plan`. Samples of a batch
    whose like is missing in the other batch get little mass, which mends the bias of exact transport on small batches.
    Source batches are class-balanced.

    Args:
        weight: of the objective.
        eta1: of the squared distance of features (published: digits 0.1, Office-Home 0.01, VisDA 0.005).
        eta2: of the label term (digits 0.1, Office-Home 0.5, VisDA 1).
        tau: of the marginals; small lets mass go (digits 1, Office-Home 0.5, VisDA 0.3).
        epsilon: of the entropy (digits 0.1, Office-Home and VisDA 0.01).
        reference: of the entropy: ``product`` of the marginals (the paper), or ``ones`` (the authors' code with the
            library of its time).
        class_balanced: draw as many source samples of each class.
        max_iter, tol: when the solver stops.
        ramp: growth of the weight over the run.
    """

    settings = ("closed", "partial", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "eta1": (0.001, 0.1, "log"), "eta2": (0.1, 1.0, "log"), "tau": (0.1, 2.0, "log"), "epsilon": [0.01, 0.03, 0.1],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        eta1: float = 0.01,
        eta2: float = 0.5,
        tau: float = 0.5,
        epsilon: float = 0.01,
        reference: str = "product",
        class_balanced: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-5,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, eta1, eta2, ramp)
        check_choice("JUMBOT", "reference", reference, REFERENCES)
        if min(tau, epsilon, tol) <= 0 or max_iter < 1:
            raise uda.UDAError("JUMBOT: tau, epsilon and tol must be positive, and max_iter 1 or more.")
        self.tau, self.epsilon, self.reference, self.class_balanced = tau, epsilon, reference, class_balanced
        self.max_iter, self.tol, self.eta1, self.eta2 = max_iter, tol, eta1, eta2

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source batches with equally many samples of each class, where wanted."""
        return uda.DataNeeds(class_balanced=self.class_balanced)

    def plan(self, cost: Tensor, features: Tensor, step: uda.Step) -> Tensor:
        """The unbalanced plan."""
        return unbalanced_plan(cost, self.epsilon, self.tau, self.reference, self.max_iter, self.tol)
