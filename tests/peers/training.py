"""Training with our losses and with those of peers in one and the same loop.

    python tests/peers/training.py --data FILE.npz [--methods mcc bnm ...] [--seeds 0 1 2] [--steps 500]

FILE.npz has ``art_painting_x`` [n, F], ``art_painting_y`` [n], and the same of the other domains. Both sides start
from the same weights, see the same batches in the same order, and have the same optimiser, schedule and budget; only
the adaptation loss is different: it is put together here from the functions and layers of either side. The accuracy
on all of the target at the last step goes, one line a run, to ``results.jsonl`` beside this file; runs that are in
there already are skipped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pytorch_adapt import layers as adapt
from skada.deep import losses as skada
from skada.deep._adversarial import MDDLoss
from torch import Tensor, nn
from torch.nn import functional as F
from uda_adversarial.bsp import leading_energy
from uda_adversarial.mcd import classifier_discrepancy
from uda_adversarial.mdd import margin_disparity
from uda_discrepancy.afn import stepwise_norm_loss
from uda_discrepancy.coral import coral_loss
from uda_selftraining.atdoc import neighbour_labels, sharpened
from uda_selftraining.bnm import nuclear_norm

from uda.kernels import multi_kernel_mmd
from uda.losses import classification_loss, domain_adversarial_loss, minimum_class_confusion, outer_product
from uda.nn import Bottleneck, DomainDiscriminator, reverse_gradient, warm_start

RESULTS = Path(__file__).with_name("results.jsonl")
WIDTH, BATCH = 256, 32


class State(nn.Module):
    """Networks of a run (those a method does not use have no gradient and stay as they are), and ATDOC's memory."""

    def __init__(self, inputs: int, classes: int, targets: int) -> None:
        super().__init__()
        self.classes, self.progress = classes, 0.0
        self.bottleneck, self.head, self.second = (
            Bottleneck(inputs, WIDTH), nn.Linear(WIDTH, classes), nn.Linear(WIDTH, classes),
        )  # fmt: skip
        self.domain = DomainDiscriminator(WIDTH)
        self.joint = DomainDiscriminator(WIDTH * classes)
        labeller = adapt.NeighborhoodAggregation(targets, WIDTH, classes, k=5, T=0.5)
        self.register_buffer("rows", labeller.feat_memory.clone())
        self.register_buffer("votes", labeller.pred_memory.clone())
        self.labeller = labeller


class Batch:
    """Features and logits of one step."""

    def __init__(self, fs: Tensor, ft: Tensor, zs: Tensor, zt: Tensor, y: Tensor, index: Tensor) -> None:
        self.fs, self.ft, self.zs, self.zt, self.y, self.index = fs, ft, zs, zt, y, index


