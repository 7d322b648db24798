"""``uda report`` on tiny runs: what the page says, that it stands alone, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import uda
from uda.cli import main
from uda.report.collect import Outcome, Run, evaluate, read_run, short_names
from uda.report.collect.images import picture
from uda.report.sections import Report
from uda.report.sections.mistakes import mistakes_of
from uda.report.sections.shares import estimated_priors
from uda.run.history import ObjectiveMeans, read_history, write_history

CONFIG = {
    "model": {
        "backbone": "mlp",
        "bottleneck": 8,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    },
    "data": {
        "reader": {"class_path": "Generated", "init_args": {"n": 80}},
        "source": "source", "target": "target", "batch_size": 16, "epoch_steps": 6, "source_val_fraction": 0.3,
    },
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 2},
}  # fmt: skip
DANN = {"align": {"class_path": "DANN", "init_args": {"hidden": 8}}}
VOID = {"meta", "link", "img", "br", "path", "use", "image"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps text, attributes and ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID - {"path", "use", "image"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a toy task, the second with another logger setting and a plugin; one of images with few labels."""
    folder = tmp_path_factory.mktemp("runs")
    for name, plugins, logger in (("plain", None, True), ("dann", DANN, False)):
        config = {**CONFIG, "model": {**CONFIG["model"], "plugins": plugins or {}}}
        config["trainer"] = {**CONFIG["trainer"], "logger": logger}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", str(folder / f"{name}.yaml"), "--run_dir", str(folder / name / "seed0")]) == 0
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(90) % 3)
    x = rng.uniform(0, 1, (90, 1, 8, 8)).astype(np.float32) * 0.7
    x[np.arange(90), 0, 2 * y] += 0.3
    np.savez(folder / "images.npz", labelled_x=x, labelled_y=y, bare_x=x[:40])
    reader = {"class_path": "Arrays", "init_args": {"path": str(folder / "images.npz")}}
    data = {**CONFIG["data"], "reader": reader, "source": "labelled", "target": "bare"}
    config = {**CONFIG, "data": data, "model": {**CONFIG["model"], "backbone": "small_cnn"}}
    (folder / "bare.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "bare.yaml"), "--run_dir", str(folder / "bare")]) == 0
    return folder


def made(*argv: object) -> Page:
    words = [str(a) for a in argv]
    assert main(["report", *words]) == 0
    html = Path(words[words.index("--out") + 1]).read_text()
    assert not re.search(r"https?:|<script|@import|url\((?!#)", html)
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        if tag in ("img", "svg"):
            assert attributes.get("alt") or attributes.get("aria-label")
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "colgroup")
    anchors = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert anchors <= set(page.ids)
    return page


@pytest.mark.slow
def test_a_run_keeps_its_objectives_without_a_logger(runs: Path) -> None:
    rows = read_history(runs / "dann" / "seed0")
    assert [r["step"] for r in rows] == [6, 12, 18]
    assert {"train/classification", "train/align/domain", "select/im", "source_accuracy"} <= set(rows[0])
    assert not (runs / "dann" / "seed0" / "logs").exists()
    # with a logger, the history holds the mean of what metrics.csv holds line by line
    run = read_run(runs / "plain" / "seed0")
    steps, values = run.objectives["classification"]
    assert steps.tolist() == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    means = [r["train/classification"] for r in run.history]
    assert means == pytest.approx(values.reshape(3, 3).mean(1).tolist())


def test_means_and_history_files(tmp_path: Path) -> None:
    means = ObjectiveMeans()
    means.add({"a": torch.tensor(1.0), "b": 4})
    means.add({"a": torch.tensor(2.0)})
    assert means.take() == {"a": 1.5, "b": 4.0}
    assert means.take() == {}
    write_history(tmp_path, [{"step": 1, "a": 1.5, "b": float("nan")}])
    assert json.loads((tmp_path / "history.jsonl").read_text()) == {"step": 1, "a": 1.5, "b": None}
    assert np.isnan(read_history(tmp_path)[0]["b"])
    assert read_history(tmp_path / "none") == []


