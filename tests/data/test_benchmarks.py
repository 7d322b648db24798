from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from uda.data import ImageFolders, benchmarks, hub
from uda.errors import UDAError

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.fixture
def small(monkeypatch):
    """PACS with few images."""
    known = benchmarks.BENCHMARKS["pacs"]
    counts = dict.fromkeys(known.domains, 7)
    few = benchmarks.Benchmark(**{**vars(known), "domains": counts})
    monkeypatch.setitem(benchmarks.BENCHMARKS, "pacs", few)
    return few


@pytest.fixture
def copy(small, tmp_path, make_image):
    for d, domain in enumerate(small.domains):
        for c, name in enumerate(CLASSES):
            make_image(tmp_path / "pacs" / domain / name / "1.png", 10 * d + c)
    return tmp_path / "pacs"


def test_every_entry_can_be_shown():
    for name, known in benchmarks.BENCHMARKS.items():
        assert known.name == name
        assert known.title in known.summary
        assert not known.class_names or len(set(known.class_names)) == known.classes
        assert set(known.optional) <= set(known.domains)
        text = known.describe()
        assert all(domain in text for domain in known.domains)
        assert known.source in text


def test_totals_are_the_published_ones():
    totals = {n: sum(b.domains.values()) for n, b in benchmarks.BENCHMARKS.items()}
    assert totals["office31"] == 4110
    assert totals["office_home"] == 15588
    assert totals["pacs"] == 9991
    assert totals["domainnet"] == 409_832 + 176_743
    assert totals["office_caltech10"] == 2533


def test_a_complete_copy(small, copy):
    report = benchmarks.check("pacs", copy)
    assert report.complete
    assert list(report) == [] == list(small.check(copy))
    assert report.counts["photo"] == dict.fromkeys(sorted(CLASSES), 1)
    assert "photo: 7 images, 7 classes" in str(report)


def test_problems_are_named(copy, make_image):
    (copy / "photo" / "dog" / "1.png").write_bytes(b"")
    (copy / "cartoon" / "horse" / "1.png").unlink()
    make_image(copy / "art_painting" / "dog" / "2.png", 0)
    (copy / "sketch").rename(copy / "drawing")
    problems = list(benchmarks.check("pacs", copy))
    for text in (
        "domain 'sketch' is missing",
        "domain 'cartoon' has 6 classes, expected 7",
        "domain 'cartoon' lacks class horse",
        "domain 'cartoon' has 6 images, expected 7",
        "domain 'art_painting' has 8 images, expected 7",
        "photo/dog/1.png' is no readable image",
    ):
        assert any(text in p for p in problems), text
    assert len(problems) == 6


def test_spelling_of_folders_and_the_images_folder(tmp_path, make_image, monkeypatch):
    known = benchmarks.BENCHMARKS["office31"]
    few = {**vars(known), "domains": {"amazon": 31}, "class_names": known.class_names}
    monkeypatch.setitem(benchmarks.BENCHMARKS, "office31", benchmarks.Benchmark(**few))
    for name in known.class_names:
        make_image(tmp_path / "Amazon" / "images" / name / "1.png", 0)
    assert benchmarks.check("office31", tmp_path).complete
    assert len(ImageFolders(tmp_path, "images").read("Amazon").class_names) == 31
    with pytest.raises(UDAError, match="check subfolder"):
        ImageFolders(tmp_path, "pictures").read("Amazon")


def test_array_files(tmp_path):
    y = np.arange(958) % 10
    np.savez(tmp_path / "f.npz", amazon_x=np.ones((958, 3)), amazon_y=y, dslr_x=np.ones((9, 3)), dslr_y=y[:9])
    problems = list(benchmarks.check("office_caltech10", tmp_path / "f.npz"))
    assert not any("'amazon'" in p for p in problems)
    assert "domain 'webcam' is missing" in problems
    assert "domain 'dslr' has 9 images, expected 157" in problems


def test_unknown_names_and_places(tmp_path):
    with pytest.raises(UDAError, match=r"unknown benchmark 'ofice31'.*'office31'"):
        benchmarks.check("ofice31", tmp_path)
    with pytest.raises(UDAError, match="does not exist"):
        benchmarks.check("pacs", tmp_path / "none")
    with pytest.raises(UDAError, match=r"no known copy to download; get it from the authors' page"):
        benchmarks.download("office31", tmp_path)


def test_download_needs_its_packages(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UDAError, match=r"huggingface_hub.*pip install 'uda-lightning\[hub\]'"):
        benchmarks.download("pacs", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UDAError, match="pyarrow"):
        hub.unpack(str(tmp_path), str(tmp_path))


class Hub:
    """Stands in for huggingface_hub."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def snapshot_download(self, repository, **kwargs):
        self.asked.append((repository, kwargs["repo_type"]))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_download_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(ConnectionError("no route")))
    with pytest.raises(
        UDAError, match=r"cannot download 'flwrlabs/pacs'.*ConnectionError: no route.*network"
    ):
        benchmarks.download("pacs", tmp_path)


def test_download_unpacks_what_the_hub_gives(monkeypatch, tmp_path, small):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra hub)")
    import pyarrow.parquet as pq

    rows = {"image": [], "domain": [], "label": []}
    for d, domain in enumerate(small.domains):
        for c in range(7):
            content = io.BytesIO()
            Image.new("RGB", (5, 5), (d, c, 0)).save(content, "PNG" if c else "JPEG")
            rows["image"].append({"bytes": content.getvalue(), "path": "x.png"})
            rows["domain"].append(domain)
            rows["label"].append(c)
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "domain": {"dtype": "string"}}
    table = pa.table(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "snapshot" / "data" / "train-00000.parquet")
    stand_in = Hub(tmp_path / "snapshot")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    assert str(tmp_path / "pacs") in small.download(tmp_path / "pacs")
    assert stand_in.asked == [("flwrlabs/pacs", "dataset")]
    assert benchmarks.check("pacs", tmp_path / "pacs").complete
    assert ImageFolders(tmp_path / "pacs").read("photo").class_names == CLASSES
    assert hub.unpack(str(tmp_path / "snapshot"), str(tmp_path / "pacs")) == 28
    pq.write_table(table.drop_columns(["domain"]), tmp_path / "snapshot" / "data" / "train-00000.parquet")
    with pytest.raises(UDAError, match=r"not \['domain'\]"):
        benchmarks.download("pacs", tmp_path / "other")
