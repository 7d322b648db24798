"""The suites of ``configs/bench``: each lists its runs, names no folder of a machine, and its runs start."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from uda.bench.ledger import Ledger
from uda.bench.suite import Suite
from uda.cli import main

ROOT = Path(__file__).resolve().parents[2]
SUITES = {p.stem: p for p in sorted((ROOT / "configs" / "bench").glob("*.yaml"))}
BASIC = ["source_only", "dann", "cdan", "cdan_e", "mcc", "entropy", "information", "dann_mcc", "cdan_e_mcc"]
FEW_METHODS = ("digits_vit", "imbalanced", "multisource", "multisource_digits", "sourcefree", "sourcefree_digits",
               "universal_sourcefree")  # fmt: skip
SETTINGS = ("partial", "open", "universal")
TASKS = {
    "amazon": 6, "digits": 4, "domainnet": 30, "imbalanced": 6, "office31": 6, "office_caltech": 6, "office_home": 12,
    "pacs_features": 6, "pacs_images": 6, "selection_digits": 4, "selection_office_caltech": 6, "visda": 1,
    "partial": 6, "open": 6, "universal": 6, "multisource": 9, "multisource_digits": 5, "sourcefree": 6,
    "digits_partial": 3, "digits_open": 3, "digits_universal": 3,
    "office_caltech_partial": 6, "office_caltech_open": 6, "office_caltech_universal": 6, "text_universal": 3,
    "digits_splits_universal": 3, "pacs_images_partial": 6, "pacs_images_open": 6, "pacs_images_universal": 6,
    "digits_vit": 2, "sourcefree_digits": 2, "universal_sourcefree": 6,
}  # fmt: skip
IMAGES = {
    "office31": ["amazon", "dslr", "webcam"],
    "office_home": ["Art", "Clipart", "Product", "Real World"],
    "visda": ["train", "validation"],
    "domainnet": ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"],
}


def test_all_suites_are_known_here():
    assert set(SUITES) == set(TASKS)


@pytest.mark.parametrize("name", SUITES)
def test_suite_lists_its_runs(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "run", str(SUITES[name]), "--dry-run"]) == 0
    suite = Suite.load(SUITES[name])
    runs = suite.runs()
    assert suite.name == name
    if name.startswith("selection"):
        assert list(suite.methods) == BASIC
    elif (setting := name.rpartition("_")[2]) in SETTINGS:  # methods that cope, and two that do not as a warning
        assert set(suite.methods) >= {"source_only", "dann", "mcc"}
        assert {r.config["data"]["setting"] for r in runs} == {setting}
    elif name not in FEW_METHODS:
        assert set(suite.methods) >= set(BASIC)
        assert len(suite.methods) >= 40
    assert len(suite.tasks) == TASKS[name]
    expected = TASKS[name] * len(suite.methods) * len(suite.seeds)
    assert f"{expected} runs, 0 finished" in capsys.readouterr().out
    assert len({r.key for r in runs}) == expected


@pytest.mark.parametrize("name", SUITES)
def test_suite_holds_no_path_of_one_machine(name):
    assert not re.search(r"[\s:]/(work|home|root|mnt|data)/", SUITES[name].read_text())


def pictures(folder: Path, classes: int = 3, each: int = 4) -> None:
    draw = np.random.default_rng(0)
    for c in range(classes):
        for i in range(each):
            path = folder / f"class_{c}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 80, (24, 24, 3)) + 60 * c
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Generated images in the layout of a benchmark, where its suite looks for them."""

    def make(name: str) -> None:
        for domain in IMAGES[name]:
            pictures(tmp_path / name / domain)
            if name == "domainnet":
                found = sorted((tmp_path / name / domain).glob("*/*.jpg"))
                lines = [f"{p.relative_to(tmp_path / name)} {p.parent.name[-1]}" for p in found]
                (tmp_path / name / f"{domain}_train.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("UDA_SHARED_DATA", str(tmp_path))
        monkeypatch.chdir(tmp_path)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_image_suite_runs_on_a_stand_in(name, stand_in, capfd):
    stand_in(name)
    suite = Suite.load(SUITES[name])
    last = list(suite.tasks)[-1]
    words = [
        "model.backbone.pretrained=false", "data.views.size=32", "data.views.resize=36", "data.batch_size=3",
        "data.num_workers=0", "data.epoch_steps=1", "trainer.max_epochs=1", "trainer.accelerator=cpu",
    ]  # fmt: skip
    sets = [w for word in words for w in ("--set", word)]
    assert main(["bench", "run", str(SUITES[name]), "--only", f"{last}/cdan_e_mcc/0", *sets]) == 0, (
        capfd.readouterr().out
    )
    (line,) = Ledger(suite.ledger).read()
    assert line["status"] == "finished"
    assert set(line["config"]["model"]["plugins"]) == {"align", "refine"}
    assert line["metrics"]["target_class_accuracy"]["last"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amazon", "digits", "office_caltech", "pacs_features"])
def test_feature_suite_runs_on_the_real_data(name, shared_data, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("UDA_SHARED_DATA", str(shared_data.resolve()))
    monkeypatch.chdir(tmp_path)
    suite = Suite.load(SUITES[name])
    sets = ["--set", "trainer.max_epochs=1", "--set", "data.epoch_steps=3"]
    assert main(["bench", "run", str(SUITES[name]), "--only", "*/dann_mcc/0", *sets]) == 0, capfd.readouterr().out
    records = Ledger(suite.ledger).read()
    assert [r["task"] for r in records] == list(suite.tasks)
    assert all(r["status"] == "finished" and r["steps"] == 3 for r in records)
    assert str(shared_data.resolve()) not in suite.ledger.read_text()
    assert yaml.safe_dump(records[0]["config"]).count("UDA_SHARED_DATA") >= (name != "digits")
