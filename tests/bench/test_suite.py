from __future__ import annotations

import pytest
import yaml

from uda.bench.merge import content_hash, expanded, folded, merged, with_overrides
from uda.bench.suite import Suite
from uda.errors import UDAError


def test_mappings_join_and_another_class_replaces_its_arguments():
    below = {"a": {"x": 1, "y": [1, 2]}, "reader": {"class_path": "A", "init_args": {"n": 1}}}
    assert merged(below, {"a": {"y": [3]}}) == {**below, "a": {"x": 1, "y": [3]}}
    assert merged(below, {"reader": {"init_args": {"m": 2}}})["reader"]["init_args"] == {"n": 1, "m": 2}
    assert merged(below, {"reader": {"class_path": "B"}})["reader"] == {"class_path": "B"}


def test_dotted_keys_may_leave_out_init_args():
    config = {"model": {"plugins": {"align": {"class_path": "DANN"}}, "backbone": "small_cnn"}}
    out = with_overrides(config, {"model.plugins.align.weight": 0.3, "model.backbone.in_channels": 3, "a.b": 1})
    assert out["model"]["plugins"]["align"] == {"class_path": "DANN", "init_args": {"weight": 0.3}}
    assert out["model"]["backbone"] == {"class_path": "small_cnn", "init_args": {"in_channels": 3}}
    assert out["a"] == {"b": 1}
    assert "init_args" not in config["model"]["plugins"]["align"]  # the original is left alone
    with pytest.raises(UDAError, match=r"'trainer.max_epochs' is 3"):
        with_overrides({"trainer": {"max_epochs": 3}}, {"trainer.max_epochs.x": 1})


def test_variables_come_from_the_environment_and_go_back(monkeypatch):
    monkeypatch.setenv("FOLDER", "/somewhere")
    used: dict[str, str] = {}
    text = {"path": "${FOLDER}/x.npz", "other": ["${MISSING:-here}/y"]}
    out = expanded(text, used)
    assert out == {"path": "/somewhere/x.npz", "other": ["here/y"]}
    assert folded(out, used) == text
    with pytest.raises(UDAError, match="MISSING is not set"):
        expanded("${MISSING}")


def test_the_hash_sees_what_changes_a_result_and_nothing_else():
    config = {"model": {"a": 1}, "trainer": {"max_epochs": 3}, "data": {"batch_size": 4}}
    same = {
        **config,
        "trainer": {"max_epochs": 3, "logger": False},
        "data": {"num_workers": 4, "batch_size": 4},
    }
    assert content_hash(config) == content_hash(same)
    assert content_hash(config) != content_hash({**config, "trainer": {"max_epochs": 4}})


def test_ignored_settings_are_those_that_a_run_ignores_too():
    from uda.bench.merge import _NO_EFFECT
    from uda.run.summary import _MACHINE
    from uda.run.summary import _NO_EFFECT as OF_A_RUN

    assert _NO_EFFECT["trainer"] <= OF_A_RUN
    assert _NO_EFFECT["data"] <= _MACHINE


def test_runs_are_seeds_by_tasks_by_methods_and_layers_lie_in_order(load):
    suite = load(overrides={"trainer.max_epochs": 2, "data.batch_size": 8},
                 methods={"plain": {}, "long": {"overrides": {"trainer.max_epochs": 5}}})  # fmt: skip
    runs = suite.runs()
    assert [r.label for r in runs[:5]] == [
        "a->b/plain/0",
        "a->b/long/0",
        "b->a/plain/0",
        "b->a/long/0",
        "a->b/plain/1",
    ]
    assert len({r.key for r in runs}) == 8
    assert runs[0].config["trainer"]["max_epochs"] == 2
    assert runs[1].config["trainer"]["max_epochs"] == 5
    assert runs[2].config["data"]["source"] == "b"
    forced = Suite.load(suite.runs_dir.parent / "toy.yaml", {"trainer.max_epochs": 9})
    assert {r.config["trainer"]["max_epochs"] for r in forced.runs()} == {9}


def test_plugins_of_a_method_are_all_it_has(write_suite, tmp_path):
    path = write_suite()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": {"plugins": {"old": {"class_path": "MCC"}}}}))
    suite = Suite.load(path)
    assert list(suite.config("a->b", "dann")["model"]["plugins"]) == ["align"]
    assert list(suite.config("a->b", "plain")["model"]["plugins"]) == ["old"]


