"""Whether a plugin does anything: gradients of its objectives, and runs with and without it."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from uda.step import Step
from uda.testing.bench import KEY, SKELETON, Bench, Observed, largest_gap, state_of
from uda.testing.fitness import inputs, predictions
from uda.testing.report import CheckFailed, Report
from uda.testing.runs import objectives_of

#: Two runs whose weights differ by less than this are the same: rounding gives 1e-7 in eight steps.
SAME = 1e-6
OBJECTIVES = ("align_features", "refine_classifier")
OTHER_EFFECTS = {
    "predict", "adapt", "transform_features", "prepare_batch", "optimise", "pseudo_label", "weigh_objectives",
}  # fmt: skip


class _Reach:
    """Onlooker that finds out what each objective's gradient reaches, over all steps."""

    def __init__(self, model: Observed) -> None:
        self.model = model
        self.shared: dict[str, float] = {}  # objective -> largest gradient on backbone, bottleneck or head
        self.private: dict[str, float] = {}  # ... on the plugin's own parameters
        self.size: dict[str, float] = {}
        self.constant: dict[str, bool] = {}

    def __call__(self, step: Step) -> None:
        own = [p for p in self.model.plugins.parameters() if p.requires_grad]
        known = {id(p) for p in own}
        skeleton = [
            p for part in SKELETON for p in getattr(self.model, part).parameters()
            if p.requires_grad and id(p) not in known
        ]  # fmt: skip
        for name, loss in objectives_of(step).items():
            self.size[name] = max(self.size.get(name, 0.0), float(loss.detach().abs()))
            self.constant[name] = self.constant.get(name, True) and not loss.requires_grad
            if not loss.requires_grad:
                continue
            grads = torch.autograd.grad(loss, [*skeleton, *own], retain_graph=True, allow_unused=True)
            for store, part in (
                (self.shared, grads[: len(skeleton)]),
                (self.private, grads[len(skeleton) :]),
            ):
                found = max((float(g.abs().max()) for g in part if g is not None and g.numel()), default=0.0)
                store[name] = max(store.get(name, 0.0), found)


def _check_reach(bench: Bench, reach: _Reach) -> None:
    name = bench.cls.__name__
    for objective in reach.size:
        short = objective.removeprefix(KEY + "/")
        shared, private = reach.shared.get(objective, 0.0), reach.private.get(objective, 0.0)
        if shared > 0 or private > 0:
            continue
        if reach.constant[objective]:
            wrong = f"objective {short!r} is a constant: it has no gradient at all"
        elif reach.size[objective] == 0:
            wrong = f"objective {short!r} is zero in every step"
        else:
            wrong = f"the gradient of objective {short!r} is zero on every parameter"
        raise CheckFailed(
            name,
            "liveness",
            wrong,
            "compute it from step.*.features or step.*.logits without detach, .item() or no_grad; a figure "
            "that is not to "
            "be minimised belongs in self.log_later",
        )
    others = OTHER_EFFECTS & set(bench.hooks)
    if reach.size and not any(v > 0 for v in reach.shared.values()) and not others:
        raise CheckFailed(
            name,
            "liveness",
            f"no objective ({', '.join(k.removeprefix(KEY + '/') for k in reach.size)}) reaches backbone, "
            "bottleneck or "
            "classifier: they train the plugin's own parameters only",
            "do not detach the features that the method is to change",
        )


def _outcome(
    bench: Bench, model: Observed, x: Tensor, test: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained weights of the skeleton, and predictions on the target."""
    trainer = bench.train(model)
    weights = state_of(model, SKELETON)
    if not test:
        return weights, predictions(model, x)
    out = trainer.predict(model, bench.data())
    return weights, {
        k: torch.cat([batch[k] for batch in out]) for k in ("label", "score", "probs", "unknown")
    }


def _baseline(bench: Bench, live: Observed) -> tuple[Observed, str]:
    """The run to differ from, with the same initial weights, and what it is called."""
    if "weight" in inspect.signature(bench.cls.__init__).parameters:
        try:
            return bench.built(bench.plugin(weight=0.0), plain=True), "with weight=0"
        except ValueError:  # some methods do not take a weight of zero
            pass
    model = bench.built(without=True, plain=True)
    start = {k: v for k, v in live.state_dict().items() if k.split(".")[0] in SKELETON}
    own = model.state_dict()
    model.load_state_dict(
        {k: v for k, v in start.items() if k in own and own[k].shape == v.shape}, strict=False
    )
    return model, "without the plugin"


def liveness(bench: Bench, report: Report) -> None:
    """Each objective has a gradient, and the plugin changes weights or predictions."""
    live = bench.built(plain=True)
    start = state_of(live, SKELETON)
    baseline, called = _baseline(bench, live)
    x, adapts = inputs(bench), "adapt" in bench.hooks
    reach = live.onlooker = _Reach(live)
    weights, predicted = _outcome(bench, live, x, adapts)
    live.onlooker = None
    report.objectives = [k.removeprefix(KEY + "/") for k in reach.size]
    if set(OBJECTIVES) & set(bench.hooks) and not reach.size and not bench.manual:
        raise CheckFailed(
            bench.cls.__name__,
            "liveness",
            f"{' and '.join(set(OBJECTIVES) & set(bench.hooks))} gave no objective in any step",
            "return {name: scalar}; check the condition under which nothing is returned",
        )
    _check_reach(bench, reach)
    if not live.data_needs.source and called != "with weight=0":
        base_weights, base_predicted, called = start, None, "before its first step"
    else:
        base_weights, base_predicted = _outcome(bench, baseline, x, adapts)
    changed = largest_gap(weights, base_weights) > SAME or weights.keys() != base_weights.keys()
    if reach.size and not changed:
        raise CheckFailed(
            bench.cls.__name__,
            "liveness",
            f"the trained weights equal those of the run {called}",
            "the objectives have no effect on backbone, bottleneck and head: check signs, masks and weights",
        )
    differs = base_predicted is None or _differ(predicted, base_predicted)
    if not (changed or differs):
        raise CheckFailed(
            bench.cls.__name__,
            "liveness",
            f"weights and predictions equal those of the run {called}",
            "the plugin has no effect on this task: check that its hooks return something, and that "
            "init_args let it act",
        )


def _differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    if one.keys() != other.keys():
        return True
    return any(
        one[k].shape != other[k].shape or float((one[k].double() - other[k].double()).abs().max()) > SAME
        for k in one
    )
