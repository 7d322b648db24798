"""Benchmarks as published: domains, classes, layout, source, licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uda.data.benchmarks import Report


@dataclass(frozen=True)
class Benchmark:
    """A published set of domains.

    Args:
        name: by which ``uda data`` knows it.
        title: as papers write it.
        domains: expected number of images by domain (folder name).
        classes: number of classes.
        layout: of a copy that :func:`check` accepts and a reader takes.
        source: where to get it, in words.
        class_names: of the class folders, where they are the same everywhere.
        subfolder: between domain and class folders, in the original archive.
        hub: id of a data set of images in Parquet files on the Hugging Face hub.
        licence: what is known of it.
        optional: domains that a copy may lack.
    """

    name: str
    title: str
    domains: dict[str, int]
    classes: int
    layout: str
    source: str
    class_names: tuple[str, ...] = ()
    subfolder: str = ""
    hub: str = ""
    licence: str = "no licence stated with the data; meant for research"
    optional: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line: title, domains, classes, images."""
        total = sum(self.domains.values())
        return f"{self.title}: {len(self.domains)} domains, {self.classes} classes, {total:,} images"

    def describe(self) -> str:
        """Some lines on layout, domains, source and licence."""
        counts = ", ".join(f"{d} {n:,}" for d, n in self.domains.items())
        lines = [self.summary, f"domains:  {counts}", f"layout:   {self.layout}", f"source:   {self.source}"]
        if self.hub:
            lines.append(f"download: `uda data download {self.name} ROOT` takes {self.hub} from Hugging Face")
        return "\n".join([*lines, f"licence:  {self.licence}"])

    def check(self, root: str) -> Report:
        """See :func:`uda.data.benchmarks.check`."""
        from uda.data.benchmarks import check

        return check(self.name, root)

    def download(self, root: str) -> str:
        """See :func:`uda.data.benchmarks.download`; gives a line that says what was done."""
        from uda.data.benchmarks import download

        return f"{self.title} is in {download(self.name, root)}"


_OFFICE31 = (
    "back_pack bike bike_helmet bookcase bottle calculator desk_chair desk_lamp desktop_computer "
    "file_cabinet headphones keyboard laptop_computer letter_tray mobile_phone monitor mouse mug "
    "paper_notebook pen phone printer projector punchers ring_binder ruler scissors speaker stapler "
    "tape_dispenser trash_can"
)
_VISDA = "aeroplane bicycle bus car horse knife motorcycle person plant skateboard train truck"
_FOLDERS = "ROOT/<domain>/<class>/<image>, reader uda.data.ImageFolders"

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            "office31",
            "Office-31",
            {"amazon": 2817, "dslr": 498, "webcam": 795},
            31,
            "ROOT/<domain>/images/<class>/<image>, reader uda.data.ImageFolders with subfolder: images",
            "the authors' page at UC Berkeley, 'Adapting Visual Category Models to New Domains' (Saenko et "
            "al., ECCV 2010), file domain_adaptation_images.tar.gz",
            tuple(_OFFICE31.split()),
            subfolder="images",
        ),
        Benchmark(
            "office_home",
            "Office-Home",
            {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
            65,
            _FOLDERS,
            "the authors' page, 'Deep Hashing Network for Unsupervised Domain Adaptation' (Venkateswara et "
            "al., CVPR 2017)",
            hub="flwrlabs/office-home",
            licence="fair-use notice: non-commercial research and education; images belong to their owners",
        ),
        Benchmark(
            "visda2017",
            "VisDA-2017 (classification)",
            {"train": 152_397, "validation": 55_388, "test": 72_372},
            12,
            "ROOT/{train,validation}/<class>/<image>, reader uda.data.ImageFolders; the list files "
            "image_list.txt go with uda.data.ImageLists",
            "the VisDA-2017 challenge page of Boston University (Peng et al. 2017), archives train, "
            "validation, test",
            tuple(_VISDA.split()),
            optional=("test",),
        ),
        Benchmark(
            "domainnet",
            "DomainNet (cleaned)",
            {
                "clipart": 48_129,
                "infograph": 51_605,
                "painting": 72_266,
                "quickdraw": 172_500,
                "real": 172_947,
                "sketch": 69_128,
            },
            345,
            _FOLDERS
            + "; the list files <domain>_train.txt and <domain>_test.txt go with uda.data.ImageLists",
            "the authors' page at Boston University, 'Moment Matching for Multi-Source Domain Adaptation' "
            "(Peng et al., ICCV 2019), cleaned version",
            hub="wltjr1007/DomainNet",
            licence="fair-use notice: non-commercial research and education; images belong to their owners",
        ),
        Benchmark(
            "pacs",
            "PACS",
            {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
            7,
            _FOLDERS,
            "'Deeper, Broader and Artier Domain Generalization' (Li et al., ICCV 2017)",
            ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
            hub="flwrlabs/pacs",
        ),
        Benchmark(
            "office_caltech10",
            "Office-Caltech-10",
            {"amazon": 958, "caltech": 1123, "dslr": 157, "webcam": 295},
            10,
            _FOLDERS + "; features: one array file, keys <domain>_x and <domain>_y, reader uda.data.Arrays",
            "the authors' page, 'Geodesic Flow Kernel for Unsupervised Domain Adaptation' (Gong et al., "
            "CVPR 2012)",
        ),
        Benchmark(
            "digits",
            "Digits (MNIST, USPS, SVHN, MNIST-M; training parts)",
            {"mnist": 60_000, "usps": 7291, "svhn": 73_257, "mnistm": 59_001},
            10,
            "one array file, keys <domain>_x and <domain>_y, reader uda.data.Arrays; or " + _FOLDERS,
            "MNIST, USPS and SVHN: classes of torchvision.datasets; MNIST-M: the authors of "
            "'Domain-Adversarial Training of Neural Networks' (Ganin et al., JMLR 2016). uda.data.Digits "
            "needs no download at all",
            tuple("0123456789"),
        ),
        Benchmark(
            "image_clef",
            "ImageCLEF-DA",
            {"b": 600, "c": 600, "i": 600, "p": 600},
            12,
            _FOLDERS + "; lists: ROOT/list/<domain>List.txt with uda.data.ImageLists",
            "the ImageCLEF 2014 domain adaptation challenge: Bing, Caltech-256, ImageNet, Pascal VOC",
            optional=("b",),
        ),
    )
}
