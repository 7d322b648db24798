"""The hook points of the skeleton. This file is the reference page; docs/hooks.md explains it with examples.

A plugin fills the hooks that it needs and names only the arguments that it uses. Plugins are called in the order
of the config. ``model`` is the :class:`uda.UDA` module, ``step`` the :class:`uda.Step` of one training batch,
``B`` the samples of a domain in a batch, ``F`` the feature dimension, ``C`` the number of classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uda.plugin import DataNeeds, Prediction, PseudoLabels, hookspec

if TYPE_CHECKING:
    from torch import Tensor

    from uda.gate import Objectives
    from uda.module import UDA
    from uda.passes import Pools
    from uda.step import DomainBatch, Step

# ---------------------------------------------------------------------------------- before training


@hookspec
def data_needs(model: UDA) -> DataNeeds:
    """Say which batches, views and whole-domain passes the method wants.

    Called once, before the loaders are built. The union over all plugins is what the data module builds. A
    plugin that does not fill this hook gets :class:`~uda.plugin.DataNeeds`'s defaults (source and target).
    """


@hookspec
def build(model: UDA) -> None:
    """Make heads, memories and banks, now that the sizes are known.

    Called when ``model.feature_dim``, ``model.num_classes`` and ``model.sizes`` are known: in the constructor
    or, where they come from the data, before the checkpoint is loaded. Must be idempotent. Model surgery
    (other normalisation layers, adapters) belongs here too.
    """


@hookspec
def param_groups(model: UDA) -> list[dict[str, Any]]:
    """Return optimiser groups: ``[{"params": [...], "lr_scale": 1.0, ...}]``.

    Parameters of the plugin that no group claims train at the head's rate. A parameter claimed twice is an
    error. ``lr_scale`` multiplies the optimiser's rate; other keys go to the optimiser as they are.
    """


# ------------------------------------------------------------------------------------------ an epoch


@hookspec
def refresh(model: UDA, bank: Pools) -> None:
    """Look at whole domains: pseudo-labels, prototypes, transport plans.

    Called under ``no_grad`` at the start of each epoch (or every ``DataNeeds.refresh_every`` steps) when a
    plugin asked for it. ``bank.target``, ``bank.source`` and ``bank.sources[name]`` are
    :class:`~uda.passes.DomainPool` s of features ``[N, F]``, logits ``[N, C]`` and (sources only) labels ``[N]``
    in index order, gathered over all ranks: one pass a domain serves every plugin. What is kept must be copied
    into buffers of the plugin.
    """


# ------------------------------------------------------------------------------------- a training step


@hookspec
def prepare_batch(step: Step) -> None:
    """Change the inputs before the forward: mixing of samples, choice of views.

    ``step.source.x`` and ``step.target.x`` may be replaced, and so may ``step.source.y`` (class ids ``[B]`` or
    a distribution ``[B, C]``). ``step.source.weight`` ``[B]`` weighs the samples of the source classification.
    """


@hookspec
def transform_features(model: UDA, batch: DomainBatch, features: Tensor) -> Tensor | None:
    """Change the features ``[B, F]`` between bottleneck and classifier, in training and in inference.

    Plugins are chained in config order; None leaves the features as they are. ``batch.role`` tells the domain
    (``"source"``, ``"target"``, ``"held_out"``); ``batch.cache`` carries private intermediates to a later hook.
    """


@hookspec
def align_features(step: Step) -> dict[str, Tensor] | None:
    """Return feature-alignment objectives ``{name: scalar}``, weighted as they shall enter the sum."""


@hookspec
def pseudo_label(step: Step) -> PseudoLabels | None:
    """Label the target batch. The first result in config order wins and is ``step.target.pseudo``."""


@hookspec
def refine_classifier(step: Step) -> dict[str, Tensor] | None:
    """Return objectives ``{name: scalar}`` that refine the classifier; ``step.target.pseudo`` is set."""


@hookspec
def weigh_objectives(step: Step, objectives: Objectives) -> dict[str, Tensor | float] | None:
    """Return the weight of each objective's gradient on the shared parameters, or None for the plain sum.

    The first result in config order wins; an objective that it leaves out weighs 1. ``objectives`` gives the
    losses and, on demand, inner products of their gradients; see :class:`~uda.gate.Objectives`. Weights apply
    to backbone and bottleneck; heads receive the plain gradients. A weight that is a tensor with gradient (a learnt
    one) receives that of ``w_i L_i`` with the objective held fixed.
    """


@hookspec
def optimise(step: Step, objectives: Objectives) -> bool | None:
    """Step the optimisers by hand and return True. Only for plugins marked ``manual``.

    Use ``step.model.manual_update(loss, ...)``: it repeats clipping, accumulation and scheduler stepping, which
    manual optimisation otherwise loses. ``step.model.again(step)`` is a second pass over the same batch.
    """


@hookspec
def after_step(step: Step) -> None:
    """Update teachers, memories and banks, under ``no_grad``, once a batch.

    ``step.updated`` tells whether the optimiser has stepped on this batch (it does not on each batch under
    gradient accumulation). Banks are written from gathered data here, through :class:`uda.nn.Bank`.
    """


# --------------------------------------------------------------------------------------------- inference


@hookspec
def before_evaluation(model: UDA) -> None:
    """Make ready for a validation, test or prediction, before its first batch and on all ranks together.

    In evaluation mode, without gradients. For what inference needs and training does not keep up to date, such as
    statistics of the target. ``model.trainer.sanity_checking`` tells a sanity check before training.
    """


@hookspec
def predict(model: UDA, batch: DomainBatch) -> Prediction | None:
    """Turn a batch into labels, scores and an unknown mask. The first result wins.

    Inference only. ``batch.features`` ``[B, F]`` and ``batch.logits`` ``[B, C]`` are there; None leaves the
    classifier's softmax. For open-set classifiers, prototype classifiers and output-only adaptation.
    """


@hookspec
def reject(model: UDA, batch: DomainBatch, prediction: Prediction) -> Prediction | None:
    """Mark samples of a prediction as unknown, whoever made it.

    Inference only, after ``predict`` and the softmax that stands for it. Plugins are chained in config order: each
    result replaces the prediction for the next; None leaves it. In evaluation the sources come before the target
    (``batch.role``), so that a threshold may be taken from their validation rows.
    """


@hookspec
def adapt(model: UDA, batch: DomainBatch) -> Tensor | None:
    """Adapt to one batch of a test stream, with gradients on, and return its logits ``[B, C]``.

    The first result wins. Called in test and predict, once a batch, in stream order.
    """
