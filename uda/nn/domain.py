"""Which domain a forward belongs to, and layers that depend on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from uda.errors import UDAError, nearest
from uda.nn.backbones import Backbone
from uda.nn.factory import feature_size, make_backbone

Role = Literal["source", "target", "held_out", "labelled", "joint"]


@dataclass(frozen=True)
class ActiveDomain:
    """Domain of the forward under way.

    The role ``"joint"`` is one forward of several domains; ``parts`` then has ``(name, role, rows)`` of each, in the
    order of the rows.
    """

    name: str
    role: Role
    parts: tuple[tuple[str, Role, int], ...] = ()


_ACTIVE: ContextVar[ActiveDomain | None] = ContextVar("uda_active_domain", default=None)


def active_domain() -> ActiveDomain | None:
    """Domain of the forward under way; None outside of any."""
    return _ACTIVE.get()


@contextmanager
def domain_context(
    name: str, role: Role, parts: Iterable[tuple[str, Role, int]] = ()
) -> Iterator[ActiveDomain]:
    """Declare the domain of all forwards inside, or the ``parts`` of a joint one. Contexts nest."""
    token = _ACTIVE.set(ActiveDomain(name, role, tuple(parts)))
    try:
        yield _ACTIVE.get()  # type: ignore[misc]
    finally:
        _ACTIVE.reset(token)


def domain_feature_size(backbone: nn.Module, shapes: Mapping[str, Sequence[int]], target: str) -> int:
    """F of a backbone for domains whose inputs differ in shape, by a dry forward of each.

    Args:
        shapes: of one input, by domain name; target: which of them is the target.

    Raises:
        UDAError: a backbone that refuses a domain's shape, or gives the domains different numbers of features.
    """
    sizes = {}
    for name, shape in shapes.items():
        with domain_context(name, "target" if name == target else "source"):
            sizes[name] = feature_size(backbone, tuple(shape))
    if len(set(sizes.values())) > 1:
        raise UDAError(f"The backbone must give all domains equally many features, but gives {sizes}.")
    return next(iter(sizes.values()))


def _key(name: str) -> str:
    return name.replace(".", "_")  # module names must not contain dots


def choose(keys: Iterable[str], what: str) -> str:
    """Key for the active domain: its name, else its role, held-out and labelled samples as the target.

    Without an active domain it is ``"target"``, the domain that a deployed model serves.

    Raises:
        UDAError: where no key fits.
    """
    keys, domain = list(keys), active_domain()
    if domain is not None and domain.role == "joint":
        raise UDAError(f"{what} needs one forward a domain: set model.forward_mode to 'separate'.")
    if domain is None:
        wanted = ["target"]
    else:
        wanted = [_key(domain.name), domain.role, *(["target"] if domain.role in ("held_out", "labelled") else [])]
    for key in wanted:
        if key in keys:
            return key
    where = "default" if domain is None else domain.role
    raise UDAError(f"{what} has nothing for the {where} domain {wanted[0]!r}. {nearest(wanted[0], keys)}")


class DomainBatchNorm(nn.Module):
    """One BatchNorm a domain, chosen by :func:`active_domain`.

    Statistics alone are AdaBN (Li et al., 2016), scale and shift as well DSBN (Chang et al., 2019).

    Source and target must go through in separate forwards.

    Args:
        norm: the layer whose parameters and statistics all domains start from.
        roles: roles or domain names.
        separate_affine: scale and shift for each domain (DSBN), or only the statistics (AdaBN).
    """

    def __init__(
        self, norm: _BatchNorm, roles: Iterable[str] = ("source", "target"), separate_affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features = norm.num_features
        self.norms = nn.ModuleDict({_key(role): copy.deepcopy(norm) for role in roles})
        if not self.norms:
            raise UDAError("DomainBatchNorm needs at least one role, such as 'target'.")
        if not separate_affine:
            for other in self.norms.values():
                other.weight, other.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """As the BatchNorm of the active domain."""
        return self.norms[choose(self.norms, "DomainBatchNorm")](x)


def convert_batchnorm(
    module: nn.Module, roles: Iterable[str] = ("source", "target"), separate_affine: bool = True
) -> nn.Module:
    """Put a :class:`DomainBatchNorm` in the place of each BatchNorm, in place; returns the module.

    Idempotent. Make it before the optimiser. A module that is a BatchNorm itself comes back wrapped.
    """
    roles = list(roles)
    if isinstance(module, DomainBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        return DomainBatchNorm(module, roles, separate_affine)
    for name, child in module.named_children():
        converted = convert_batchnorm(child, roles, separate_affine)
        if converted is not child:
            setattr(module, name, converted)
    return module


def spread_batchnorm(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the net before :func:`convert_batchnorm` as one for the net after it: all branches start alike.

    Args:
        module: the net with :class:`DomainBatchNorm` layers; state: of either net.
    """
    spread = dict(state)
    for name, layer in module.named_modules():
        if isinstance(layer, DomainBatchNorm):
            prefix = f"{name}." if name else ""
            for key in next(iter(layer.norms.values())).state_dict():
                if prefix + key in spread:
                    value = spread.pop(prefix + key)
                    spread |= {f"{prefix}norms.{role}.{key}": value for role in layer.norms}
    return spread


class PerDomain(Backbone):
    """A backbone for each domain, for domains with different inputs.

    ``PerDomain({"source": MLP(in_features=800), "target": MLP(in_features=1024)})``: keys are roles or domain
    names; all must give the same number of features.
    """

    joint_forward = False

    def __init__(self, backbones: Mapping[str, nn.Module | str]) -> None:
        super().__init__()
        if not backbones:
            raise UDAError("PerDomain needs at least one backbone, such as {'source': ..., 'target': ...}.")
        self.backbones = nn.ModuleDict({_key(k): make_backbone(b) for k, b in backbones.items()})
        for key, backbone in self.backbones.items():
            if any(
                is_lazy(p) for p in backbone.parameters()
            ):  # the dry forward that sizes nets sees one domain
                raise UDAError(f"PerDomain: give the backbone of {key!r} its in_features.")
        sizes = {k: getattr(b, "out_features", None) for k, b in self.backbones.items()}
        if len(known := {s for s in sizes.values() if s is not None}) > 1:
            raise UDAError(
                f"The backbones of PerDomain must give equally many features, but out_features are {sizes}."
            )
        self.out_features = next(iter(known)) if known and None not in sizes.values() else None

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, F]`` by the backbone of the active domain."""
        return self.backbones[choose(self.backbones, "PerDomain")](x)
