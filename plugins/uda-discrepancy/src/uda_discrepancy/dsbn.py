"""Domain-Specific Batch Normalization for Unsupervised Domain Adaptation (Chang et al., CVPR 2019)."""

from __future__ import annotations

import uda
from uda_discrepancy.domain_norm import separate_batchnorm


class DSBN(uda.Plugin):
    """Statistics, scale and shift of BatchNorm for each domain (Chang et al. 2019, equations 4 to 6).

    Changes the network only, so it stands beside a method that trains on the target (an aligner, self-training),
    which alone moves the target's scale and shift. Inference on the target takes the target's branch. Needs
    ``model.forward_mode: separate``. Put it before plugins that copy the network. The paper's second stage, training
    on the pseudo-labels of the first, is a pseudo-labelling plugin beside this one.

    Args:
        per_source: with several sources a branch for each of them; otherwise one for all.
    """

    settings = ("closed", "partial", "open", "multi-source")

    def __init__(self, per_source: bool = True) -> None:
        super().__init__()
        self.per_source = per_source

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Convert backbone and bottleneck."""
        if len(model.plugins) == 1:
            raise uda.UDAError(
                "DSBN alone leaves the target's scale and shift untrained: add a method that trains on the target "
                "(model.plugins.align, for example), or take AdaBN."
            )
        separate_batchnorm(model, "DSBN", affine=True, per_source=self.per_source)