@pytest.mark.slow
def test_one_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "page.html"
    drawn = runs / "plain" / "seed0" / "memory" / "held.png"  # as a method leaves one
    drawn.parent.mkdir()
    Image.new("RGB", (4, 4)).save(drawn)
    page = made(runs / "plain" / "seed0", "--out", out, "--format", "svg", "--max_samples", "20")
    assert [a["alt"] for t, a in page.tags if t == "img"] == ["memory/held.png"]
    summary = json.loads((runs / "plain" / "seed0" / "summary.json").read_text())
    for kind in ("target_accuracy", "target_class_accuracy"):
        for value in summary[kind].values():
            assert f" {100 * value:.1f} " in page.text
    for words in ("source → target: source only", "selected by transfer_score", "oracle", "target labels",
                  "Learning curves", "classification", "Label-free scores", "t-SNE", "20 source images", "BBSE", "ATC",
                  "The inputs are no images", "Pictures of the method", "Where this comes from",
                  summary["config_hash"]):  # fmt: skip
        assert words in page.text, words
    names = {p.stem for p in (tmp_path / "page_figures").iterdir()}
    assert names >= {
        "accuracy", "objective-classification",
        "score-im", "confusion", "classes", "embedding-domains", "embedding-classes",
        "embedding-errors", "reliability", "shares",
    }  # fmt: skip
    # nothing is overwritten without a word
    assert main(["report", str(runs / "plain" / "seed0"), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    before = out.read_text()
    assert main(["report", str(runs / "plain" / "seed0"), "--out", str(out), "--force", "--checkpoint", "none"]) == 0
    assert out.read_text() != before


@pytest.mark.slow
def test_several_runs_side_by_side(runs: Path, tmp_path: Path) -> None:
    page = made(runs / "plain" / "seed0", runs / "dann" / "seed0", "--out", tmp_path / "x.html", "--embedding", "pca")
    for words in ("2 runs", "model.plugins.align.hidden", "trainer.logger", "On the same 80 target images",
                  "plain, target", "first two principal components", "align/domain"):  # fmt: skip
        assert words in page.text, words
    alts = [a["aria-label"] for t, a in page.tags if t == "svg"]
    assert any(a.startswith("align/domain over training steps: dann from") for a in alts)
    assert sum("Confusion matrix" in a for a in alts) == 2


@pytest.mark.slow
def test_an_unlabelled_target_leaves_label_parts_out(runs: Path, tmp_path: Path) -> None:
    page = made(runs / "bare", "--out", tmp_path / "x.html", "--embedding", "none", "--checkpoint", "selected")
    assert page.text.count("The target has no labels") >= 4
    assert "Target accuracy as estimated without labels: ATC" in page.text
    assert "weakest class" not in page.text
    assert not any("Confusion" in a.get("aria-label", "") for _, a in page.tags)
    assert main(["report", str(runs / "bare"), "--out", str(tmp_path / "y.html"), "--checkpoint", "oracle"]) == 2


@pytest.mark.slow
def test_the_model_says_again_what_the_run_wrote(runs: Path) -> None:
    run = read_run(runs / "dann" / "seed0")
    evaluate(run, "last", "cpu")
    assert run.target.accuracy == pytest.approx(run.summary["target_accuracy"]["last"], abs=1e-6)
    assert run.sources[0].accuracy == pytest.approx(run.summary["source_accuracy"], abs=1e-6)
    assert run.checkpoint_step == run.summary["steps"] == 18
    assert run.source_prior == pytest.approx([0.5, 0.5])
    evaluate(run, "selected", "cpu")
    assert run.target.accuracy == pytest.approx(run.summary["target_accuracy"]["selected"], abs=1e-6)
    best = run.row_of("oracle")
    assert best["oracle/target_accuracy"] == pytest.approx(run.summary["target_accuracy"]["oracle"], abs=1e-6)


@pytest.mark.slow
def test_worst_mistakes_are_shown_as_pictures(runs: Path, tmp_path: Path) -> None:
    run = read_run(runs / "bare")
    evaluate(run, "last", "cpu")
    run.target.y[:] = (run.target.label + 1) % 3  # all wrong
    report = Report([run], mistakes=7)
    html = mistakes_of(report, 0, run)
    best = int(run.target.score.argmax())
    assert html.count("<img") == 7
    assert html.index(f"bare/{best}:") == html.index("bare/")
    assert [p.name for p in report.plots] == ["mistakes"]
    assert picture(torch.full((1, 2, 2), 0.5)).tolist() == [[[128] * 3] * 2] * 2


def test_priors_find_a_known_shift() -> None:
    rng = np.random.default_rng(0)

    def domain(name: str, share: float, n: int) -> Outcome:
        y = (rng.uniform(size=n) < share).astype(np.int64)
        p = 1 / (1 + np.exp(-(3 * (2 * y - 1) + 2 * rng.normal(size=n)) * 1.5))  # log odds of two unit Gaussians
        probs = np.stack([1 - p, p], 1)
        return Outcome(name, name == "t", probs, probs, probs.argmax(1), probs.max(1), y, [])

    run = Run("r", Path(), {}, {}, {}, [], {}, class_names=["a", "b"])
    run.outcomes, run.source_prior = [domain("s", 0.5, 4000), domain("t", 0.85, 4000)], np.array([0.5, 0.5])
    found, why = estimated_priors(run)
    assert why == []
    assert {k: round(v[1], 2) for k, v in found.items()} == {
        "BBSE": pytest.approx(0.85, abs=0.03), "MLLS": pytest.approx(0.85, abs=0.03),
    }  # fmt: skip


@pytest.mark.slow
def test_slips(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = str(runs / "plain" / "seed0")
    for words, told in (
        ([str(runs / "plain")], "seed0"),
        ([str(tmp_path / "none")], "no such directory"),
        ([plain, plain], "named twice"),
        ([plain, "--max_samples", "-1"], "negative"),
        ([plain, "--out", str(tmp_path)], "is a directory"),
    ):
        assert main(["report", *words]) == 2
        assert told in capsys.readouterr().err, words
    run = read_run(plain)
    run.history[1]["oracle/target_accuracy"] = 2.0  # an epoch whose checkpoint was not kept
    if run.summary["selection"]["step"] != run.history[1]["step"]:
        with pytest.raises(uda.UDAError, match="save_top_k"):
            evaluate(run, "oracle")


@pytest.mark.parametrize("text", ['{"steps": ', "[1]"])
def test_a_damaged_run_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text("data: {}")
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(uda.UDAError, match="run it again"):
        read_run(tmp_path)


def test_names_are_what_differs() -> None:
    assert short_names([Path("/r/a/seed0"), Path("/r/b/seed0")]) == ["a", "b"]
    assert short_names([Path("/r/a/seed0"), Path("/r/a/seed1")]) == ["seed0", "seed1"]
    assert short_names([Path("/r/a/seed0")]) == ["a/seed0"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from uda.cli import main\ntry: main(['report', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
