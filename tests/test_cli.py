"""The command line: what it answers to slips, and what a run leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import uda
from uda.cli import COMMANDS, main, report, user_error
from uda.console import short_parser_error
from uda.discovery import Found, registry

CONFIG = {
    "model": {
        "backbone": "mlp",
        "bottleneck": 8,
        "plugins": {"align": {"class_path": "DANN", "init_args": {"hidden": 8}}},
    },
    "data": {
        "reader": {"class_path": "Generated", "init_args": {"n": 64}},
        "source": "source",
        "target": "target",
        "batch_size": 16,
        "epoch_steps": 3,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys; from uda.cli import main; assert main(['--help']) == 0; assert main(['--version']) == 0;"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert f"uda {uda.__version__}" in done.stdout


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture) -> None:
    assert main(["fti"]) == 2
    assert "'fit'" in capsys.readouterr().err


def test_a_user_error_is_found_behind_others(capsys: pytest.CaptureFixture) -> None:
    try:
        try:
            raise uda.UDAError("the cause")
        except uda.UDAError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        found = user_error(error)
    assert str(found) == "the cause"
    assert user_error(RuntimeError("other")) is None
    report(found)
    assert capsys.readouterr().err.strip() == "uda: error: the cause"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "tny.yaml"], ["tny.yaml", "tiny.yaml"]),
        (["tiny.yaml"], ["--config tiny.yaml"]),
        (["--config", "tiny.yaml", "--model.plugins.align.wieght=1"], ["DANN", "'wieght'", "'weight'"]),
        (["--config", "tiny.yaml", "--model.plugins.aling.weight=1"], ["'aling'", "'align'"]),
        (["--config", "tiny.yaml", "--model.plugins.align=DANNN"], ["'DANNN'", "'DANN'"]),
        (["--config", "tiny.yaml", "--model.botleneck=1"], ["'botleneck'", "'bottleneck'"]),
        (["--config", "tiny.yaml", "--model.optimizer.lr=1"], ["model.optimizer", "Name one first"]),
        (["--config", "tiny.yaml", "--model.schedule.gama=1"], ["InverseDecay", "'gamma'"]),
        (["--config", "tiny.yaml", "--model.schedule=Cosin"], ["'Cosine'"]),
        (["--config", "tiny.yaml", "--data.reader=Generatd"], ["'Generatd'", "'Generated'"]),
        (["--config", "tiny.yaml", "--data.reader.init_args.rotatoin=5"], ["Generated", "'rotation'"]),
        (["--config", "tiny.yaml", "--data.views=FeatureView"], ["'FeatureViews'"]),
        (
            ["--config", "tiny.yaml", "--data.views=uda.data.FeatureView"],
            ["cannot be imported", "FeatureViews"],
        ),
        (["--config", "tiny.yaml", "--data.reader=uda.data.FeatureViews"], ["is no Reader"]),
        (["--config", "tiny.yaml", "--data.sorce=x"], ["'sorce'", "'source'"]),
        (["--config", "tiny.yaml", "--trainer.max_epoch=2"], ["'max_epoch'", "'max_epochs'"]),
        (["--config", "tiny.yaml", "--batch_size=2"], ["data.batch_size"]),
        (["--config", "tiny.yaml", "--select_by=imm"], ["'imm'", "'im'"]),
        (["--config", "tiny.yaml", "--data.batch_size=abc"], ["data.batch_size", "int", "abc"]),
        (["--config", "tiny.yaml", "--data.target=targt"], ["'targt'", "'target'"]),
        (["--config", "tiny.yaml", "--ckpt_path=no.ckpt"], ["no.ckpt"]),
        (["--config", "tiny.yaml", "--ckpt_path=last"], ["--run_dir"]),
        (["--config", "tiny.yaml", "--model.bottleneck"], ["needs a value"]),
        (["--data.target=target"], ["--model.backbone", "--config FILE"]),
    ],
)
def test_a_slip_gets_a_short_answer(
    here: Path, capsys: pytest.CaptureFixture, words: list[str], told: list[str]
) -> None:
    assert main(["fit", *words]) == 2
    text = capsys.readouterr().err.split("uda: error: ")[1]
    assert all(t in text for t in told), text
    assert len(text.splitlines()) <= 3
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"modle": {}}, ["tiny.yaml", "'modle'", "'model'"]),
        ({"batch_size": 3}, ["data.batch_size"]),
        (
            {"model": {"backbone": "mlp", "plugins": {"a": {"class_path": "DANNN"}}}},
            ["tiny.yaml", "plugins.a", "'DANN'"],
        ),
        (
            {"model": {"plugins": {"a": {"class_path": "MCC", "init_args": {"wight": 1}}}}},
            ["MCC", "'wight'", "'weight'"],
        ),
        ({"model": {"plugins": {"a": {"class_path": "MCC", "weight": 1}}}}, ["'weight'", "init_args"]),
        ({"model": {"plugins": {"a": {"weight": 1}}}}, ["class_path is missing"]),
        (
            {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lrr": 1}}}},
            ["SGD", "'lr'"],
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "LearningRateMonitr"}]}},
            ["callbacks[0]", "LearningRateMonitor"],
        ),
        ({"data": 3}, ["data", "mapping"]),
    ],
)
def test_a_slip_in_a_config_names_file_and_place(
    here: Path, capsys: pytest.CaptureFixture, change: dict, told: list[str]
) -> None:
    (here / "tiny.yaml").write_text(yaml.safe_dump({**CONFIG, **change}))
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    text = capsys.readouterr().err
    assert all(t in text for t in told), text


def test_bad_yaml_names_the_line(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "tiny.yaml").write_text("model:\n  backbone: [mlp\ndata: 3\n")
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert "tiny.yaml, line 3" in capsys.readouterr().err


def test_a_name_of_two_distributions_needs_the_full_path(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry()
    dann = found.get("DANN")
    other = type("DANN", (dann,), {"__module__": "tests_other_dann", "__doc__": "Another."})
    module = type(sys)("tests_other_dann")
    module.DANN = other
    monkeypatch.setitem(sys.modules, "tests_other_dann", module)
    monkeypatch.setattr(found, "plugins", dict(found.plugins))
    monkeypatch.setattr(found, "clashes", {})
    found.add(Found("DANN", other, "other-dist", "9"))
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    told = capsys.readouterr().err
    assert f"{dann.__module__}.DANN" in told
    assert "tests_other_dann.DANN (other-dist)" in told
    assert main(["plugins", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["clashes"]["DANN"]) == 2
    config = json.loads(json.dumps(CONFIG))
    config["model"]["plugins"]["align"]["class_path"] = "tests_other_dann.DANN"
    (here / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "tiny.yaml", "--trainer.max_epochs=1"]) == 0
    summary = json.loads((here / "runs" / "tiny" / "seed0" / "summary.json").read_text())
    assert summary["plugins"]["align"]["class_path"] == "tests_other_dann.DANN"


def test_overrides_reach_plugin_data_and_reader(here: Path) -> None:
    words = [
        "--model.plugins.align.weight=9", "--model.plugins.extra=MCC", "--data.reader.init_args.n=48",
        "--data.source=target", "--data.target=source", "--seed_everything=4", "--trainer.max_epochs=1",
    ]  # fmt: skip
    assert main(["fit", "--config", "tiny.yaml", *words]) == 0
    folder = here / "runs" / "tiny" / "seed4"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["plugins"]["align"]["init_args"]["weight"] == 9
    assert saved["model"]["plugins"]["align"]["init_args"]["hidden"] == 8
    assert saved["model"]["plugins"]["extra"]["class_path"].endswith(".MCC")
    assert saved["data"]["reader"]["init_args"]["n"] == 48
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["source"], summary["target"], summary["seed"]) == (["target"], "source", 4)


def test_plugins_of_several_configs_stand_side_by_side(here: Path, capsys: pytest.CaptureFixture) -> None:
    """Another key is added, another class replaces, and the same class keeps the settings that it is not given."""
    overlays = {
        "add": {"refine": {"class_path": "MCC", "init_args": {"weight": 0.5, "temperature": 3.0}}},
        "replace": {"align": {"class_path": "CDAN"}},
        "set": {"refine": {"class_path": "MCC", "init_args": {"weight": 0.1}}},
    }
    words = ["--config", "tiny.yaml"]
    for name, plugins in overlays.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"plugins": plugins}}))
        words += ["--config", f"{name}.yaml"]
    assert main(["fit", *words, "--model.plugins.refine.ramp=linear", "--print_config"]) == 0
    plugins = yaml.safe_load(capsys.readouterr().out)["model"]["plugins"]
    assert list(plugins) == ["align", "refine"]
    assert plugins["align"]["class_path"].endswith("CDAN")
    assert plugins["align"]["init_args"]["hidden"] == 1024
    assert {k: plugins["refine"]["init_args"][k] for k in ("weight", "temperature", "ramp")} == {
        "weight": 0.1, "temperature": 3.0, "ramp": "linear",
    }  # fmt: skip
    words = ["--config", "tiny.yaml", "--model.plugins.align.weight=9", "--config", "add.yaml"]
    assert main(["fit", *words, "--print_config"]) == 0
    plugins = yaml.safe_load(capsys.readouterr().out)["model"]["plugins"]
    assert list(plugins) == ["align", "refine"]


def test_a_parser_error_is_cut_to_key_and_reason() -> None:
    text = (
        'Parser key "model.plugins":\n  Does not validate against any of the Union subtypes\n'
        "  - Problem with given class_path 'a.B':\n      Parser key \"weight\":\n"
        "        Expected a <class 'float'>. Got value: abc\n    - Expected None\n"
    )
    assert short_parser_error(text) == "model.plugins (a.B): weight: Expected a float. Got value: abc"


def test_plugins_are_listed_and_described(capsys: pytest.CaptureFixture) -> None:
    assert main(["plugins", "--json"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["plugins"]}
    assert "align_features" in rows["DANN"]["hooks"]
    assert rows["DANN"]["distribution"] == "uda-adversarial"
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "DANN" in out
    assert "uda-adversarial" in out
    assert main(["plugins", "show", "MCC"]) == 0
    out = capsys.readouterr().out
    assert "temperature: float = 2.5" in out
    assert "refine_classifier" in out
    assert main(["plugins", "show", "MC"]) == 2
    assert "'MCC'" in capsys.readouterr().err


def test_a_broken_distribution_is_shown_with_its_reason(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry(), "broken", {"bad-dist 1 (entry point X = bad:X)": "ImportError: no bad"})
    assert main(["plugins"]) == 0
    out = capsys.readouterr().out
    assert "bad-dist 1" in out
    assert "ImportError: no bad" in out


def test_benchmarks_are_listed_checked_and_misspelt(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Toy:
        summary = "a toy"

        def describe(self) -> str:
            return "toy/domain/class"

        def check(self, root: str) -> list[str]:
            return [] if root == "good" else ["domain a is missing"]

        def download(self, root: str) -> str:
            return f"fetch it into {root}"

    module = type(sys)("uda.data.benchmarks")
    module.BENCHMARKS = {"toy": Toy()}
    monkeypatch.setitem(sys.modules, "uda.data.benchmarks", module)
    assert main(["data"]) == 0
    assert main(["data", "show", "toy"]) == 0
    assert main(["data", "check", "toy", "good"]) == 0
    assert main(["data", "check", "toy", "bad"]) == 1
    assert main(["data", "download", "toy", "there"]) == 0
    out = capsys.readouterr().out
    assert all(
        t in out for t in ("a toy", "toy/domain/class", "toy: complete", "- domain a is missing", "there")
    )
    assert main(["data", "show", "toi"]) == 2
    assert "'toy'" in capsys.readouterr().err


def test_debug_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UDA_DEBUG", "1")
    with pytest.raises(uda.UDAError, match="tiny"):
        main(["fit", "--config", "tny.yaml"])


def test_a_reader_that_has_gone_leaves_no_traceback():
    command = [sys.executable, "-m", "uda.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # `uda --help | true`
        told = process.stderr.read()
    assert "Traceback" not in told
    assert process.returncode == 1
