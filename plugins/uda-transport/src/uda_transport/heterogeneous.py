"""COOT and UCOOT inside a training: labels for a target of another feature space, and a classifier that learns them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.losses import classification_loss
from uda.passes import DomainPool, Pools, raw_inputs
from uda.weighted import Weighted
from uda_transport.across import Crossed, cross
from uda_transport.coot import CrossPlans
from uda_transport.planview import write_plans
from uda_transport.scaling import NORMALISE

SPACES = ("inputs", "features")


class COOT(Weighted):
    """Label the target by CO-optimal transport from sources of any feature space (Redko et al., NeurIPS 2020).

    Whole domains are matched, samples with samples and features with features, without correspondence in either. A
    target sample is labelled by the classes of the mass that it received, and the classifier learns these labels:

        ``L = L_cls + weight * ramp(p) * mean_j w_j CE(softmax(l_tj), p_j)``

    with ``w_j`` the mass of sample j in units of an equal part, at most 1, and 0 below ``min_mass``. Inference is the
    classifier's, so it serves samples that no plan has seen. The labels are also given as pseudo-labels, for other
    plugins. Plans, a picture of the feature plan and how the solver ended are written to ``transport/`` in the run
    directory. Several sources have a plan each, and their labels are averaged by mass.

    Domains of different shapes need ``data.heterogeneous: true`` and a backbone for each (``uda.nn.PerDomain``).
    Where the data module gives labelled target samples (``data.labelled_target``), they steer the matching.

    Args:
        weight: of the objective; ramp: its growth over the run.
        space: what is matched: the ``inputs`` as they are, once; or the ``features`` of the network, anew in each
            epoch, from the last plans on.
        labels: what the classifier learns: the class of the most mass (``hard``, as the paper predicts), or the whole
            distribution (``soft``), which the entropy of the plan makes flatter than the knowledge is.
        epsilon: entropy of the samples' plan in units of what the product plan costs; null tries several and takes the
            one whose labels agree best with their neighbours'.
        epsilon_features: entropy of the features' plan; null: exact for COOT, 0.005 for UCOOT.
        label_cost: of matching a labelled target sample with a source sample of another class.
        normalise: ``zscore`` (columns), ``centre`` (whole matrices), ``none``.
        starts: of the descent in the first plan; the lowest objective wins.
        max_samples: most samples a domain in a plan; the others have the labels of their nearest neighbours.
        min_mass: target samples that receive less than this share of an equal part have no label.
        max_iter: rounds of the descent.
    """

    settings = ("closed", "multi-source", "heterogeneous", "semi-supervised")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 10.0, "log"), "epsilon": (0.02, 0.3, "log"), "normalise": ["zscore", "centre"],
    }  # fmt: skip
    _method: ClassVar[str] = "coot"
    soft: Tensor
    mass: Tensor
    report: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        space: str = "inputs",
        labels: str = "hard",
        epsilon: float | None = 0.1,
        epsilon_features: float | None = None,
        label_cost: float = 2.0,
        normalise: str = "zscore",
        starts: int = 1,
        max_samples: int = 2000,
        min_mass: float = 0.1,
        max_iter: int = 50,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        name = type(self).__name__
        check_choice(name, "space", space, SPACES)
        check_choice(name, "labels", labels, ("soft", "hard"))
        check_choice(name, "normalise", normalise, NORMALISE)
        if min(starts, max_iter) < 1 or max_samples < 2 or label_cost < 0 or min_mass < 0:
            raise uda.UDAError(
                f"{name}: starts and max_iter must be 1 or more, max_samples 2 or more, label_cost and min_mass not "
                "negative."
            )
        least = 1e-4 if self._method == "ucoot" else 0.0
        if any(e is not None and e < least for e in (epsilon, epsilon_features)):
            raise uda.UDAError(f"{name}: epsilon and epsilon_features must be {least} or more.")
        self.space, self.labels, self.epsilon, self.epsilon_features = space, labels, epsilon, epsilon_features
        self.label_cost, self.normalise, self.starts, self.max_samples = label_cost, normalise, starts, max_samples
        self.min_mass, self.max_iter = min_mass, max_iter
        self._last: dict[str, CrossPlans] = {}

    def _options(self) -> dict[str, Any]:
        return {}

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains at the start of each epoch."""
        return uda.DataNeeds(refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the labels of the target, and for figures of the solver."""
        if "soft" in self._buffers:
            return
        size = max(model.sizes.get(model.target_name, 0), 1)
        self.register_buffer("soft", torch.zeros(size, model.num_classes))
        self.register_buffer("mass", torch.zeros(size))
        self.register_buffer("report", torch.full((4,), float("nan")))  # cost, rounds, converged, agreement

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Match the domains, unless the inputs are matched already."""
        if self.space == "inputs" and bool(self.report.isfinite().all()):
            return
        target = self._matrix(model, bank.target)
        known = None if bank.target.y is None else bank.target.y.cpu().numpy()
        soft, mass, reports = 0.0, 0.0, []
        for name, pool in bank.sources.items():
            found = cross(
                self._matrix(model, pool), target, pool.y.cpu().numpy(), model.num_classes, known, self._method,
                self.epsilon, self.epsilon_features, label_cost=self.label_cost, normalise=self.normalise,
                number_of_starts=self.starts, max_samples=self.max_samples, max_iter=self.max_iter,
                start=self._last.get(name), seed=model.base_seed, **self._options(),
            )  # fmt: skip
            if self.space == "features":
                self._last[name] = found.plans
            soft, mass = soft + found.mass[:, None] * found.probs, mass + found.mass
            reports.append(self._told(model, name, found))
        total = soft.sum(1, keepdims=True)
        self.soft.copy_(torch.from_numpy(soft / total.clip(1e-12)))
        self.mass.copy_(torch.from_numpy(mass / len(bank.sources)))
        if known is not None:
            self.mass[torch.from_numpy(known >= 0).to(self.mass.device)] = 1.0
        if not bool((self.mass >= self.min_mass).any()):
            raise uda.UDAError(f"{type(self).__name__}: no target sample received the mass min_mass: lower it.")
        self.report.copy_(torch.tensor(reports).mean(0))

    def _matrix(self, model: uda.UDA, pool: DomainPool) -> Any:
        x = raw_inputs(model, pool.name) if self.space == "inputs" else pool.features
        return x.flatten(1).double().cpu().numpy()

    def _told(self, model: uda.UDA, name: str, found: Crossed) -> list[float]:
        """Write plans, picture and figures of one source, on the first process."""
        plans = found.plans
        if model.trainer.is_global_zero and not model.trainer.fast_dev_run:
            folder = f"{model.trainer.default_root_dir}/transport"
            write_plans(folder, f"{self.key or self._method}_{name}", found, self._method, self.min_mass)
        return [plans.cost, float(plans.steps), float(plans.converged), found.agreement]

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """Labels of the mass that a sample received."""
        soft, mass = self.soft[step.target.index], self.mass[step.target.index]
        return uda.PseudoLabels(soft.argmax(1), mass.clamp(max=1.0), soft, mass >= self.min_mass)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Classification of the target by its transported labels."""
        own = self.pseudo_label(step)
        loss = classification_loss(
            step.target.logits, own.soft if self.labels == "soft" else own.y, weight=own.weight * own.keep
        )
        cost, rounds, converged, agrees = self.report
        self.log_later(
            cost=cost, rounds=rounds, converged=converged, agreement=agrees,
            labelled=(self.mass >= self.min_mass).float().mean(),
        )  # fmt: skip
        return {"transported": self.scaled(step, loss)}

    def get_extra_state(self) -> dict[str, Any]:
        """The last plans, so that a resumed run starts from them as well."""
        keep = {n: [torch.from_numpy(p.samples), torch.from_numpy(p.features)] for n, p in self._last.items()}
        duals = {n: [_tensors(v) for v in p.duals] for n, p in self._last.items()}
        return {"plans": keep, "duals": duals}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the plans back."""
        self._last = {}
        for name, (samples, features) in state["plans"].items():
            duals = tuple(_arrays(v) for v in state["duals"][name])
            self._last[name] = CrossPlans(samples.numpy(), features.numpy(), 0.0, 0.0, 0, True, duals)


def _tensors(dual: Any) -> Any:
    """Potentials (an array, a pair of arrays, or None) as tensors."""
    if isinstance(dual, tuple):
        return [_tensors(v) for v in dual]
    return None if dual is None else torch.from_numpy(dual)


def _arrays(dual: Any) -> Any:
    if isinstance(dual, (list, tuple)):
        return tuple(_arrays(v) for v in dual)
    return None if dual is None else dual.cpu().numpy()


class UCOOT(COOT):
    """The same by unbalanced CO-optimal transport (Tran et al., AAAI 2023): outliers may be left out.

    Args:
        reg_marginals: what holds the marginals, in units of what the product plan costs; one value, or those of the
            source and of the target side. Large values approach COOT, small ones leave out more.
        weight, space, labels, epsilon, epsilon_features, label_cost, normalise, starts, max_samples, min_mass,
            max_iter, ramp: as for COOT; epsilon is positive.
    """

    search_space: ClassVar[dict[str, Any]] = {**COOT.search_space, "reg_marginals": (0.3, 10.0, "log")}
    _method: ClassVar[str] = "ucoot"

    def __init__(
        self,
        reg_marginals: float | Sequence[float] = 1.0,
        weight: float = 1.0,
        space: str = "inputs",
        labels: str = "hard",
        epsilon: float | None = 0.1,
        epsilon_features: float | None = None,
        label_cost: float = 2.0,
        normalise: str = "zscore",
        starts: int = 1,
        max_samples: int = 2000,
        min_mass: float = 0.1,
        max_iter: int = 50,
        ramp: str = "none",
    ) -> None:
        super().__init__(
            weight, space, labels, epsilon, epsilon_features, label_cost, normalise, starts, max_samples, min_mass,
            max_iter, ramp,
        )  # fmt: skip
        self.reg_marginals = reg_marginals

    def _options(self) -> dict[str, Any]:
        return {"reg_marginals": self.reg_marginals}
