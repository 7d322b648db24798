"""Source-free methods against their equations in loops, and the two steps of a hand-over."""

from __future__ import annotations

import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from uda_sourcefree import GLC, LEAD, LFTL, NOTELA, NRC, SHOT, AaD, CoLearn, SHOTPlusPlus
from uda_sourcefree.aad import dispersion
from uda_sourcefree.colearn import centroid_probs, match_or_conf
from uda_sourcefree.neighbours import largest, nearest
from uda_sourcefree.notela import mutual, teacher_labels
from uda_sourcefree.nrc import neighbour_agreement, reciprocity
from uda_sourcefree.shot import centroid_labels
from uda_sourcefree.shot_plus import sharpened, sure_share

import uda
from uda.checkpointing import without_downloads
from uda.cli import main
from uda.images import rotate
from uda.testing import TinyTask, check_plugin, check_plugins_ddp

CASES = [
    (SHOT, {"label_weight": 0.5}), (NRC, {"neighbours": 2, "expanded": 2}), (AaD, {"neighbours": 2, "beta": 1.0}),
    (NOTELA, {"neighbours": 3, "trainable": "all"}), (NOTELA, {"neighbours": 3, "mode": "offline", "trainable": "all"}),
    (CoLearn, {}), (SHOTPlusPlus, {"rotation": 0.0}),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("threshold", [0, 3])
def test_centroid_labels_by_loops(threshold):
    draw = np.random.default_rng(0)
    f, p = draw.normal(size=(20, 4)), draw.dirichlet(np.ones(5) * 0.3, 20)
    p[:, 4] = 1e-6  # a class that no sample is predicted as
    g = [np.append(v, 1.0) / np.linalg.norm(np.append(v, 1.0)) for v in f]
    counts = np.bincount(p.argmax(1), minlength=5)
    weight, labels = p.copy(), None
    for _ in range(2):
        labels = []
        for v in g:
            cosine = []
            for c in range(5):
                centre = sum(w[c] * u for w, u in zip(weight, g, strict=True)) / (1e-8 + weight[:, c].sum())
                cosine.append(v @ centre / max(np.linalg.norm(centre), 1e-12) if counts[c] > threshold else -9)
            labels.append(int(np.argmax(cosine)))
        weight = np.eye(5)[labels]
    assert centroid_labels(torch.tensor(f), torch.tensor(p), 2, threshold).tolist() == labels
    assert 4 not in labels


def test_nearest_in_chunks_by_sorting():
    torch.manual_seed(0)
    x, own = torch.randn(30, 5), torch.arange(30)
    for chunk in (31, 2**20):
        found = nearest(x[:7], x, 3, own[:7], chunk)
        for i in range(7):
            order = sorted((j for j in range(30) if j != i), key=lambda j: -float(x[i] @ x[j]))
            assert found[i].tolist() == order[:3]


@pytest.mark.parametrize("n", [64 * 9 + 5, 64 * 9, 70])
def test_largest_by_sorting(n):
    """Blocks lose nothing, ties and columns behind the last whole block included."""
    x = torch.randint(0, 300, (6, n), generator=torch.Generator().manual_seed(n)).float()
    x[0, -3:] = 1000
    x[1] = 7
    found = largest(x, 4)
    assert torch.equal(x.gather(1, found), x.sort(dim=1, descending=True).values[:, :4])
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_nrc_by_loops():
    draw = np.random.default_rng(1)
    p, s = draw.dirichlet(np.ones(3), 4), draw.dirichlet(np.ones(3), 8)
    near = np.array([[4, 1], [0, 5], [3, 6], [2, 7]])
    wider = draw.integers(0, 8, (4, 2, 3))
    affinity = [[1.0 if i in wider[i, k] else 0.1 for k in range(2)] for i in range(4)]
    got = reciprocity(torch.tensor(near), torch.tensor(wider), torch.arange(4))
    np.testing.assert_allclose(got, affinity, rtol=1e-6)
    value = -sum(affinity[i][k] * p[i] @ s[near[i, k]] for i in range(4) for k in range(2)) / 4
    ours = neighbour_agreement(torch.tensor(p), torch.tensor(s)[torch.tensor(near)], got.double())
    assert float(ours) == pytest.approx(value, rel=1e-6)
    value = sum(p[i] @ p[m] for i in range(4) for m in range(4) if m != i) / 4
    assert float(dispersion(torch.tensor(p))) == pytest.approx(value, rel=1e-9)


def test_neighbours_are_constants_and_the_sample_is_not():
    p, s = torch.rand(3, 4, requires_grad=True), torch.rand(3, 2, 4)
    neighbour_agreement(p, s, 1.0).backward()
    torch.testing.assert_close(p.grad, -s.sum(1) / 3)


def test_notela_labels_maximise_its_objective():
    """The closed form against a search of ``y . log p + lambda y . mean_j p_j + a H(y)`` on a grid of the simplex."""
    draw = np.random.default_rng(2)
    z, near = draw.normal(size=(3, 3)), draw.dirichlet(np.ones(3), (3, 4))
    weight = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], float)
    strength, a = 1.7, 0.8
    found = teacher_labels(*map(torch.tensor, (z, near, weight)), strength, a)
    side = np.linspace(1e-4, 1, 400)
    grid = np.array([(u, v, 1 - u - v) for u in side for v in side if u + v < 1])
    for i in range(3):
        p = np.exp(z[i]) / np.exp(z[i]).sum()
        pull = sum(w * q for w, q in zip(weight[i], near[i], strict=True)) / max(weight[i].sum(), 1)
        value = grid @ np.log(p) + strength * grid @ pull - a * (grid * np.log(grid)).sum(1)
        np.testing.assert_allclose(found[i], grid[value.argmax()], atol=4e-3)


