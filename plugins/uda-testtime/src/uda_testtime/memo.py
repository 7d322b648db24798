"""MEMO: one step for each image on the entropy of its mean prediction over views, forgotten afterwards."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2

from uda.losses import log_mean_probs
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import all_parameters
from uda_testtime.surgery import mix_statistics
from uda_testtime.views import uniform


def marginal_entropy(logits: Tensor) -> Tensor:
    """``H(mean_i softmax(z_i))`` of the views' logits ``[V, C]``, in log space (MEMO, eq. 2)."""
    log_p = log_mean_probs(logits)
    return -(log_p.exp() * log_p).sum()


def augmix_view(x: Tensor, generator: Generator, severity: int = 3, flip: bool = True) -> Tensor:
    """AugMix after a shifted crop and a mirror, each image by its own draw.

    The operations that common corruptions are made of (brightness, colour, contrast, sharpness) are left out.

    Args:
        x: pixels ``[B, 1 or 3, H, W]`` in [0, 1]; generator: on the CPU; severity: 1 to 10.

    Returns:
        ``[B, C, H, W]`` in [0, 1].
    """
    mix, (h, w) = v2.AugMix(severity=severity, all_ops=False), x.shape[-2:]
    padded = v2.functional.pad(x.clamp(0, 1), [w // 8, h // 8], padding_mode="reflect")
    out = []
    with torch.random.fork_rng(devices=[]):  # AugMix draws from torch's global generator
        torch.random.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        for image in padded:
            top, left = int(uniform(0, 2 * (h // 8) + 1, generator)), int(uniform(0, 2 * (w // 8) + 1, generator))
            image = image[:, top : top + h, left : left + w]
            if flip and uniform(0, 1, generator) < 0.5:
                image = image.flip(-1)
            out.append(mix((image * 255).round().to(torch.uint8)))
    return torch.stack(out).to(x) / 255


class MEMO(Method):
    """Marginal entropy minimisation with one test point (Zhang et al., NeurIPS 2022).

    Episodic: each sample starts from the source model, and the net is the source model again afterwards. A batch is a
    loop over its samples; each costs a backward over its views. Scored: the sample's logits after its update. With
    ``lr=0`` that is the source model, statistics mixed sample by sample.

    Args:
        lr: learning rate (SGD 0.005 CIFAR-10, 2.5e-4 ImageNet); optimizer: published is plain SGD, as momentum is 0
            here; ``adam`` or ``adamw``, too.
        weight: of the entropy; views: of each sample (32 CIFAR-10, 64 ImageNet); steps: for each sample.
        severity, flip: of the views, AugMix; feature rows get noise.
        source_weight: share of the source's BatchNorm statistics (16/17 for ImageNet's ResNet-50).
    """

    episodic, scored = True, "after the update of the sample"

    def __init__(
        self, lr: float = 0.005, optimizer: str = "sgd", weight: float = 1.0, views: int = 32, steps: int = 1,
        severity: int = 3, flip: bool = True, source_weight: float = 16 / 17,
    ) -> None:  # fmt: skip
        self.lr, self.optimizer, self.weight, self.views, self.steps = lr, optimizer, weight, views, steps
        self.severity, self.flip, self.source_weight = severity, flip, source_weight

    def attach(self, a: Adapter) -> None:
        """Mixed statistics; all parameters are trained."""
        mix_statistics(a, self.source_weight)
        options = {"momentum": 0.0} if self.optimizer == "sgd" else {}
        a.train_parameters(all_parameters(a, "MEMO"), self.optimizer, self.lr, **options)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """Sample by sample: the statistics of a batch of one."""
        return torch.cat([a.net(x[i : i + 1]) for i in range(len(x))])

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Each sample: views, steps, logits, and back."""
        make = None if x.dim() == 2 else lambda v, g: augmix_view(v, g, self.severity, self.flip)
        out = []
        for i in range(len(x)):
            one = x[i : i + 1]
            for _ in range(self.steps):
                views = a.view(one.expand(self.views, *one.shape[1:]), make)
                a.update(self.weight * marginal_entropy(a.net(views)))
            with torch.no_grad():
                out.append(a.net(one))
            a.reset_weights()
        return torch.cat(out)
