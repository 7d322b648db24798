"""Values and gradients of our losses beside those of peers, on the same random inputs.

    python tests/peers/losses.py

One line a pair: ``equal``, or the factor between them, or ``differs``, with what is known about it. The exit status is
1 where a pair does not come out as its ``expected`` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytorch_adapt import layers as adapt
from pytorch_adapt.layers.normalizers import SumNormalizer
from skada.deep import losses as skada
from skada.deep._adversarial import MDDLoss
from torch import Tensor
from torch.nn import functional as F
from uda_adversarial.bsp import leading_energy
from uda_adversarial.mcd import classifier_discrepancy
from uda_adversarial.mdd import margin_disparity
from uda_discrepancy.afn import stepwise_norm_loss
from uda_discrepancy.coral import coral_loss
from uda_selftraining.atdoc import sharpened
from uda_selftraining.bnm import nuclear_norm

from uda.kernels import contrastive_discrepancy, multi_kernel_mmd
from uda.losses import RandomisedMap, entropy_weights, minimum_class_confusion
from uda.nn import reverse_gradient

SAMPLES, WIDTH, CLASSES = 32, 20, 7
Loss = Callable[..., Tensor]


@dataclass
class Pair:
    """Two implementations of one loss of ``inputs`` (names of :func:`random_inputs`)."""

    name: str
    ours: Loss
    peer: Loss
    inputs: tuple[str, ...]
    expected: str = "equal"  # or "value" (only the value is equal), "gradient" (only the gradient), "differs"
    note: str = ""
    explained: Loss | None = None  # the peer re-derived with the stated causes: must equal the peer
    single: bool = False  # the peer makes float32 tensors, so that float64 inputs fail


def random_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Features and logits of two domains; the target's features are shifted."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "fs": normal(SAMPLES, WIDTH), "ft": 1.3 * normal(SAMPLES, WIDTH) + 0.4,
        "zs": 2 * normal(SAMPLES, CLASSES), "zt": 2 * normal(SAMPLES, CLASSES),
        "as": 2 * normal(SAMPLES, CLASSES), "at": 2 * normal(SAMPLES, CLASSES),
    }  # fmt: skip


def weighted_by_entropy(z: Tensor) -> Tensor:
    """Ours, made a scalar by fixed numbers; without the detach, so that there is a gradient."""
    return (entropy_weights(z, normalise="none", detach=False) * torch.arange(len(z), dtype=z.dtype)).sum()


def peer_weighted_by_entropy(z: Tensor) -> Tensor:
    return (adapt.EntropyWeights(normalizer=lambda w: w)(z) * torch.arange(len(z), dtype=z.dtype)).sum()


def peer_normalised_weights(z: Tensor) -> Tensor:
    weights = adapt.EntropyWeights(normalizer=SumNormalizer(scale_by_batch_size=True, detach=True))(z)
    return (weights * torch.arange(len(z), dtype=z.dtype)).sum()


def normalised_weights(z: Tensor) -> Tensor:
    return (entropy_weights(z, detach=False) * torch.arange(len(z), dtype=z.dtype)).sum()


def numbered(z: Tensor) -> Tensor:
    """A different number for each entry, so that a sum tells all entries apart."""
    return torch.arange(z.numel(), dtype=z.dtype).reshape(z.shape)


def peer_memory(z: Tensor) -> Tensor:
    """What pytorch-adapt's ATDOC writes to its memory, made a scalar."""
    memory = adapt.NeighborhoodAggregation(len(z), WIDTH, CLASSES, k=5, T=0.5).to(z.dtype)
    memory.update_memory(F.normalize(torch.ones(len(z), WIDTH, dtype=z.dtype)), z.detach(), torch.arange(len(z)))
    return (memory.pred_memory * numbered(z)).sum() + 0 * z.sum()


def our_memory(z: Tensor) -> Tensor:
    probs = z.detach().softmax(1)
    votes = sharpened(probs, 0.5, (probs**2).sum(0))
    return (votes * numbered(z)).sum() + 0 * z.sum()


def our_map(f: Tensor, z: Tensor) -> Tensor:
    return RandomisedMap(WIDTH, CLASSES, 64).to(f.dtype)(f, z.softmax(1)).square().sum()


def peer_map(f: Tensor, z: Tensor) -> Tensor:
    """pytorch-adapt's map with our random matrices."""
    ours, theirs = RandomisedMap(WIDTH, CLASSES, 64), adapt.RandomizedDotProduct([WIDTH, CLASSES], 64)
    theirs.rand_mat0, theirs.rand_mat1 = ours.features_map.to(f.dtype), ours.probs_map.to(f.dtype)
    return theirs(f, z.softmax(1)).square().sum()


