"""Images and words in one space: the interface of a joint encoder, and what methods need of its words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError


class JointEncoder(ABC):
    """Embeds images and texts in one space, in which an image is near to words that describe it.

    Any model will do that does both; both methods run without gradients and in evaluation mode.
    """

    @abstractmethod
    def images(self, x: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, D]``, of any length."""

    @abstractmethod
    def texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> ``[N, D]``, of any length."""


class OpenClip(JointEncoder):
    """A CLIP of the package ``open_clip_torch`` (extra ``clip``), with weights from a file or its own cache.

    Args:
        name: of the architecture, such as ``ViT-B-32``.
        pretrained: file of the weights, or a tag that ``open_clip`` knows, which it may have to download.
        device: where it runs.

    Raises:
        UDAError: the package is not installed, or it refuses name or weights.
    """

    def __init__(self, name: str = "ViT-B-32", pretrained: str = "", device: str = "cpu") -> None:
        try:
            import open_clip
        except ImportError as error:
            raise UDAError("OpenClip needs open_clip_torch: pip install uda-multisource[clip].") from error
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained or None, device=device)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise UDAError(f"OpenClip: {name!r} with weights {pretrained!r} cannot be made: {error}") from error
        self.model, self.device = model.eval(), device

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Of images as ``self.preprocess`` makes them."""
        return self.model.encode_image(x.to(self.device)).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Of texts."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float().cpu()


def prompts(
    encoder: JointEncoder, domains: Mapping[str, Sequence[str] | str], classes: Sequence[str]
) -> dict[str, Any]:
    """Embeddings of what each class is called in each domain, for a file of :class:`~uda_multisource.landa.LanDA`.

    Args:
        domains: for each domain's name a template such as ``"a sketch of a {}"``, or several, whose directions are
            averaged.
        classes: names as they read in a sentence, in the order of the run's classes.

    Returns:
        ``domains`` and ``classes`` (names), and ``text`` ``[domains, C, D]`` of length 1.

    Raises:
        UDAError: a template without ``{}``, nothing to embed, or an encoder that gives no finite vectors.
    """
    if not domains or not classes:
        raise UDAError("prompts: name one domain and one class or more.")
    rows = []
    for name, given in domains.items():
        templates = [given] if isinstance(given, str) else list(given)
        if not templates or any("{}" not in t for t in templates):
            raise UDAError(f"prompts: templates of domain {name!r} need {{}} where the class goes, not {templates}.")
        each = [F.normalize(encoder.texts([t.format(c) for c in classes]).float(), dim=1) for t in templates]
        rows.append(F.normalize(torch.stack(each).mean(0), dim=1))
    text = torch.stack(rows)
    if text.ndim != 3 or not text.isfinite().all():
        raise UDAError(f"prompts: {type(encoder).__name__}.texts must give finite vectors [N, D].")
    return {"domains": list(domains), "classes": list(classes), "text": text}


def read_prompts(path: str, who: str) -> dict[str, Any]:
    """A file that ``torch.save`` made of :func:`prompts`.

    Raises:
        UDAError: no such file, or something else in it.
    """
    if not Path(path).is_file():
        raise UDAError(f"{who}: no file {path!r}; torch.save(uda_multisource.language.prompts(...), FILE) makes one.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        domains, classes, text = list(found["domains"]), list(found["classes"]), found["text"]
        if text.shape[:2] != (len(domains), len(classes)):
            raise ValueError(f"text of shape {list(text.shape)} for {len(domains)} domains and {len(classes)} classes")
    except Exception as error:
        raise UDAError(f"{who}: {path!r} is no file of uda_multisource.language.prompts: {error}") from error
    return {"domains": domains, "classes": classes, "text": text.float()}
