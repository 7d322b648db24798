"""Label-set settings: class splits by name, by number and as published, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import uda
from uda.data import Arrays, ClassSplit, DataModule, Datasets, Digits, Generated
from uda.data.class_splits import PUBLISHED
from uda.data.domainnet_names import DOMAINNET
from uda.data.settings import ClassCounts, as_split
from uda.discovery import registry
from uda.metrics.names import HEADLINES, LABEL_SETTINGS, MEASURES

NAMES = [str(i) for i in range(10)]


def digits(**given):
    return DataModule(Digits(n_rendered=60), "rendered", "handwritten", **given)


def test_counts_take_classes_in_order_or_by_seed():
    counts = ClassCounts(5, 2, 3)
    assert counts.of(NAMES) == ClassSplit(NAMES[:5], NAMES[5:7], NAMES[7:])
    drawn = [ClassCounts(5, 2, 3, seed).of(NAMES) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[2].known + drawn[2].source_private + drawn[2].target_private) == NAMES
    data = digits(classes={"known": 5, "source_private": 2, "target_private": 3})
    assert data.class_names == NAMES[:7]
    assert data.setting == "universal"
    y = data.task.target.eval.labels
    assert sorted(set(y.tolist())) == [0, 1, 2, 3, 4, 7, 8, 9]  # an id for each private class, from C on
    assert set(data.task["rendered"].train.labels.tolist()) == set(range(7))


@pytest.mark.parametrize(
    ("classes", "setting"),
    [
        ({"known": 10}, "closed"),
        ({"known": 6, "source_private": 4}, "partial"),
        ({"known": 6, "target_private": 4}, "open"),
        ({"known": 4, "source_private": 2, "target_private": 4}, "universal"),
    ],
)
def test_the_setting_is_that_of_the_classes(classes, setting):
    assert digits(classes=classes).setting == setting
    assert digits(classes=classes, setting=setting).setting == setting
    assert digits(classes=classes, setting="universal").setting == "universal"
    for other in {"closed", "partial", "open"} - {setting}:
        with pytest.raises(uda.UDAError, match=f"setting is '{other}'.*that is '{setting}'"):
            _ = digits(classes=classes, setting=other).task


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"setting": "opne"}, "open"),
        ({"classes": {"known": []}}, "empty"),
        ({"classes": {"known": 0}}, "at least 1"),
        ({"classes": {"known": 5, "source_private": ["7"]}}, "names or numbers"),
        ({"classes": {"known": ["1"], "seed": 3}}, "seed goes with numbers"),
        ({"classes": {"known": 8, "target_private": 3}}, "asks for 11 classes"),
        ({"classes": {"known": ["1", "2"], "source_private": ["2"]}}, "again in"),
        ({"classes": {"known": ["1"], "source_private": ["2"], "target_private": ["2"]}}, "no sample in the target"),
        ({"classes": {"known": ["1", "12"]}}, "'12'"),
        ({"classes": {"known": 3.0}}, "list of class names"),
        ({"classes": {"known": [["1", "2"]]}}, "list of class names"),
        ({"classes": {"known": None}}, "known is needed"),
        ({"classes": 5}, "known is needed"),
        ({"classes": "office31_univrsal"}, "office31_universal"),
        ({"classes": "visda_open"}, "which is not in"),
    ],
)
def test_refused(given, words):
    with pytest.raises(uda.UDAError, match=words):
        _ = digits(**given).task


def test_what_is_missing_is_told_apart(tmp_path):
    """A number where classes have names, one bare name, and a known class that the target lacks."""
    path, x = tmp_path / "d.npz", np.zeros((4, 2), dtype=np.float32)
    np.savez(path, a_x=x, a_y=[0, 1, 2, 0], b_x=x, b_y=[1, 2, 1, 2], classes=np.array(["cat", "cow", "dog"]))

    def made(**classes):
        return DataModule(Arrays(path, kind="features"), "a", "b", classes=classes).task

    assert made(known="Cow", source_private="cat").space.class_names == ["cow", "cat"]
    with pytest.raises(uda.UDAError, match=r"'1'.*Classes are named here.*known: 3"):
        made(known=[1, 2])
    with pytest.raises(uda.UDAError, match="'cat', which is not in target 'b'") as told:
        made(known=["cat", "cow"])
    assert "mean 'cat'" not in str(told.value)


def test_as_they_occur():
    """With a setting and no classes: ids come from the source alone, whatever the target has."""
    def data(private, known, setting="universal"):
        def rows(labels):
            return torch.utils.data.TensorDataset(torch.rand(len(labels), 3), torch.tensor(labels))

        reader = Datasets(source=rows([0, 1, 2, 0, 1, 2]), target=rows([*known, *private]))
        return DataModule(reader, "source", "target", setting=setting, batch_size=2)

    one = data([3, 4], [0, 1])
    assert (one.class_names, one.setting) == (["0", "1", "2"], "universal")
    assert one.task.space.source_private == ("2",)
    assert one.task.space.unknown == ("3", "4")
    assert len(one.task.target.train) == 4
    assert data([], [0, 2], "partial").class_names == ["0", "1", "2"]
    with pytest.raises(uda.UDAError, match="that is 'universal'"):
        _ = data([3], [0], "partial").task


def test_published_splits():
    universal = PUBLISHED["office31_universal"].split
    assert [len(universal.known), len(universal.source_private), len(universal.target_private)] == [10, 10, 11]
    assert universal.known[-1] == "projector"
    assert universal.target_private[0] == "pen"
    alphabetical = PUBLISHED["office31_open_alphabetical"].split
    assert alphabetical.known[:3] == ["back_pack", "bike", "bike_helmet"]
    assert alphabetical.target_private[:2] == ["phone", "printer"]
    assert PUBLISHED["office31_open"].split.known == universal.known != alphabetical.known
    assert PUBLISHED["office_home_universal"].split.source_private == [
        "Chair", "Clipboards", "Computer", "Couch", "Curtains",
    ]  # fmt: skip
    assert PUBLISHED["office_home_open"].split.known[-1] == "Fork"
    assert PUBLISHED["visda_universal"].split.target_private == ["skateboard", "train", "truck"]
    assert len(DOMAINNET) == len(set(DOMAINNET)) == 345
    assert sorted(DOMAINNET) == DOMAINNET
    sizes = {"office31": 31, "office_home": 65, "visda": 12, "domainnet": 345}
    for name, p in PUBLISHED.items():
        assert name.startswith(tuple(sizes))
        assert f"_{p.setting}" in name
        total = len(p.split.known + p.split.source_private + p.split.target_private)
        assert total <= next(n for k, n in sizes.items() if name.startswith(k))
        assert p.used_by


def test_domainnet_has_two_orders():
    """The data set's own lists count by letters alone, and number the capitals' classes 308 to 310."""
    lists, capitals = (PUBLISHED[n].split for n in ("domainnet_universal", "domainnet_universal_capitals"))
    order = lists.known + lists.source_private + lists.target_private
    assert order[:2] == ["aircraft_carrier", "airplane"]
    assert order.index("The_Eiffel_Tower") == 308
    assert order.index("t-shirt") == 327
    assert order.index("cello") < order.index("cell_phone")
    assert sorted(order) == DOMAINNET == capitals.known + capitals.source_private + capitals.target_private
    assert set(capitals.known) - set(lists.known) == set(DOMAINNET[:3])
    assert set(lists.known) - set(capitals.known) == {"horse", "hospital", "hot_air_balloon"}


def test_the_page_lists_the_published_splits():
    page = (Path(__file__).resolve().parents[2] / "docs" / "settings.md").read_text()
    starts = tuple(f"| `{data}_" for data in ("office31", "office_home", "visda", "domainnet"))
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith(starts)}
    assert rows.keys() == {f"`{n}`" for n in PUBLISHED}
    for name, p in PUBLISHED.items():
        counts = " / ".join(str(len(c)) for c in (p.split.known, p.split.source_private, p.split.target_private))
        assert rows[f"`{name}`"] == f"| `{name}` | {counts} | {p.used_by} | {p.note} |"


def test_names_are_found_in_other_spellings():
    class Office(Generated):
        def read(self, domain):
            found = super().read(domain)
            found.class_names = ["Alarm Clock", "TV"]
            return found

    split = {"known": ["alarm_clock"], "target_private": ["tv"]}
    data = DataModule(Office(), "source", "target", classes=split)
    assert data.class_names == ["Alarm Clock"]
    assert data.task.space.unknown == ("TV",)


def test_every_setting_has_a_headline():
    assert set(HEADLINES) == set(LABEL_SETTINGS) == set(uda.plugin.SETTINGS[:4])
    assert set(HEADLINES.values()) <= set(MEASURES)
    assert as_split("visda_open").known[0] == "aeroplane"


# ----------------------------------------------------------------------------- methods and settings


class Closed(uda.Plugin):
    """A method of the closed set."""


class Universal(uda.Plugin):
    """A method for universal adaptation."""

    settings = ("open", "universal")


def fit(quiet_trainer, plugins, **given):
    data = DataModule(Generated("blobs", classes=4), "source", "target", batch_size=8, epoch_steps=1, seed=0, **given)
    quiet_trainer(max_epochs=1).fit(uda.UDA("mlp", plugins, bottleneck=4), data)


def test_methods_are_refused_with_the_settings_that_they_serve(quiet_trainer):
    names = DataModule(Generated("blobs", classes=4), "source", "target").class_names
    wide = {"classes": {"known": names[:-1], "target_private": names[-1:]}}
    partial = {"classes": {"known": names[:-1], "source_private": names[-1:]}}
    with pytest.raises(uda.UDAError, match=r"'a' \(Closed\).*'open'.*serves closed.*Reject"):
        fit(quiet_trainer, {"a": Closed()}, **wide)
    with pytest.raises(uda.UDAError, match=r"'u' \(Universal\).*'partial'.*open, universal"):
        fit(quiet_trainer, {"u": Universal()}, **partial)
    with pytest.raises(uda.UDAError, match="'closed'"):
        fit(quiet_trainer, {"u": Universal()})
    fit(quiet_trainer, {"a": Closed(), "r": uda.Reject()}, **wide)
    fit(quiet_trainer, {"u": Universal()}, setting="universal", **partial)
    fit(quiet_trainer, {"a": Closed()}, any_method=True, **partial)
    fit(quiet_trainer, {}, **wide)


def universal_methods() -> list[str]:
    """Methods for unknown classes that train with the source at hand, on rows of features."""
    homes, images = ("uda-universal", "uda-openset"), ("ROS", "UniAM")  # these two take images alone
    found = registry().plugins.values()
    mine = [f for f in found if f.distribution in homes and f.name not in images]
    return sorted(f.name for f in mine if "source-free" not in f.cls.settings)


def private_labels_choose_no_weight(plugins, tmp_path, quiet_trainer):
    """Train twice, the second time with the labels of the target-private samples exchanged."""
    draw = np.random.default_rng(0)
    y = {"a": np.arange(60) % 4, "b": np.concatenate([np.arange(40) % 3, np.full(10, 4), np.full(10, 5)])}
    x = {d: draw.normal(size=(60, 6)).astype(np.float32) + 2 * np.eye(6)[y[d]] for d in y}
    weights = []
    for turn in range(2):
        path = tmp_path / f"{turn}.npz"
        np.savez(path, a_x=x["a"], b_x=x["b"], **{f"{d}_y": v for d, v in y.items()}, classes=np.array(list("stuvwx")))
        classes = {"known": list("stu"), "source_private": ["v"], "target_private": list("wx")}
        data = DataModule(Arrays(path, kind="features"), "a", "b", batch_size=8, epoch_steps=3, seed=0, classes=classes)
        torch.manual_seed(0)
        model = uda.UDA("mlp", plugins(), bottleneck=8)
        quiet_trainer(max_epochs=2).fit(model, data)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        y["b"][40:] = draw.permutation(y["b"][40:])  # private samples change places among the private classes
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_private_labels_choose_no_weight(tmp_path, quiet_trainer):
    private_labels_choose_no_weight(lambda: {"r": uda.Reject()}, tmp_path, quiet_trainer)


def test_private_labels_to_anything_choose_no_weight(tmp_path, quiet_trainer):
    """Classes as they occur: private samples may be called a new class, a known one, or none of the target at all."""
    draw = np.random.default_rng(0)
    y = {"a": np.arange(60) % 4, "b": np.concatenate([np.arange(40) % 3, np.full(20, 4)])}
    x = {d: draw.normal(size=(60, 6)).astype(np.float32) + 2 * np.eye(6)[y[d]] for d in y}
    weights = []
    for private in (4, 5, 0, 3, None):
        target = {} if private is None else {"b_y": np.where(y["b"] == 4, private, y["b"])}
        np.savez(tmp_path / f"{private}.npz", a_x=x["a"], a_y=y["a"], b_x=x["b"], **target)
        reader = Arrays(tmp_path / f"{private}.npz", kind="features")
        data = DataModule(reader, "a", "b", batch_size=8, epoch_steps=3, seed=0, setting="universal")
        torch.manual_seed(0)
        model = uda.UDA("mlp", {"r": uda.Reject(split=True)}, bottleneck=8)
        quiet_trainer(max_epochs=2).fit(model, data)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    for other in weights[1:]:
        assert all(torch.equal(v, other[k]) for k, v in weights[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", universal_methods())
def test_private_labels_choose_no_weight_of(name, tmp_path, quiet_trainer):
    private_labels_choose_no_weight(lambda: {"m": name}, tmp_path, quiet_trainer)


@pytest.mark.slow
@pytest.mark.parametrize("name", universal_methods())
def test_no_method_knows_its_setting(name, quiet_trainer):
    """Of the same label sets, the same weights, whatever setting the task says it is of."""
    weights = []
    for setting in ("closed", "universal"):
        data = DataModule(
            Generated("blobs", classes=3, n=60), "source", "target", setting=setting, any_method=True, batch_size=8,
            epoch_steps=3, seed=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = uda.UDA("mlp", {"m": name}, bottleneck=8)
        quiet_trainer(max_epochs=1).fit(model, data)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
