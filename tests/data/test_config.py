"""The constructor's arguments are the keys of a configuration file."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from uda.arguments import instantiated
from uda.data import ClassSplit, DataModule, Digits, ImageFolders, ImageViews, TensorViews

DIGITS = {
    "reader": {"class_path": "uda.data.Digits", "init_args": {"n_rendered": 50}},
    "source": "rendered",
    "target": "handwritten",
}


def parse(config, *overrides):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(DataModule, "data", sub_configs=True)
    text = yaml.safe_dump({"data": config})
    args = parser.parse_args([f"--config={text}", *overrides])
    return instantiated(parser, args).data


def test_classes_are_made_by_the_parsers_own_method():
    """jsonargparse 4.49 renamed it, and warns of the old name."""

    class Old:
        def instantiate_classes(self, config):
            return "old", config

    class New(Old):
        def instantiate(self, config):
            return "new", config

    assert instantiated(Old(), 1) == ("old", 1)
    assert instantiated(New(), 1) == ("new", 1)


def test_reader_and_strings():
    data = parse(DIGITS, "--data.source=handwritten", "--data.target=rendered", "--data.batch_size=9")
    assert isinstance(data.reader, Digits)
    assert data.reader.n_rendered == 50
    assert data.source_names == ["handwritten"]
    assert data.target_name == "rendered"
    assert data.batch_size == 9
    assert data.views is None
    assert data.classes is None
    data.setup("fit")


def test_several_sources_and_none():
    reader = {"class_path": "uda.data.ImageFolders", "init_args": {"root": "images"}}
    data = parse({"reader": reader, "source": ["Art", "Product"], "target": "Clipart"})
    assert isinstance(data.reader, ImageFolders)
    assert data.source_names == ["Art", "Product"]
    assert parse({"reader": reader, "source": None, "target": "Clipart"}).source_names == []
    assert parse({"reader": reader, "target": "Clipart"}).source_names == []


def test_views_and_classes():
    init = {"size": 64, "resize": 72, "crop": "center", "strong": "trivial", "mean": None, "std": None}
    config = {
        **DIGITS,
        "views": {"class_path": "uda.data.ImageViews", "init_args": init},
        "classes": {"known": ["1", "2"], "target_private": ["3"]},
    }
    data = parse(config)
    assert isinstance(data.views, ImageViews)
    assert data.views.size == 64
    assert data.views.mean is None
    assert data.classes == ClassSplit(["1", "2"], [], ["3"])
    assert data.num_classes == 2
    mean = {"class_path": "uda.data.TensorViews", "init_args": {"mean": 0.5, "std": 0.5}}
    assert isinstance(parse({**DIGITS, "views": mean}).views, TensorViews)


def test_wrong_values_are_refused_by_the_parser():
    for wrong in ({"sampling": "often"}, {"batch_size": "many"}, {"readr": 3}):
        with pytest.raises(ArgumentError):
            parse({**DIGITS, **wrong})


def test_cli(tmp_path, recorder):
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {**DIGITS, "batch_size": 8, "epoch_steps": 3},
                "trainer": {
                    "accelerator": "cpu",
                    "logger": False,
                    "max_epochs": 1,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "default_root_dir": str(tmp_path),
                },
            }
        )
    )
    cli = LightningCLI(
        recorder,
        DataModule,
        subclass_mode_data=False,
        save_config_callback=None,
        args=[
            "fit",
            f"--config={tmp_path / 'run.yaml'}",
            "--data.source=handwritten",
            "--data.target=rendered",
        ],
    )
    assert len(cli.model.seen) == 3
    assert set(cli.model.seen[0]) == {"sources/handwritten", "target"}