def _labels(z: Tensor) -> Tensor:
    return torch.arange(len(z)) % CLASSES


def peer_can(fs: Tensor, ft: Tensor) -> Tensor:
    """skada's CDD with given clusters: its k-means object is stood in for by one that answers our pseudo-labels."""
    from skada.deep.utils import SphericalKMeans

    kmeans = SphericalKMeans(CLASSES)
    y = _labels(ft)
    kmeans.cluster_centers_ = torch.stack([ft.detach()[y == c].mean(0) for c in range(CLASSES)])
    kmeans.predict = lambda _: y  # type: ignore[method-assign]
    return skada.cdd_loss(_labels(fs), fs, ft, kmeans, sigmas=[2.0 * WIDTH], distance_threshold=2.0)


def explained_mcc(z: Tensor) -> Tensor:
    scaled = z / 2.5
    p = scaled.softmax(1)
    confusion = p.T @ (p * entropy_with_gradient(scaled)[:, None])
    confusion = confusion / confusion.sum(1, keepdim=True)
    return (confusion.sum() - confusion.trace()) / CLASSES


def entropy_with_gradient(z: Tensor) -> Tensor:
    weight = entropy_weights(z, normalise="none", detach=False)
    return weight / weight.mean()


def explained_dan(s: Tensor, t: Tensor) -> Tensor:
    def mean(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y) / 20.0).mean()

    return mean(s, s) + mean(t, t) - 2 * mean(s, t)


def explained_mdd(a: Tensor, b: Tensor, z: Tensor, w: Tensor) -> Tensor:
    p = 0.9 * b.softmax(1) + 0.1 / CLASSES
    every = torch.stack([torch.log(1 - p[:, c]).mean() for c in w.argmax(1)]).mean()
    return 4.0 * F.cross_entropy(a, z.argmax(1)) - every


def explained_can(s: Tensor, t: Tensor) -> Tensor:
    ss, tt, st = (torch.exp(-torch.cdist(x, y) / (2.0 * WIDTH)) for x, y in ((s, s), (t, t), (s, t)))
    intra = inter = torch.zeros(())
    for c in range(CLASSES):
        for d in range(c, CLASSES):
            a, b = _labels(s) == c, _labels(t) == d
            n, m = a.sum(), b.sum()
            value = ss[:, a].sum() / n**2 + tt[:, b].sum() / m**2 - 2 * st[a][:, b].sum() / (n * m) ** 2
            intra, inter = (intra + value, inter) if c == d else (intra, inter + value)
    return intra / CLASSES - inter / (CLASSES * (CLASSES - 1))