def test_colearn_by_loops():
    draw = np.random.default_rng(3)
    g, w = draw.normal(size=(12, 5)), draw.random((12, 4))
    w[:, 3] = 0  # a class without weight
    found = centroid_probs(torch.tensor(g), torch.tensor(w), 0.3)
    for i in range(12):
        value = []
        for c in range(3):
            centre = sum(w[j, c] * g[j] for j in range(12)) / w[:, c].sum()
            value.append(np.exp(g[i] @ centre / np.linalg.norm(g[i]) / np.linalg.norm(centre) / 0.3))
        np.testing.assert_allclose(found[i], [v / sum(value) for v in value] + [0.0], rtol=1e-6)


def test_match_or_conf_in_all_cases():
    def row(label, sure):
        high, low = (0.9, 0.05) if sure else (0.4, 0.3)
        return [high if c == label else low for c in range(3)]

    cases = [  # label and sureness of both branches; the label, and whether it counts
        ((0, True), (0, True), 0, True), ((1, False), (1, False), 1, True), ((0, True), (1, False), 0, True),
        ((0, False), (1, True), 1, True), ((0, True), (1, True), 0, False), ((0, False), (1, False), 0, False),
    ]  # fmt: skip
    first, second = (torch.tensor([row(*c[i]) for c in cases]) for i in (0, 1))
    labels, kept = match_or_conf(first, second, 0.5)
    assert labels.tolist() == [c[2] for c in cases]
    assert kept.tolist() == [c[3] for c in cases]