def discriminate(net: nn.Module, s: Tensor, t: Tensor, reverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Domain logits behind a reversal."""
    a, b = net(reverse(torch.cat([s, t]))).squeeze(1).split([len(s), len(t)])
    return a, b


def peer_domain(net: nn.Module, s: Tensor, t: Tensor, coefficient: float) -> Tensor:
    """pytorch-adapt's reversal with the mean of its two domain losses (its MeanWeighter)."""
    a, b = discriminate(net, s, t, adapt.GradientReversal(coefficient))
    bce = F.binary_cross_entropy_with_logits
    return (bce(a, torch.ones_like(a)) + bce(b, torch.zeros_like(b))) / 2


def our_domain(net: nn.Module, s: Tensor, t: Tensor, coefficient: float) -> Tensor:
    return domain_adversarial_loss(*discriminate(net, s, t, lambda x: reverse_gradient(x, coefficient)))


def our_atdoc(m: State, b: Batch) -> Tensor:
    with torch.no_grad():
        unit = F.normalize(b.ft, dim=1)
        similarity = unit @ m.rows.T
        similarity[torch.arange(len(unit)), b.index] = float("-inf")
        label, confidence = neighbour_labels(similarity, m.votes, 5)
        m.rows[b.index], m.votes[b.index] = unit, sharpened(b.zt.softmax(1), 0.5)
        weight = confidence * len(confidence) / confidence.sum()
    return m.progress * classification_loss(b.zt, label, weight=weight)


def peer_atdoc(m: State, b: Batch) -> Tensor:
    """The body of pytorch-adapt's ATDOCHook, with the same linear ramp."""
    label, votes = m.labeller(b.ft.detach(), b.zt.detach(), update=True, idx=b.index)
    return m.progress * (adapt.ConfidenceWeights()(votes) * F.cross_entropy(b.zt, label, reduction="none")).mean()


def second(m: State, b: Batch, reverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the second classifier for both domains, behind a reversal."""
    return m.second(reverse(b.fs)), m.second(reverse(b.ft))


def mcd(m: State, b: Batch, gap: Callable[[Tensor, Tensor], Tensor], reverse: Callable[[Tensor], Tensor]) -> Tensor:
    """One step with reversal; the source trains the second classifier as well."""
    f = reverse(b.ft)
    return F.cross_entropy(m.second(b.fs), b.y) - gap(m.head(f), m.second(f))


def mdd(m: State, b: Batch, peer: bool) -> Tensor:
    coefficient = 0.1 * ramp(m)
    reverse = adapt.GradientReversal(coefficient) if peer else lambda x: reverse_gradient(x, coefficient)
    on_source, on_target = second(m, b, reverse)
    if peer:
        return MDDLoss(4.0)(b.zs.detach(), b.zt.detach(), on_source, on_target)
    return margin_disparity(on_source, on_target, b.zs.argmax(1), b.zt.argmax(1), 4.0)


def ramp(m: State) -> float:
    return warm_start(m.progress)


def conditioned(b: Batch) -> tuple[Tensor, Tensor]:
    return outer_product(b.fs, b.zs.detach().softmax(1)), outer_product(b.ft, b.zt.detach().softmax(1))


Loss = Callable[[State, Batch], Tensor]
#: method: (peer, our loss, the peer's loss); weights as in configs/methods, but BNM divides by the batch, as its peer.
METHODS: dict[str, tuple[str, Loss, Loss]] = {
    "source_only": ("none", lambda m, b: b.zt.sum() * 0, lambda m, b: b.zt.sum() * 0),
    "mcc": ("pytorch-adapt", lambda m, b: minimum_class_confusion(b.zt, 2.5), lambda m, b: adapt.MCCLoss(T=2.5)(b.zt)),
    "mcc_skada": ("skada", lambda m, b: minimum_class_confusion(b.zt, 2.5), lambda m, b: skada.mcc_loss(b.zt, T=2.5)),
    "bnm": (
        "pytorch-adapt", lambda m, b: 1 - nuclear_norm(b.zt.softmax(1)) / len(b.zt), lambda m, b: adapt.BNMLoss()(b.zt),
    ),
    "safn": (
        "pytorch-adapt", lambda m, b: 0.05 * (stepwise_norm_loss(b.fs) + stepwise_norm_loss(b.ft)),
        lambda m, b: 0.05 * (adapt.AdaptiveFeatureNorm()(b.fs) + adapt.AdaptiveFeatureNorm()(b.ft)),
    ),
    "atdoc": ("pytorch-adapt", our_atdoc, peer_atdoc),
    "dann": (
        "pytorch-adapt", lambda m, b: our_domain(m.domain, b.fs, b.ft, ramp(m)),
        lambda m, b: peer_domain(m.domain, b.fs, b.ft, ramp(m)),
    ),
    "dann_bsp": (
        "pytorch-adapt",
        lambda m, b: our_domain(m.domain, b.fs, b.ft, ramp(m)) + 2e-4 * (leading_energy(b.fs) + leading_energy(b.ft)),
        lambda m, b: peer_domain(m.domain, b.fs, b.ft, ramp(m))
        + 2e-4 * (adapt.BatchSpectralLoss()(b.fs) + adapt.BatchSpectralLoss()(b.ft)),
    ),
    "cdan": (
        "pytorch-adapt", lambda m, b: our_domain(m.joint, *conditioned(b), ramp(m)),
        lambda m, b: peer_domain(m.joint, *conditioned(b), ramp(m)),
    ),
    "mcd": (
        "pytorch-adapt", lambda m, b: mcd(m, b, classifier_discrepancy, reverse_gradient),
        lambda m, b: mcd(m, b, adapt.MCDLoss(), adapt.GradientReversal()),
    ),
    "coral": ("skada", lambda m, b: coral_loss(b.zs, b.zt), lambda m, b: skada.deepcoral_loss(b.zs, b.zt)),
    "dan": ("skada", lambda m, b: multi_kernel_mmd(b.fs, b.ft, "unbiased"), lambda m, b: skada.dan_loss(b.fs, b.ft)),
    "mdd": ("skada", lambda m, b: mdd(m, b, False), lambda m, b: mdd(m, b, True)),
}  # fmt: skip


def train(start: State, loss: Loss, data: tuple[Tensor, ...], steps: int, seed: int) -> float:
    """Train a copy of ``start``; accuracy on all of the target after the last step."""
    xs, ys, xt, yt = data
    m = copy.deepcopy(start).train()
    order = torch.Generator().manual_seed(seed)  # batches: the same for both sides
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for step in range(steps):
        m.progress = step / steps
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * (1 + 10 * m.progress) ** -0.75
        i = torch.randint(len(xs), (BATCH,), generator=order)
        j = torch.randperm(len(xt), generator=order)[:BATCH]
        f = m.bottleneck(torch.cat([xs[i], xt[j]]))
        z = m.head(f)
        batch = Batch(f[:BATCH], f[BATCH:], z[:BATCH], z[BATCH:], ys[i], j)
        total = F.cross_entropy(batch.zs, batch.y) + loss(m, batch)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    m.eval()
    with torch.no_grad():  # target labels serve for this number alone
        return (m.head(m.bottleneck(xt)).argmax(1) == yt).float().mean().item()


def table(rows: list[dict]) -> str:
    """Markdown: mean target accuracy of both sides over the seeds that both have, and the mean difference."""
    cells: dict[tuple, dict[str, dict[int, float]]] = {}
    for r in rows:
        key = (r["task"], r["method"], r["peer"], r["steps"])
        cells.setdefault(key, {"ours": {}, "peer": {}})[r["side"]][r["seed"]] = r["accuracy"]
    lines = ["| task | method | peer | seeds | ours | peer's | ours minus peer's |", "|---|---|---|---|---|---|---|"]
    for (task, method, peer, _), sides in cells.items():
        ours, theirs = sides["ours"], sides["peer"]
        seeds = sorted(ours) if peer == "none" else sorted(set(ours) & set(theirs))
        if not seeds:
            continue
        a = sum(ours[s] for s in seeds) / len(seeds)
        b = None if peer == "none" else sum(theirs[s] for s in seeds) / len(seeds)
        rest = "| |" if b is None else f"{b:.1f} | {a - b:+.1f} |"
        lines.append(f"| {task} | {method} | {peer} | {', '.join(map(str, seeds))} | {a:.1f} | {rest}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="without it, print the table of results.jsonl")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tasks", nargs="*", default=["art_painting-cartoon", "photo-cartoon"])
    args = parser.parse_args()
    seen = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if args.data is None:
        print(table(seen))
        return
    torch.set_num_threads(1)
    done = {(r["method"], r["side"], r["task"], r["seed"], r["steps"]) for r in seen}
    arrays = np.load(args.data)
    for method in args.methods:
        peer, ours, theirs = METHODS[method]
        for task in args.tasks:
            source, target = task.split("-")
            data = (
                torch.from_numpy(arrays[f"{source}_x"]).float(), torch.from_numpy(arrays[f"{source}_y"]),
                torch.from_numpy(arrays[f"{target}_x"]).float(), torch.from_numpy(arrays[f"{target}_y"]),
            )  # fmt: skip
            for seed in args.seeds:
                torch.manual_seed(seed)
                start = State(data[0].shape[1], int(data[1].max()) + 1, len(data[2]))
                for side, loss in (("ours", ours), ("peer", theirs)):
                    if (method, side, task, seed, args.steps) in done or (side == "peer" and peer == "none"):
                        continue
                    accuracy = train(start, loss, data, args.steps, seed)
                    row = {"method": method, "side": side, "peer": peer, "task": task, "seed": seed,
                           "steps": args.steps, "accuracy": round(100 * accuracy, 2)}  # fmt: skip
                    with RESULTS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


if __name__ == "__main__":
    main()
