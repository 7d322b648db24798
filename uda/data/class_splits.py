"""Class splits as published, by the names of the classes: an index means other classes in another paper."""

from __future__ import annotations

from dataclasses import dataclass

from uda.data.benchmark_table import BENCHMARKS
from uda.data.classes import ClassSplit, plain
from uda.data.domainnet_names import DOMAINNET
from uda.errors import UDAError, nearest

_OFFICE31 = list(BENCHMARKS["office31"].class_names)
_VISDA = list(BENCHMARKS["visda2017"].class_names)
#: Office-31 in the order of UAN and its successors: the ten classes of Caltech-256 first.
_OFFICE31_UAN = (
    "back_pack bike calculator headphones keyboard laptop_computer monitor mouse mug projector "
    "bike_helmet bookcase bottle desk_chair desk_lamp desktop_computer file_cabinet letter_tray mobile_phone "
    "paper_notebook "
    "pen phone printer punchers ring_binder ruler scissors speaker stapler tape_dispenser trash_can"
)
_OFFICE_HOME = (
    "Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch "
    "Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet "
    "Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil "
    "Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker "
    "Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam"
)
_VISDA_OSBP = ["bicycle", "bus", "car", "motorcycle", "train", "truck"]


@dataclass(frozen=True)
class PublishedSplit:
    """A class split that papers report on.

    Attributes:
        split: the classes; those of the data set that it does not name take no part.
        setting: of the task.
        used_by: papers whose published lists have these classes, compared name by name; DANCE and OVANet by the counts
            in their configs, STA and PADA on VisDA as others tell.
        note: what is easily confused.
    """

    split: ClassSplit
    setting: str
    used_by: str
    note: str = ""


def _cut(names: list[str], known: int, source: int, target: int) -> ClassSplit:
    a, b = known, known + source
    return ClassSplit(names[:a], names[a:b], names[b : b + target])


_UAN, _HOME = _OFFICE31_UAN.split(), _OFFICE_HOME.split()
_REST = [n for n in _VISDA if n not in _VISDA_OSBP]
#: DomainNet as the lists of its authors number the classes: by letters and digits alone, small and capital alike.
_DOMAINNET_LISTS = sorted(DOMAINNET, key=plain)

#: Published splits by name: ``data.classes: office31_universal``.
PUBLISHED: dict[str, PublishedSplit] = {
    "office31_partial": PublishedSplit(
        ClassSplit(_UAN[:10], _UAN[10:]), "partial", "PADA, SAN, BA3US, GLC, LEAD",
        note="PADA, SAN and BA3US keep alphabetical ids; the classes are the same",
    ),
    "office31_open": PublishedSplit(
        ClassSplit(_UAN[:10], [], _UAN[20:]), "open", "GLC, LEAD",
        note="the ten classes in common with Caltech-256 are known; not the classes of office31_open_alphabetical",
    ),
    "office31_open_alphabetical": PublishedSplit(
        ClassSplit(_OFFICE31[:10], [], _OFFICE31[20:]), "open", "OSBP, STA, ROS",
        note="the first ten names of the alphabet are known, the last eleven unknown",
    ),
    "office31_open_20": PublishedSplit(
        ClassSplit(_OFFICE31[:20], [], _OFFICE31[20:]), "open", "OSBP in the Transfer-Learning-Library",
        note="the first twenty names of the alphabet are known: an easier task than office31_open_alphabetical",
    ),
    "office31_universal": PublishedSplit(
        _cut(_UAN, 10, 10, 11), "universal", "UAN, CMU, DANCE, DCC, OVANet, UniOT, GLC, LEAD"
    ),
    "office_home_partial": PublishedSplit(_cut(_HOME, 25, 40, 0), "partial", "PADA, BA3US, GLC, LEAD"),
    "office_home_open": PublishedSplit(
        _cut(_HOME, 25, 0, 40), "open", "ROS, OVANet, GLC, LEAD",
        note="DANCE's own open-set config shares 15 classes, which is another protocol",
    ),
    "office_home_universal": PublishedSplit(
        _cut(_HOME, 10, 5, 50), "universal", "CMU, DCC, OVANet, UniOT, GLC, LEAD",
        note="some lists sort TV last of the Ts: it is target-private either way",
    ),
    "visda_partial": PublishedSplit(_cut(_VISDA, 6, 6, 0), "partial", "PADA, DANCE, LEAD"),
    "visda_open": PublishedSplit(
        _cut(_VISDA, 6, 0, 6), "open", "GLC, LEAD", note="not the known classes of OSBP: see visda_open_osbp",
    ),
    "visda_open_osbp": PublishedSplit(ClassSplit(_VISDA_OSBP, [], _REST), "open", "OSBP"),
    "visda_universal": PublishedSplit(_cut(_VISDA, 6, 3, 3), "universal", "DANCE, DCC, OVANet, UniOT, GLC, LEAD"),
    "domainnet_universal": PublishedSplit(
        _cut(_DOMAINNET_LISTS, 150, 50, 145), "universal", "CMU, DCC, UniOT",
        note="painting, real and sketch, in the order of the data set's own lists",
    ),
    "domainnet_universal_capitals": PublishedSplit(
        _cut(DOMAINNET, 150, 50, 145), "universal", "GLC, LEAD",
        note="the three names with capitals sort first: three known classes and three of each private set are others",
    ),
}  # fmt: skip


def published(name: str) -> ClassSplit:
    """The classes of a published split.

    Raises:
        UDAError: unknown, with the nearest names.
    """
    if name not in PUBLISHED:
        raise UDAError(f"data.classes: no published split {name!r}. {nearest(name, PUBLISHED)}")
    return PUBLISHED[name].split