def test_methods_may_stand_in_a_file_of_their_own_and_name_configs_alone(load, tmp_path):
    (tmp_path / "shared").mkdir()
    align = {"align": {"class_path": "DANN"}}
    (tmp_path / "dann.yaml").write_text(yaml.safe_dump({"model": {"plugins": align}}))
    (tmp_path / "mcc.yaml").write_text(yaml.safe_dump({"model": {"plugins": {"refine": {"class_path": "MCC"}}}}))
    listed = {
        "plain": {}, "dann": "../dann.yaml", "both": ["../dann.yaml", "../mcc.yaml"],
        "weak": {"config": "../dann.yaml", "overrides": {"model.plugins.align.weight": 0.1}},
    }  # fmt: skip
    (tmp_path / "shared" / "methods.yaml").write_text(yaml.safe_dump(listed))
    suite = load(methods="shared/methods.yaml")
    assert set(suite.methods) == set(listed)
    assert suite.config("a->b", "dann")["model"]["plugins"] == align
    assert list(suite.config("a->b", "both")["model"]["plugins"]) == ["align", "refine"]
    assert suite.config("a->b", "weak")["model"]["plugins"]["align"]["init_args"] == {"weight": 0.1}
    more = load(methods=["shared/methods.yaml", {"own": "dann.yaml"}])
    assert set(more.methods) == {*listed, "own"}
    (tmp_path / "shared" / "methods.yaml").write_text(yaml.safe_dump({"dann": "../dan.yaml"}))
    with pytest.raises(UDAError, match=r"dan\.yaml'\. Did you mean 'dann\.yaml'"):
        load(methods="shared/methods.yaml")


def test_variables_do_not_reach_the_key(load, monkeypatch):
    suite = load(overrides={"data.reader.path": "${FOLDER:-x}/d.npz"})
    before = [r.key for r in suite.runs()]
    monkeypatch.setenv("FOLDER", "/other")
    assert [r.key for r in suite.runs()] == before
    assert suite.runs()[0].expanded()[0]["data"]["reader"]["init_args"]["path"] == "/other/d.npz"


def test_only_takes_patterns_and_parts(load):
    suite = load()
    assert {r.method for r in suite.runs("dann")} == {"dann"}
    assert [r.label for r in suite.runs("a->b/*/1")] == ["a->b/plain/1", "a->b/dann/1"]
    with pytest.raises(UDAError, match="fits no run"):
        suite.runs("cdan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": {}}, "unknown key 'taks'. Did you mean 'tasks'"),
        ({"tasks": {}}, "at least one task"),
        ({"methods": {"a": {"plugin": {}}}}, "unknown key 'plugin'. Did you mean 'plugins'"),
        ({"methods": 3}, "must be a mapping"),
        ({"tasks": {"a->b": [1]}}, "task 'a->b' must be a mapping"),
        ({"overrides": [1]}, "overrides must be a mapping"),
        ({"methods": {"a": {"overrides": 3}}}, "methods.a.overrides must be a mapping"),
        ({"seeds": 3}, "seeds is a list of whole numbers"),
        ({"seeds": ["x"]}, "a whole number is needed, not 'x'"),
        ({"threads": "two"}, "threads: a whole number"),
        ({"methods": ["dann.yaml"]}, "no file"),
        ({"base": "bose.yaml"}, "Did you mean 'base.yaml'"),
        ({"methods": {"a": {}, "b": {"init_from": "aa"}}}, "methods.b.init_from: no method 'aa' in the suite. Did you"),
        ({"methods": {"a": {"init_from": "b"}, "b": {"init_from": {"x.y": ["a"]}}}}, "in a circle: a -> b -> a"),
        ({"methods": {"a": {"init_from": "a"}}}, "in a circle: a -> a"),
        ({"methods": {"a": {}, "b": {"init_from": {"x.y": []}}}}, "methods.b.init_from: name a method"),
        ({"methods": {"a": {}, "b": {"init_from": "a", "checkpoint": "best"}}}, "unknown checkpoint 'best'"),
        ({"methods": {"a": {"checkpoint": "last"}}}, "there is no init_from"),
        ({"methods": {"a": {"source": -1}}}, "methods.a.source: a whole number is needed"),
    ],
)
def test_a_slip_in_a_suite_is_named(load, changes, message):
    with pytest.raises(UDAError) as error:
        load(**changes)
    assert message in str(error.value)
