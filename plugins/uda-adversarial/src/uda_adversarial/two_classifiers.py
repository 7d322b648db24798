"""What methods with two classifiers share: a second head beside the model's, both deep where that is wanted."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import uda
from uda.losses import classification_loss
from uda.nn import DomainDiscriminator, LinearHead


def groups_of(model: uda.UDA, *modules: nn.Module) -> list[str]:
    """Names of the optimiser groups that hold parameters of the modules.

    Raises:
        UDAError: where nothing of them trains.
    """
    wanted = {id(p) for m in modules for p in m.parameters()}
    groups = model.optimizers(use_pl_optimizer=False).param_groups
    found = [g["name"] for g in groups if any(id(p) in wanted for p in g["params"])]
    if not found:
        raise uda.UDAError(
            f"Nothing trains in {', '.join(type(m).__name__ for m in modules)}, which this method has to move: "
            "give the model a bottleneck or a backbone that trains."
        )
    return found


class TwoClassifiers(uda.Plugin):
    """A second classifier of the same form as ``model.head``, from an initialisation of its own.

    Args:
        head_hidden: width of the hidden layers of both classifiers; the model's head is then replaced. 0: both are as
            the model's head.
        layers, batch_norm, dropout: hidden layers of Linear-(BatchNorm)-ReLU-(dropout), where there are any.
        lr_scale: learning rate of the second classifier relative to the head's.
    """

    settings = ("closed", "multi-source")

    def __init__(self, head_hidden: int, layers: int, batch_norm: bool, dropout: float, lr_scale: float) -> None:
        super().__init__()
        if head_hidden < 0 or not 0 <= dropout < 1:
            raise uda.UDAError(f"{type(self).__name__}: head_hidden must not be negative, and dropout lies in [0, 1).")
        self.deep, self.lr_scale = head_hidden > 0, lr_scale
        self._net = {"hidden": head_hidden, "layers": layers, "batch_norm": batch_norm, "dropout": dropout}
        self.second: nn.Module | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Make the second classifier, and the first one anew where both are deep."""
        if self.second is not None:
            return
        size, classes = model.feature_dim, model.num_classes
        own = type(model.head).__module__ == LinearHead.__module__  # no other plugin has replaced it
        if self.deep and not own:
            raise uda.UDAError(
                f"Plugin {self.key!r}: head_hidden replaces the model's head, but another plugin has already done so: "
                "set head_hidden to 0."
            )
        if self.deep:
            model.head = DomainDiscriminator(size, **self._net, out_features=classes)
            self.second = DomainDiscriminator(size, **self._net, out_features=classes)
        else:
            self.second = (type(model.head) if own else LinearHead)(size, classes)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The second classifier at its own rate."""
        return [{"name": self.key, "params": self.second.parameters(), "lr_scale": self.lr_scale}]

    def second_loss(self, step: uda.Step, features: Tensor) -> Tensor:
        """Classification loss of the second classifier on the source features ``[B, F]``."""
        return classification_loss(self.second(features), step.pooled("y"), step.model.label_smoothing)