PAIRS = [
    Pair("MCC / pytorch-adapt", lambda z: minimum_class_confusion(z, 2.5), adapt.MCCLoss(T=2.5), ("zt",)),
    Pair(
        "MCC / skada", lambda z: minimum_class_confusion(z, 2.5), lambda z: skada.mcc_loss(z, T=2.5), ("zt",), "value",
        "skada does not detach the entropy weights, so that its gradient has a second part; value up to its eps 1e-7",
        explained=explained_mcc,
    ),
    Pair("MCD discrepancy / pytorch-adapt", classifier_discrepancy, adapt.MCDLoss(), ("zt", "at")),
    Pair(
        "BNM (scale: batch) / pytorch-adapt", lambda z: 1 - nuclear_norm(z.softmax(1)) / len(z), adapt.BNMLoss(),
        ("zt",), "gradient", "ours is 1 larger, a constant that keeps the objective positive",
    ),
    Pair("BSP / pytorch-adapt", lambda f: leading_energy(f, 1), adapt.BatchSpectralLoss(1), ("fs",)),
    Pair("SAFN / pytorch-adapt", stepwise_norm_loss, adapt.AdaptiveFeatureNorm(1.0), ("fs",)),
    Pair("CDAN randomised map / pytorch-adapt", our_map, peer_map, ("fs", "zs")),
    Pair("CDAN+E weights before normalisation / pytorch-adapt", weighted_by_entropy, peer_weighted_by_entropy, ("zs",)),
    Pair("CDAN+E weights of mean 1 / pytorch-adapt", normalised_weights, peer_normalised_weights, ("zs",)),
    Pair("gradient reversal / pytorch-adapt", lambda f: reverse_gradient(f, 0.3).square().sum(),
         lambda f: adapt.GradientReversal(0.3)(f).square().sum(), ("fs",)),
    Pair("ATDOC memory votes / pytorch-adapt", our_memory, peer_memory, ("zt",), "value", "a memory: no gradient"),
    Pair("CORAL / pytorch-adapt", coral_loss, adapt.CORALLoss(), ("fs", "ft")),
    Pair("CORAL / skada", coral_loss, skada.deepcoral_loss, ("fs", "ft")),
    Pair("MMD, one kernel of width 20, unbiased / pytorch-adapt MMDLoss(quadratic)",
         lambda s, t: multi_kernel_mmd(s, t, "unbiased", kernels=1, bandwidth=20.0),
         adapt.MMDLoss(kernel_scales=1.0, mmd_type="quadratic", bandwidth=torch.tensor(20.0)), ("fs", "ft")),
    Pair(
        "DAN, one kernel of width 20, biased / skada",
        lambda s, t: multi_kernel_mmd(s, t, "biased", kernels=1, bandwidth=20.0),
        lambda s, t: skada.dan_loss(s, t, sigmas=[20.0]), ("fs", "ft"), "differs",
        "skada's kernel is exp(-|x-y|/sigma) of the distance, not of its square: Laplacian, not Gaussian",
        explained=explained_dan, single=True,
    ),
    Pair(
        "MDD auxiliary loss / skada", lambda a, b, z, w: margin_disparity(a, b, z.argmax(1), w.argmax(1), 4.0),
        lambda a, b, z, w: MDDLoss(gamma=4.0)(z, w, a, b), ("as", "at", "zs", "zt"), "differs",
        "skada smooths the target's probabilities by 0.1 and takes prob[..., target], which is [B, B]: the classes of "
        "all samples for each sample, not its own",
        explained=explained_mdd,
    ),
    Pair(
        "CAN, CDD / skada", lambda s, t: contrastive_discrepancy(s, _labels(s), t, _labels(t), CLASSES, kernels=1),
        peer_can, ("fs", "ft"), "differs",
        "skada's mask of e1 and e2 is a row, so that all samples (not those of the class) stand against the class; e3 "
        "is divided by (n_c1 n_c2)^2 and not n_c1 n_c2; the kernel is Laplacian, and of one width for all pairs; half "
        "of the ordered pairs are summed but all are divided by",
        explained=explained_can, single=True,
    ),
]  # fmt: skip


def evaluate(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Value, and the gradients of all inputs in one vector (zeros where an input has none)."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), torch.cat([torch.zeros(x.numel(), dtype=x.dtype) if g is None else g.flatten()
                                      for g, x in zip(grads, leaves, strict=True)])  # fmt: skip


def compare(pair: Pair, dtype: torch.dtype) -> tuple[str, str]:
    """Verdict, and the numbers: both values, the ratio of the gradients' lengths and their cosine."""
    inputs = random_inputs(dtype)
    tensors = [inputs[name] for name in pair.inputs]
    (a, da), (b, db) = evaluate(pair.ours, tensors), evaluate(pair.peer, tensors)
    rtol = 1e-5 if dtype == torch.float64 else 1e-3  # some peers have an epsilon, which shows in float64
    value = torch.allclose(a, b.to(a), rtol=rtol, atol=rtol * 1e-2)
    gradient = bool((da - db).norm() <= rtol * (da.norm() + 1e-12))
    verdict = {(True, True): "equal", (True, False): "value", (False, True): "gradient"}.get(
        (value, gradient), "differs"
    )
    if pair.expected == "value" and da.norm() == 0 and value:
        verdict = "value"
    cosine = F.cosine_similarity(da, db.to(da), dim=0) if da.norm() * db.norm() > 0 else torch.tensor(float("nan"))
    numbers = f"ours {a:.6g}, peer {b:.6g}, |grad ours|/|grad peer| {da.norm() / db.norm():.4g}, cosine {cosine:.4f}"
    return verdict, numbers


def main() -> int:
    failed = 0
    for pair in PAIRS:
        for dtype in (torch.float32,) if pair.single else (torch.float64, torch.float32):
            try:
                verdict, numbers = compare(pair, dtype)
                if pair.explained is not None:
                    cause = Pair("", pair.explained, pair.peer, pair.inputs)
                    numbers += f"; the peer re-derived with the stated cause: {compare(cause, dtype)[0]}"
            except Exception as error:  # one peer that fails must not hide the others
                verdict, numbers = "error", f"{type(error).__name__}: {str(error)[:150]}"
            bad = verdict != pair.expected
            failed += bad
            print(f"{pair.name} [{str(dtype)[6:]}]: {verdict}{' (UNEXPECTED)' if bad else ''}; {numbers}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