class Second(torch.nn.Module):
    """Takes note of what it sees; its features are the pixels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.flatten(1)


def test_colearn_shows_the_second_network_its_own_view():
    """Its size and normalisation, once for the whole target and in order; the model goes on with the run's."""
    second, train = Second(), []
    views = uda.data.Views(test=lambda image: 4 * image[:, ::2, ::2] - 1)
    model = uda.UDA("small_cnn", {"pseudo": CoLearn(second, views, threshold=0.0)}, bottleneck=8, scores=[])
    model.backbone.register_forward_pre_hook(lambda _, x: train.append(x[0].shape[1:]))
    data = uda.DataModule(TinyTask(kind="images"), target="target", batch_size=8, epoch_steps=2, eval_batch_size=20)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    L.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet).fit(model, data)
    seen = torch.cat(second.seen)
    raw = TinyTask(kind="images").read("target").inputs.x
    torch.testing.assert_close(seen, 4 * raw[:, :, ::2, ::2] - 1)
    assert set(train) == {torch.Size([1, 8, 8])}
    probs = centroid_probs(model.plugins["pseudo"]._second, torch.eye(48))
    assert probs.argmax(1).tolist() == list(range(48))  # rows of the bank are those of the samples


def test_shot_plus_splits_each_class_by_entropy():
    draw = np.random.default_rng(4)
    labels, entropy = draw.integers(0, 4, 31), draw.random(31)
    labels[labels == 2] = 3  # a class that nothing is predicted as
    found = sure_share(torch.tensor(labels), torch.tensor(entropy), 0.5)
    for c in (0, 1, 3):
        members = np.flatnonzero(labels == c)
        first = members[np.argsort(entropy[members])][: int(np.ceil(len(members) / 2))]
        assert found[members].nonzero().flatten().tolist() == [i for i, m in enumerate(members) if m in first]


def test_shot_plus_turns_and_sharpens():
    x = torch.randn(4, 2, 3, 3)
    found = rotate(x, torch.tensor([0, 3, 1, 2]))
    for i, k in enumerate((0, 3, 1, 2)):
        np.testing.assert_array_equal(found[i], np.rot90(x[i].numpy(), k, (1, 2)))
    torch.testing.assert_close(sharpened(torch.tensor([[0.6, 0.4]]), 0.5), torch.tensor([[0.36, 0.16]]) / 0.52)


def test_notela_takes_each_class_by_itself():
    """The multi-label labels are the single-label ones of "no" and "yes", class by class."""
    torch.manual_seed(0)
    z, near = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 2, 4, dtype=torch.float64)
    weight = torch.tensor([[1.0, 1], [0, 0], [0, 1]], dtype=torch.float64)
    found = teacher_labels(z, near, weight, 1.3, 0.7, multi_label=True)
    for c in range(4):
        two = torch.stack([torch.zeros(3), z[:, c]], 1).double()
        others = torch.stack([1 - near[:, :, c], near[:, :, c]], 2)
        torch.testing.assert_close(found[:, c], teacher_labels(two, others, weight, 1.3, 0.7)[:, 1])


