"""Every config in the tree runs a few steps, on generated data of its layout where the real data is not at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted(p.name for p in (ROOT / "configs" / "methods").glob("*.yaml"))
CLASSES = {"office_home": 65, "pacs": 7}


def listed(value) -> list[str]:
    return value if isinstance(value, list) else [value]


def image_folders(root: Path, domains: list[str], classes: int, each: int = 3) -> None:
    """``domain/class/picture.jpg``: each class has its colour, each domain its brightness."""
    draw = np.random.default_rng(0)
    for d, domain in enumerate(domains):
        for c in range(classes):
            folder = root / domain / f"class_{c:02d}"
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = draw.integers(0, 80, (40, 40, 3)) + np.array([c * 2, 150 - c * 2, 40 * d])
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg")


def array_file(path: Path, reader: dict, widths: dict[str, int]) -> None:
    """An npz with the keys that the config asks for; features of a width a domain."""
    draw = np.random.default_rng(0)
    arguments, out = reader["init_args"], {}
    images, several = arguments.get("kind") == "images", arguments.get("multi_label", False)
    for domain, width in widths.items():
        shape = (28, 28) if images else (width,)
        y = np.arange(400) % 10
        x = draw.normal(size=(400, *shape)) + y.reshape(-1, *[1] * len(shape))
        out[arguments.get("x_key", "{domain}_x").format(domain=domain)] = (
            (x.clip(0, 1) * 255).astype(np.uint8) if images else x.astype(np.float32)
        )
        if several:  # spectrograms, and which classes each holds
            y, x = draw.random((400, 5)) < 0.3, draw.random((400, 1, 32, 32), dtype=np.float32)
            out[f"{domain}_x"] = x
        out[arguments.get("y_key", "{domain}_y").format(domain=domain)] = y
    np.savez(path, **out)


def halved_file(path: Path, classes: list[str]) -> None:
    """An npz of one domain of small colour images, for its halves."""
    draw = np.random.default_rng(0)
    y = np.arange(160) % len(classes)
    x = draw.integers(0, 120, (160, 32, 32, 3)) + 30 * y.reshape(-1, 1, 1, 1)
    np.savez(path, x=x.astype(np.uint8), y=y, classes=np.array(classes))


def text_files(folder: Path, domains: list[str]) -> None:
    """A .jsonl a domain: a word for each class, and one for the domain."""
    folder.mkdir()
    for d in domains:
        lines = [json.dumps({"text": f"subject{i % 6} in {d}", "label": f"class_{i % 6}"}) for i in range(120)]
        (folder / f"{d}.jsonl").write_text("\n".join(lines))


def stand_in(config: dict, name: str, folder: Path) -> list[str]:
    """Overrides that put generated data of the same layout in the place of the real data."""
    data = config["data"]
    domains = [*(d for d in listed(data["source"]) if d), data["target"]]
    reader = data["reader"]
    kind = reader["class_path"].rpartition(".")[2]
    if kind == "ImageFolders":
        classes = next((n for key, n in CLASSES.items() if name.startswith(key)), 5)
        image_folders(folder / "images", domains, classes)
        return [
            f"--data.reader.init_args.root={folder / 'images'}", "--data.views.init_args.size=32",
            "--data.views.init_args.resize=36", "--data.batch_size=4", "--data.num_workers=0",
        ]  # fmt: skip
    if kind == "Texts":
        text_files(folder / "texts", domains)
        return [f"--data.reader.init_args.path={folder / 'texts'}/{{domain}}.jsonl"]
    if kind == "Halves":
        halved_file(folder / f"{data['target'].rpartition('_')[0]}.npz", data["classes"]["known"])
        return [f"--data.reader.reader.path={folder}/{{domain}}.npz"]
    if kind == "Arrays":
        backbones = {}
        if data.get("heterogeneous"):  # a backbone of its own input size for each role
            backbones = config["model"]["backbone"]["init_args"]["backbones"]
        roles = {d: "target" if d == data["target"] else "source" for d in domains}
        widths = {d: backbones[r]["init_args"]["in_features"] if backbones else 64 for d, r in roles.items()}
        array_file(folder / "arrays.npz", reader, widths)
        return [f"--data.reader.init_args.path={folder / 'arrays.npz'}"]
    return []


def lighter(config: dict) -> list[str]:
    """Overrides for weights that nothing fetches in a test, a smaller ResNet, and fewer turns of a solver."""
    import timm

    words, backbone = [], config["model"]["backbone"]
    given = backbone.get("init_args", {}) if isinstance(backbone, dict) else {}
    if given.get("pretrained"):
        words.append("--model.backbone.init_args.pretrained=false")
        if backbone["class_path"] == "uda.nn.Timm":
            assert timm.is_model_pretrained(given["name"])
    if str(given.get("name")).startswith("resnet50"):
        words.append("--model.backbone.init_args.name=resnet18")
    for key, plugin in config["model"].get("plugins", {}).items():
        if "max_iter" in plugin.get("init_args", {}):
            words.append(f"--model.plugins.{key}.init_args.max_iter=2")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs(name, tmp_path, monkeypatch):
    from uda.cli import main

    config = yaml.safe_load((ROOT / "configs" / name).read_text())
    words = stand_in(config, name, tmp_path)
    words += lighter(config)
    monkeypatch.chdir(tmp_path)
    code = main([
        "fit", "--config", str(ROOT / "configs" / name), *words, "--data.epoch_steps=2", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    data = config["data"]
    several = data["reader"].get("init_args", {}).get("multi_label", False)
    assert 0 <= summary["class_mean_ap" if several else "target_accuracy"]["last"] <= 1
    assert summary["target"] == data["target"]


@pytest.mark.slow
def test_a_stream_of_corruptions_from_its_config(tmp_path, monkeypatch):
    """``uda fit`` on the source's config, then ``uda adapt`` on that of the stream, as their heads say."""
    pytest.importorskip("corrupt_tta")
    from uda.cli import main

    source, stream = (ROOT / "configs" / f"{name}.yaml" for name in ("cifar10_source", "cifar10c_tent"))
    words = stand_in(yaml.safe_load(source.read_text()), source.name, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = main(["fit", "--config", str(source), *words, "--data.epoch_steps=2", "--trainer.max_epochs=1",
                 "--trainer.enable_progress_bar=false"])  # fmt: skip
    assert code == 0
    checkpoint = re.search(r"init_from=(\S+)", stream.read_text())[1]
    command = ["adapt", "--config", str(stream), f"--model.init_from={checkpoint}", *words, "--limit", "3"]
    assert main(command) == 0
    out = tmp_path / "runs" / "cifar10_source" / "seed0" / "adapt" / "TENT-continual"
    told = json.loads((out / "stream.json").read_text())
    assert (told["samples"], told["batch_size"], len(told["oracle_error_by_shift"])) == (45, 200, 15)
    assert len(list((tmp_path / "data" / "cifar10c").glob("*-5-*.npz"))) == 15
    more = ["--config", str(ROOT / "configs" / "methods" / "sar.yaml"), "--setting", "correlated"]
    assert main([*command, *more, "--corruptions", "contrast", "fog", "--batch_size", "2"]) == 0
    told = json.loads((out.parent / "SAR-correlated" / "stream.json").read_text())
    assert (told["samples"], told["batches"]) == (6, 4)


@pytest.mark.slow
def test_every_other_pair_is_one_override(tmp_path, monkeypatch):
    from uda.cli import main

    image_folders(tmp_path / "images", ["Art", "Clipart", "Product", "Real World"], 65, each=2)
    monkeypatch.chdir(tmp_path)

    config = ROOT / "configs" / "office_home_dann.yaml"
    code = main([
        "fit", "--config", str(config), *lighter(yaml.safe_load(config.read_text())),
        f"--data.reader.init_args.root={tmp_path / 'images'}", "--data.source=Real World", "--data.target=Product",
        "--data.views.init_args.size=32",
        "--data.views.init_args.resize=36", "--data.batch_size=4", "--data.num_workers=0", "--data.epoch_steps=1",
        "--trainer.max_epochs=1", "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["source"] in ("Real World", ["Real World"])
    assert summary["target"] == "Product"


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_how_it_is_run(name):
    text = (ROOT / "configs" / name).read_text()
    assert f"uda fit --config configs/{name}" in text
    assert name in (ROOT / "configs" / "README.md").read_text(), f"configs/README.md does not list {name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAYS)
def test_method_runs_on_digits(name, tmp_path, monkeypatch):
    from uda.cli import main

    monkeypatch.chdir(tmp_path)
    several = "_multi_source_only.yaml" in (ROOT / "configs" / "methods" / name).read_text()
    base = f"{'pacs_features_multi' if several else 'digits'}_source_only.yaml"
    words = stand_in(yaml.safe_load((ROOT / "configs" / base).read_text()), base, tmp_path) if several else []
    code = main([
        "fit", "--config", str(ROOT / "configs" / base), *words,
        "--config", str(ROOT / "configs" / "methods" / name), "--data.epoch_steps=2", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] >= 2  # a method in several phases steps its optimiser several times
    wanted = yaml.safe_load((ROOT / "configs" / "methods" / name).read_text())["model"]["plugins"]
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert set(written["model"]["plugins"]) == set(wanted)


@pytest.mark.parametrize("name", OVERLAYS)
def test_method_says_how_it_is_run(name):
    text = (ROOT / "configs" / "methods" / name).read_text()
    several = "_multi_source_only.yaml" in text  # a method that needs two sources or more
    base = r"uda fit --config configs/\w+_multi_source_only.yaml"
    base = base if several else r"uda fit --config configs/digits_source_only.yaml"
    # an addition names the method that it is laid over as well
    assert re.search(rf"{base}( --config \S+)* --config configs/methods/{re.escape(name)}", text)
    assert f"`{name.removesuffix('.yaml')}`" in (ROOT / "configs" / "README.md").read_text()


def test_every_plugin_has_a_method_config():
    from uda.discovery import registry

    used = set()
    for path in [*(ROOT / "configs" / "methods").rglob("*.yaml"), *(ROOT / "configs").glob("*.yaml")]:
        plugins = yaml.safe_load(path.read_text())["model"].get("plugins") or {}
        used |= {registry().get(p["class_path"]) for p in plugins.values()}
    first_party = {f.cls for f in registry().plugins.values() if f.distribution.startswith("uda-")}
    assert first_party <= used
