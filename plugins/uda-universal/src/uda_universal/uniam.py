"""Universal attention matching (after UniAM: Zhu et al., ICCV 2023): commonness from sparse codes of attention maps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from uda_adversarial.adversary import Adversary

import uda
from uda.losses import class_distributions, entropy
from uda.nn import Bank, full, gather_rows, no_autocast
from uda.rejection import otsu
from uda_universal.common import SETTINGS, marked


def class_token_attention(attention: nn.Module, qkv: Tensor) -> Tensor:
    """Attention of the class token to the patches ``[B, H * P]``, heads one after the other, each of sum 1.

    Computed anew from the output of the layer that makes queries and keys, so the block itself may go on with fused
    attention.

    Args:
        attention: a timm attention block with ``num_heads``, ``scale`` and optional ``q_norm``, ``k_norm``.
        qkv: output of its layer ``qkv`` ``[B, 1 + P, 3 D]``.
    """
    with no_autocast(qkv):
        b, n, _ = qkv.shape
        q, k, _ = full(qkv).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
        a = (q @ k.transpose(2, 3))[:, :, 0] * attention.scale
        return a[:, :, 1:].softmax(2).flatten(1)


def last_attention(backbone: nn.Module) -> nn.Module:
    """The attention of the last block of a timm vision transformer.

    Raises:
        UDAError: the backbone has none.
    """
    found = [m for m in backbone.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    if not found:
        raise uda.UDAError("UniAM reads the attention of a vision transformer: take a backbone such as timm:vit_...")
    return found[-1]


@torch.no_grad()
def attention_rows(backbone: nn.Module, x: Tensor) -> Tensor:
    """Unit rows ``[B, H * P]`` of :func:`class_token_attention` for inputs x: one more forward, without gradient."""
    block, caught = last_attention(backbone), []
    handle = block.qkv.register_forward_hook(lambda layer, args, out: caught.append(out))
    try:
        backbone(x)
    finally:
        handle.remove()
    return F.normalize(class_token_attention(block, caught[0]), dim=1)


@torch.no_grad()
def sparse_codes(rows: Tensor, dictionary: Tensor, eta: float = 0.05, iterations: int = 50) -> Tensor:
    """``argmin_c 1/2 |a - c D|^2 + eta |c|_1`` ``[B, N]`` by accelerated proximal gradient steps (FISTA).

    Args:
        rows: unit rows ``[B, D]``; dictionary: unit rows or zeros ``[N, D]``.
    """
    gram, target = dictionary @ dictionary.T, rows @ dictionary.T
    rate = 1 / gram.abs().sum(1).amax().clamp_min(1e-12)  # no less than the largest eigenvalue
    code = point = torch.zeros_like(target)
    t = 1.0
    for _ in range(iterations):
        new = point - rate * (point @ gram - target)
        new = new.sign() * (new.abs() - rate * eta).clamp_min(0)
        t_new = (1 + (1 + 4 * t * t) ** 0.5) / 2
        code, point, t = new, new + (t - 1) / t_new * (new - code), t_new
    return code


def class_residuals(rows: Tensor, codes: Tensor, dictionary: Tensor, classes: int) -> Tensor:
    """``|a - c_k D_k|`` ``[B, C]``: what the atoms of one class leave of a row; atoms are grouped by class."""
    parts = torch.einsum("bck,ckd->bcd", codes.unflatten(1, (classes, -1)), dictionary.unflatten(0, (classes, -1)))
    return (rows[:, None] - parts).norm(dim=2)


def commonness(residuals: Tensor) -> Tensor:
    """``1 - min_k r_k / max_k r_k`` ``[B]`` in [0, 1]: large where one class alone explains the attention."""
    return 1 - residuals.amin(1) / residuals.amax(1).clamp_min(1e-12)


RECENT = 2048  # target samples that a threshold without a quantile is taken from


class UniAM(Adversary):
    """Weighs and rejects target samples by how well source attention of one class explains theirs.

    The attention of a vision transformer's class token is written as a sparse combination of ``atoms`` source rows a
    class (:func:`sparse_codes`); :func:`commonness` w of its residuals weighs the adversary (feature alignment) and
    pulls entropies apart: ``separation * mean (2 w' - 1) H(p_t)`` with w' the rank of w in the batch, in [0, 1].
    Unknown: w below the ``quantile`` of w over recent source samples. The idea is the paper's; the formulas of
    commonness, separation and threshold, and all numbers below, are this project's, since neither the authors' code nor
    a text to check them against was at hand. The alignment of class centres is left out.

    Args:
        atoms: source rows of a class in the dictionary, the latest ones; eta: of the sparse code.
        iterations: of the solver.
        separation: weight of the entropies.
        quantile: share of the source samples that would be rejected. None: the threshold is where w of the latest
            target samples of the training falls into two groups (:func:`uda.rejection.otsu`), for a target that is
            known to have unknown classes; most of a target looks strange where attention shifts with the domain.
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "eta": (0.01, 0.2, "log")}
    seen: Tensor
    limit: Tensor
    recent: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        atoms: int = 8,
        eta: float = 0.05,
        iterations: int = 50,
        separation: float = 0.1,
        quantile: float | None = 0.1,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        if quantile is not None and not 0 < quantile < 1:
            raise uda.UDAError(f"UniAM: quantile is between 0 and 1, or none, got {quantile}.")
        if atoms < 1 or iterations < 1 or eta < 0 or separation < 0:
            raise uda.UDAError("UniAM: atoms and iterations are 1 or more, eta and separation not negative.")
        self.atoms, self.eta, self.iterations = atoms, eta, iterations
        self.separation, self.quantile = separation, quantile
        self.dictionary: Bank | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator and dictionary."""
        super().build(model)
        last_attention(model.backbone)
        if self.dictionary is None:
            device = next(model.backbone.parameters()).device
            width = attention_rows(model.backbone, torch.zeros(1, *model.input_shape, device=device)).shape[1]
            self.dictionary = Bank(model.num_classes * self.atoms, rows=(width,))
            self.register_buffer("seen", torch.zeros(model.num_classes, dtype=torch.long))
            self.register_buffer("limit", torch.zeros(()))
            self.register_buffer("recent", torch.full((RECENT,), torch.nan))

    def common(self, rows: Tensor) -> Tensor:
        """Commonness ``[B]`` of attention rows ``[B, D]``."""
        classes = len(self.seen)
        codes = sparse_codes(rows, self.dictionary.rows, self.eta, self.iterations)
        return commonness(class_residuals(rows, codes, self.dictionary.rows, classes))

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The weighted adversary and the pull on the entropies."""
        backbone, target = step.model.backbone, step.target
        rows = attention_rows(backbone, step.pooled("x"))
        w_s, w_t = self.common(rows), self.common(attention_rows(backbone, target.x))
        target.cache[self.key] = (rows, w_s, w_t)
        rank = w_t.argsort().argsort().to(w_t.dtype) / max(len(w_t) - 1, 1)
        self.log_later(common_source=w_s.mean(), common_target=w_t.mean())
        # an empty dictionary explains nothing: all weigh alike until it is there
        weights = (w_s, w_t) if bool((self.seen > 0).all()) else (None, None)
        domain = self.adversarial(step, step.pooled("features"), target.features, *weights)
        pull = 2 * rank - 1 if weights[0] is not None else torch.zeros_like(rank)
        return {"domain": domain, "separation": self.separation * (pull * entropy(target.logits)).mean()}

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """The latest source rows of each class are its atoms; the threshold follows the source, or the target."""
        rows, w_s, w_t = step.target.cache[self.key]
        y = step.pooled("y")
        y = gather_rows(y if y.ndim == 1 else y.argmax(1))
        rows, w_s, w_t = gather_rows(rows), gather_rows(w_s), gather_rows(w_t)
        own = class_distributions(y, len(self.seen), torch.long)
        before = (own.cumsum(0) - own).gather(1, y[:, None])[:, 0]  # rows of the class earlier in the batch
        at = y * self.atoms + (self.seen[y] + before) % self.atoms
        if self.quantile is None and bool((self.seen > 0).all()):
            self.recent.copy_(torch.cat([w_t.to(self.recent), self.recent])[:RECENT])
        elif self.quantile is not None and len(w_s):
            self.limit.lerp_(torch.quantile(w_s.float(), self.quantile), 0.05 if bool((self.seen > 0).all()) else 1.0)
        self.seen.add_(own.sum(0))
        count = len(at) if step.model.global_rank == 0 else 0  # gathered already: one rank writes
        self.dictionary.write(at[:count], rows=rows[:count])

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """Without a quantile, where the latest target samples fall into two groups; before there are any, nowhere."""
        found = self.recent[~self.recent.isnan()]
        if self.quantile is None and len(found):
            self.limit.fill_(otsu(found))

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: uda.DomainBatch, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown where no class of the source explains the attention."""
        strange = 1 - self.common(attention_rows(model.backbone, batch.x))
        return marked(batch, prediction, strange, 1 - float(self.limit))
