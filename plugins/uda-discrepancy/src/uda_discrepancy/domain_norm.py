"""BatchNorm for each domain, put into a model by a plugin."""

from __future__ import annotations

import uda
from uda.nn import DomainBatchNorm, convert_batchnorm

PARTS = ("backbone", "bottleneck")


def domain_norms(model: uda.UDA) -> list[DomainBatchNorm]:
    """Domain-wise normalisation layers of backbone and bottleneck."""
    return [m for part in PARTS for m in getattr(model, part).modules() if isinstance(m, DomainBatchNorm)]


def separate_batchnorm(
    model: uda.UDA, who: str, affine: bool = True, per_source: bool = True, required: bool = True
) -> None:
    """Give each domain its BatchNorm in backbone and bottleneck, in place and once.

    Roles are ``source`` and ``target``, or with ``per_source`` and several sources a layer for each source by name.

    Args:
        who: name of the method, for errors.
        affine: scale and shift a domain (DSBN), or the statistics alone (AdaBN).
        per_source: one layer a source, or one for all sources together.
        required: whether a model without BatchNorm is an error.

    Raises:
        uda.UDAError: joint forwards, or no BatchNorm.
    """
    if model.joint_forward:
        raise uda.UDAError(
            f"{who} keeps BatchNorm statistics for each domain, which one joint forward cannot: set "
            "model.forward_mode: separate."
        )
    several = per_source and len(model.source_names) > 1
    roles = [*model.source_names, "target"] if several else ["source", "target"]
    for part in PARTS:
        setattr(model, part, convert_batchnorm(getattr(model, part), roles, affine))
    if required and not domain_norms(model):
        raise uda.UDAError(
            f"{who} found no BatchNorm in backbone and bottleneck: take a backbone with BatchNorm, or "
            "model.bottleneck_norm: batch."
        )