def test_notela_neighbours_are_euclidean_and_mutual():
    x = torch.tensor([[0.0, 0], [1, 0], [1.5, 0], [30, 30], [32, 32]])
    near = nearest(x, x, 2, torch.arange(5), euclidean=True)
    for i in range(5):
        order = sorted((j for j in range(5) if j != i), key=lambda j: float((x[i] - x[j]).norm()))
        assert near[i].tolist() == order[:2]
    expected = [[float(i in near[j].tolist()) for j in near[i].tolist()] for i in range(5)]
    assert mutual(near, near[near], torch.arange(5)).tolist() == expected
    assert expected[3] == [1.0, 0.0]  # the far pair has each other, and nobody else has it


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "frozen"), [("online", False), ("offline", True)])
def test_notela_trains_what_it_says(handed_over, mode, frozen):
    place, _ = handed_over
    name = f"notela_{mode}"
    options = {"mode": mode, "neighbours": 5, "freeze_statistics": frozen}
    plugin = {"class_path": "NOTELA", "init_args": options}
    assert adapted(place, name, plugin, "--trainer.max_epochs=1") == 0
    start = torch.load(place / "source.ckpt", weights_only=True)["state_dict"]
    end = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    moved = {k for k, v in start.items() if not torch.equal(v, end[k])}
    norm = {f"bottleneck.net.1.{n}" for n in ("weight", "bias")}
    statistics = {f"bottleneck.net.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == (norm if frozen else norm | statistics)


def test_notela_needs_something_to_train(handed_over):
    place, _ = handed_over
    model = uda.UDA("identity", {"refine": NOTELA()}, bottleneck=0, scores=[])
    data = uda.DataModule(uda.data.Arrays(str(place / "target.npz"), kind="features"), None, "b", batch_size=16)
    with pytest.raises(uda.UDAError, match="no BatchNorm to train"):
        L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(model, data)


# ------------------------------------------------------------------------------------------------ the two steps


CONFIG = {
    "model": {
        "backbone": "identity", "bottleneck": 32, "head": "weight_norm",
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
    },
    "data": {
        "reader": {"class_path": "Arrays", "init_args": {"path": "", "kind": "features"}}, "source": "a", "target": "b",
        "batch_size": 32, "epoch_steps": 20,
    },
    "trainer": {
        "max_epochs": 4, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory):
    """The checkpoint of a source model, and a place where only the target's file is."""
    place = tmp_path_factory.mktemp("life")
    draw = np.random.default_rng(0)
    centres, y = 2.2 * draw.normal(size=(4, 6)), np.arange(320) % 4
    x = centres[y] + draw.normal(size=(320, 6))
    turn = np.eye(6) + 0.25 * draw.normal(size=(6, 6))
    np.savez(place / "both.npz", a_x=x, a_y=y, b_x=x @ turn + 0.6, b_y=y)
    np.savez(place / "target.npz", b_x=x @ turn + 0.6, b_y=y)
    owner = {**CONFIG, "data": {**CONFIG["data"], "reader": {"class_path": "Arrays", "init_args": {
        "path": str(place / "both.npz"), "kind": "features"}}}}  # fmt: skip
    (place / "owner.yaml").write_text(yaml.safe_dump(owner))
    assert main(["fit", "--config", str(place / "owner.yaml"), f"--run_dir={place / 'source'}"]) == 0
    shutil.copy(place / "source" / "checkpoints" / "last.ckpt", place / "source.ckpt")
    before = json.loads((place / "source" / "summary.json").read_text())["target_accuracy"]["last"]
    shutil.rmtree(place / "source")
    (place / "both.npz").unlink()  # the owner keeps the data
    return place, before


def adapted(place, name, plugin, *words):
    config = {**CONFIG, "data": {**CONFIG["data"], "source": None, "reader": {"class_path": "Arrays", "init_args": {
        "path": str(place / "target.npz"), "kind": "features"}}}}  # fmt: skip
    config["model"] = {**CONFIG["model"], "plugins": {"refine": plugin}}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return main([
        "fit", "--config", str(place / f"{name}.yaml"), f"--model.init_from={place / 'source.ckpt'}",
        f"--run_dir={place / name}", *words,
    ])  # fmt: skip


ALL = {"SHOTPlusPlus": {"init_args": {"rotation": 0}}, "NOTELA": {"init_args": {"trainable": "all"}}}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("CoLearn", "SHOTPlusPlus")]


@pytest.mark.parametrize("name", ["SHOT", "NRC", "AaD", "NOTELA", *SLOW])
def test_the_target_improves_without_the_source(handed_over, name):
    place, before = handed_over
    assert adapted(place, name, {"class_path": name, **ALL.get(name, {})}) == 0
    summary = json.loads((place / name / "summary.json").read_text())
    assert summary["source"] == []
    assert summary["target_accuracy"]["last"] > before + 0.02
    start = torch.load(place / "source.ckpt", weights_only=True)["state_dict"]
    end = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = {k: torch.equal(v, end[k]) for k, v in start.items() if k.startswith("head.")}
    assert all(kept.values()) == (name in ("SHOT", "CoLearn", "SHOTPlusPlus"))  # which freeze the classifier
    assert not torch.equal(start["bottleneck.net.0.weight"], end["bottleneck.net.0.weight"])


class Labels(uda.Plugin):
    """Soft labels with weights, for some of the batch."""

    @uda.hookimpl
    def pseudo_label(self, step):
        b = len(step.target)
        soft = torch.tensor([[0.7, 0.2, 0.1]]).roll(1, 1).expand(b, 3)
        return uda.PseudoLabels(soft.argmax(1), torch.linspace(0.1, 1, b), soft, torch.arange(b) % 2 == 0)


@pytest.mark.parametrize(
    ("plugin", "name", "scale"),
    [
        (SHOT(label_weight=0.5, entropy_weight=0.0), "labels", 0.5), (GLC(label_weight=0.5), "labels", 0.5),
        (NOTELA(3, dropout=0.0, trainable="all"), "student", 1.0),
    ],
)  # fmt: skip
def test_labels_of_another_plugin_count_as_they_say(plugin, name, scale):
    """Distributions, weights and masks; by the equation."""
    torch.manual_seed(0)
    model = uda.UDA("identity", {"pseudo": Labels(), "refine": plugin}, bottleneck=0, num_classes=3, input_shape=[4],
                    sizes={"target": 9})  # fmt: skip
    step = uda.Step(model, {"target": {"x": torch.randn(6, 4), "index": torch.arange(6)}}, 0.5, 0, 0)
    uda.objectives.collect(model, step)
    found = step.objectives
    log_p, pseudo = step.target.logits.detach().log_softmax(1), step.target.pseudo
    value = sum(-float(pseudo.weight[i] * (pseudo.soft[i] * log_p[i]).sum()) for i in (0, 2, 4)) / 6
    assert float(found[f"refine/{name}"].detach()) == pytest.approx(scale * value, rel=1e-5)


def test_notela_leaves_alone_what_other_plugins_bring():
    class Head(uda.Plugin):
        @uda.hookimpl
        def build(self, model):
            self.net = torch.nn.Linear(2, 2)

    model = uda.UDA("identity", {"other": Head(), "refine": NOTELA(3)}, bottleneck=4, num_classes=3, input_shape=[4])
    assert all(p.requires_grad for p in model.plugins["other"].parameters())
    assert not model.head.linear.weight.requires_grad


def test_a_checkpoint_of_other_classes_is_refused(handed_over, capsys):
    place, _ = handed_over
    words = ["--data.classes={known: ['0', '1', '2']}"]
    assert adapted(place, "other", {"class_path": "SHOT"}, *words) == 2
    assert "classes" in capsys.readouterr().err


def start(place, init, reader="bare.npz"):
    """SHOT from a file of weights, on a target without labels."""
    x = np.load(place / "target.npz")["b_x"]
    np.savez(place / "bare.npz", b_x=x)
    model = uda.UDA("identity", {"refine": SHOT()}, bottleneck=32, head="weight_norm", scores=[],
                    init_from=init and str(place / init))  # fmt: skip
    data = uda.DataModule(uda.data.Arrays(str(place / reader), kind="features"), None, "b", batch_size=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_train_batches": 1}
    L.Trainer(max_epochs=1, accelerator="cpu", devices=1, limit_val_batches=0, **quiet).fit(model, data)
    return model


def test_a_target_without_labels_has_the_classes_of_the_model(handed_over, recwarn):
    place, _ = handed_over
    assert start(place, "source.ckpt").class_names == ["0", "1", "2", "3"]
    assert not [w for w in recwarn if "never trained" in str(w.message)]
    with pytest.raises(uda.UDAError, match=r"no class is known.*data.classes"):
        start(place, None)
    with pytest.warns(UserWarning, match="'refine' makes the run source-free.*never trained.*model.init_from"):
        start(place, None, "target.npz")


def test_an_adapted_model_predicts_when_the_file_of_the_source_has_gone(handed_over, capsys):
    place, _ = handed_over
    np.savez(place / "bare.npz", b_x=np.load(place / "target.npz")["b_x"])
    shutil.copy(place / "source.ckpt", place / "lent.ckpt")
    words = [f"--data.reader.init_args.path={place / 'bare.npz'}", f"--model.init_from={place / 'lent.ckpt'}"]
    assert adapted(place, "lent", {"class_path": "SHOT"}, *words, "--trainer.max_epochs=1") == 0
    (place / "lent.ckpt").unlink()
    assert main(["predict", f"--ckpt_path={place / 'lent' / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert len((place / "lent" / "predictions.csv").read_text().splitlines()) == 321


@pytest.mark.parametrize(
    ("file", "message"),
    [([1], "holds no weights"), ({"state_dict": {}}, "holds no weights"), (None, "NaN or infinite weights.*head.bias")],
)
def test_a_file_without_weights_is_refused(handed_over, file, message):
    place, _ = handed_over
    if file is None:
        file = torch.load(place / "source.ckpt", weights_only=True)
        file["state_dict"]["head.bias"][0] = torch.nan
    torch.save(file, place / "bad.ckpt")
    with pytest.raises(uda.UDAError, match=message):
        start(place, "bad.ckpt", "target.npz")


def test_an_aligner_beside_it_is_refused(handed_over):
    place, _ = handed_over

    class Aligner(uda.Plugin):
        @uda.hookimpl
        def align_features(self, step):
            return {"gap": step.pooled("features").mean()}

    model = uda.UDA("identity", {"refine": SHOT(), "align": Aligner()}, bottleneck=8, scores=[])
    data = uda.DataModule(uda.data.Arrays(str(place / "target.npz"), kind="features"), None, "b", batch_size=16)
    with pytest.raises(uda.UDAError, match=r"'align' \(Aligner\) aligns .* 'refine' \(SHOT\) makes"):
        L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(model, data)


def test_colearn_needs_its_pretrained_network():
    """A name that starts at random is refused; a checkpoint fetches no weights, and tells another network."""
    with pytest.raises(uda.UDAError, match="'timm:resnet18' starts at random"):
        CoLearn("timm:resnet18")
    spec = {"class_path": "uda.nn.Timm", "init_args": {"name": "resnet18", "pretrained": True}}
    pseudo = {"class_path": "CoLearn", "init_args": {"network": spec, "weight": 0.5}}
    kept = without_downloads({"plugins": {"pseudo": pseudo, "b": "SHOT"}})["plugins"]
    assert kept["pseudo"]["init_args"]["network"]["init_args"] == {"name": "resnet18", "pretrained": False}
    assert kept["pseudo"]["init_args"]["weight"] == 0.5
    assert kept["b"] == "SHOT"
    plugin = CoLearn(Second())
    model = uda.UDA("identity", {"pseudo": plugin}, bottleneck=8, num_classes=3, input_shape=[6], sizes={"target": 9})
    plugin.check.fill_(7)
    with pytest.raises(uda.UDAError, match="another than that of the checkpoint"):
        plugin._features(model)


def test_bad_arguments():
    for make in (
        lambda: SHOT(label_weight=-1.0), lambda: SHOT(rounds=0), lambda: NRC(neighbours=0), lambda: NRC(low=2.0),
        lambda: AaD(beta=-1.0),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()


# ------------------------------------------------------------------------------------------------ lifecycle


def test_plugin():
    check_plugin(SHOT, ddp=False)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), CASES[1:])
def test_other_plugins(cls, options):
    check_plugin(cls, init_args=options, ddp=False)


@pytest.mark.slow
def test_under_two_processes(tmp_path):
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"target/{i},{'abc'[i % 3]}\n" for i in range(48)))
    oracle = {"class_path": "SimulatedOracle", "init_args": {"labels": str(tmp_path / "labels.csv")}}
    more = [(GLC, {"neighbours": 3}), (LEAD, {"neighbours": 3}), (LFTL, {"budget": 6, "rounds": 2, "oracle": oracle})]
    check_plugins_ddp([(cls, {"init_args": options}) for cls, options in [*CASES, *more]])
