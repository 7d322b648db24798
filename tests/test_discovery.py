"""Discovery: broken, clashing and outdated distributions, and names that are nearly right."""

from __future__ import annotations

from importlib import metadata

import pytest

import uda
from uda import discovery


class Entry:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, name, cls, distribution="third-party"):
        self.name, self.value, self._cls = name, f"pkg:{name}", cls
        self.dist = type("Dist", (), {"name": distribution, "version": "1.2"})()

    def load(self):
        if isinstance(self._cls, Exception):
            raise self._cls
        return self._cls


class First(uda.Plugin):
    """The first."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()


class Second(uda.Plugin):
    """The second."""

    settings = ("closed", "open")

    @uda.hookimpl
    def predict(self, model, batch):
        return None


class Outdated(uda.Plugin):
    hook_api = 99


@pytest.fixture
def installed(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(metadata, "entry_points", lambda group: list(entries))
        discovery.registry.cache_clear()
        return discovery.registry()

    yield install
    monkeypatch.undo()
    discovery.registry.cache_clear()


def test_found_plugins_say_what_they_are(installed):
    registry = installed(Entry("First", First), Entry("Second", Second, "other"))
    assert registry.plugins["Second"].row() == {
        "name": "Second", "class_path": f"{__name__}.Second", "distribution": "other", "version": "1.2",
        "hooks": ["predict"], "settings": ["closed", "open"], "summary": "The second.",
    }  # fmt: skip
    assert registry.get("First") is First
    assert registry.get(f"{__name__}.First") is First


def test_a_broken_distribution_is_warned_about_and_skipped(installed):
    with pytest.warns(UserWarning, match=r"skipped: third-party 1.2 .*ImportError: no module named nowhere"):
        registry = installed(Entry("First", First), Entry("Bad", ImportError("no module named nowhere")))
    assert list(registry.plugins) == ["First"]
    with pytest.raises(uda.UDAError, match=r"Unknown plugin 'Bad'.*could not be loaded"):
        registry.get("Bad")


def test_another_hook_api_is_skipped_with_the_reason(installed):
    with pytest.warns(UserWarning, match="built for hook API 99, this uda offers 1"):
        assert not installed(Entry("Outdated", Outdated)).plugins


def test_what_is_no_plugin_is_skipped(installed):
    with pytest.warns(UserWarning, match=r"no subclass of uda\.Plugin"):
        assert not installed(Entry("Thing", dict)).plugins


def test_two_distributions_with_one_name(installed):
    registry = installed(Entry("Same", First, "one"), Entry("Same", Second, "two"))
    with pytest.raises(uda.UDAError, match=r"offered by 2 .*First \(one\).*Second \(two\).*full class path"):
        registry.get("Same")
    assert registry.get(f"{__name__}.Second") is Second


def test_near_names(installed):
    installed(Entry("First", First))
    with pytest.raises(uda.UDAError, match=r"Unknown plugin 'Frist'. Did you mean 'First'"):
        discovery.make_plugin("Frist")
    with pytest.raises(uda.UDAError, match=r"no argument 'wight'. Did you mean 'weight'"):
        discovery.make_plugin({"class_path": "First", "init_args": {"wight": 2}})
    with pytest.raises(uda.UDAError, match="cannot be imported"):
        discovery.make_plugin("nowhere.Method")
    with pytest.raises(uda.UDAError, match=r"is no uda\.Plugin"):
        discovery.make_plugin("collections.OrderedDict")


def test_nothing_installed(installed):
    with pytest.raises(uda.UDAError, match="No plugin distribution is installed"):
        installed().get("DANN")
