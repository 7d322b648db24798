"""Deep Joint Distribution Optimal Transport for Unsupervised Domain Adaptation (Damodaran et al., ECCV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.errors import check_choice
from uda_transport.joint import JointTransport, label_costs
from uda_transport.solvers import exact_plan

PLAN_LABELS = ("cross_entropy", "squared")


class DeepJDOT(JointTransport):
    """Transport features and labels of a batch together, exactly (Damodaran et al. 2018).

    ``L = L_cls + weight * ramp(p) * sum_ij P_ij (alpha |g_i - g_j|^2 + label_weight CE(y_i, f(g_j)))``, where P is the
    optimal plan between the uniform weights of the batches for that same cost, a constant found anew in each step.
    Source batches are class-balanced. A batch that misses classes in one domain must match unlike ones: take batches of
    several samples a class.

    Args:
        weight: of the objective.
        alpha: of the squared distance of features (default of the authors' code: 0.01).
        label_weight: of the label term (default of the authors' code: 1).
        plan_labels: label term in the cost that the plan is found for: ``cross_entropy`` (the trained one), or
            ``squared``, the squared distance of one-hot label and softmax (the authors' code).
        class_balanced: draw as many source samples of each class.
        ramp: growth of the weight over the run.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "alpha": (0.001, 0.1, "log"), "label_weight": (0.1, 1.0, "log"), "plan_labels": list(PLAN_LABELS),
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 0.01,
        label_weight: float = 1.0,
        plan_labels: str = "cross_entropy",
        class_balanced: bool = True,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, alpha, label_weight, ramp)
        check_choice("DeepJDOT", "plan_labels", plan_labels, PLAN_LABELS)
        self.plan_labels, self.class_balanced = plan_labels, class_balanced

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source batches with equally many samples of each class, where wanted."""
        return uda.DataNeeds(class_balanced=self.class_balanced)

    def plan(self, cost: Tensor, features: Tensor, step: uda.Step) -> Tensor:
        """The exact plan."""
        if self.plan_labels == "squared":
            cost = features + self.label_weight * label_costs(step.pooled("y"), step.target.logits.detach(), "squared")
        return exact_plan(cost)
