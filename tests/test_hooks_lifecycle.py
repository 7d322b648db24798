"""Every hook is called where, when and with what :mod:`uda.hookspecs` promises."""

from __future__ import annotations

import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
from torch import nn

import uda
from uda.data import DataModule
from uda.hooks import HOOKS, hooks_of
from uda.nn import MLP
from uda.testing import TinyTask

BATCH, STEPS, EPOCHS = 8, 3, 2


class Recorder(uda.Plugin):
    """Fills every hook and writes down each call."""

    manual = True

    def __init__(self, steps_by_hand: bool = True) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict]] = []
        self.net: nn.Module | None = None
        self.steps_by_hand = steps_by_hand

    def note(self, hook: str, **seen) -> None:
        self.calls.append((hook, {"grad": torch.is_grad_enabled(), **seen}))

    @property
    def order(self) -> list[str]:
        return [name for name, _ in self.calls]

    def seen(self, hook: str) -> list[dict]:
        return [values for name, values in self.calls if name == hook]

    @uda.hookimpl
    def data_needs(self, model):
        self.note("data_needs", model=type(model))
        return uda.DataNeeds(
            held_out=True, views={"weak", "strong"}, source_views={"weak"}, class_balanced=True,
            refresh={"source", "target"},
        )  # fmt: skip

    @uda.hookimpl
    def build(self, model):
        self.note("build", dims=(model.feature_dim, model.num_classes), sizes=dict(model.sizes))
        if self.net is None:
            self.net = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def param_groups(self, model):
        self.note("param_groups")
        return [{"params": [self.net.weight], "lr_scale": 0.5, "weight_decay": 0.0, "name": "own"}]

    @uda.hookimpl
    def before_evaluation(self, model):
        self.note("before_evaluation", training=model.training, grad=torch.is_grad_enabled())

    @uda.hookimpl
    def refresh(self, model, bank):
        self.note(
            "refresh",
            source=bank.source,
            sources=list(bank.sources),
            target=bank.target,
            training=model.training,
        )

    @uda.hookimpl
    def prepare_batch(self, step):
        computed = any(v.computed for b in (*step.sources.values(), step.target) for v in b.views.values())
        self.note(
            "prepare_batch", views=sorted(step.target.views), source_views=sorted(step.source.views),
            held_out=len(step.held_out), y=step.source.y, target_y=step.target.y, computed=computed,
            index=step.index, batch_idx=step.batch_idx, progress=step.progress,
            rows=(step.target.index, step.held_out.index),
        )  # fmt: skip

    @uda.hookimpl
    def transform_features(self, model, batch, features):
        self.note("transform_features", role=batch.role, name=batch.name, shape=tuple(features.shape))

    @uda.hookimpl
    def align_features(self, step):
        self.note("align_features", objectives=list(step.objectives), pseudo=step.target.pseudo)
        return {"own": self.net(step.target.features).square().mean()}

    @uda.hookimpl
    def pseudo_label(self, step):
        self.note("pseudo_label", objectives=list(step.objectives))
        score, label = step.target.logits.softmax(1).max(1)
        return uda.PseudoLabels(label, weight=score, soft=step.target.logits.softmax(1))

    @uda.hookimpl
    def refine_classifier(self, step):
        self.note("refine_classifier", pseudo=step.target.pseudo)
        strong = step.target.view("strong").logits
        return {"pseudo": uda.losses.soft_cross_entropy(strong, step.target.pseudo.soft)}

    @uda.hookimpl
    def weigh_objectives(self, step, objectives):
        self.note("weigh_objectives", names=list(objectives), gram=objectives.gram())
        return {"classification": 2.0}

    @uda.hookimpl
    def optimise(self, step, objectives):
        self.note(
            "optimise",
            names=list(objectives),
            groups=[g["name"] for g in step.model.optimizers().param_groups],
        )
        if self.steps_by_hand:
            step.model.manual_update(sum(objectives.values()))
            return True
        return None

    @uda.hookimpl
    def after_step(self, step):
        self.note("after_step", updated=step.updated, index=step.index)

    @uda.hookimpl
    def predict(self, model, batch):
        self.note("predict", role=batch.role, training=model.training)
        score, label = batch.logits.softmax(1).max(1)
        return uda.Prediction(label, score, unknown=label == 0)

    @uda.hookimpl
    def reject(self, model, batch, prediction):
        self.note("reject", role=batch.role, label=prediction.label)
        return replace(prediction, unknown=prediction.unknown | (prediction.label == 1))

    @uda.hookimpl
    def adapt(self, model, batch):
        self.note("adapt", index=batch.index, inference=torch.is_inference_mode_enabled())
        return torch.nn.functional.one_hot(torch.full((len(batch),), 2), model.num_classes).float()


class AutomaticRecorder(Recorder):
    """The same in automatic optimisation."""

    manual = False
    optimise = None


def data(**options):
    options = {"batch_size": BATCH, "epoch_steps": STEPS, "held_out_fraction": 0.25, "seed": 3, **options}
    return DataModule(TinyTask(), source="source", target="target", **options)


def make(plugins, **options):
    torch.manual_seed(0)
    return uda.UDA(MLP([8]), plugins, bottleneck=6, **options)


@pytest.fixture
def trainer(quiet_trainer):
    return lambda **options: quiet_trainer(max_epochs=EPOCHS, inference_mode=False, **options)


def fit(trainer, plugins, model_options=None, data_options=None, **options):
    model = make(plugins, **(model_options or {}))
    running = trainer(**options)
    running.fit(model, data(**(data_options or {})))
    return model, running


def test_recorder_fills_every_hook():
    assert set(hooks_of(Recorder)) == set(HOOKS)
    assert set(HOOKS) - set(hooks_of(AutomaticRecorder)) == {"optimise"}


def test_order_in_a_step(trainer):
    model, _ = fit(trainer, {"rec": AutomaticRecorder()})
    order = model.plugins["rec"].order
    start = order.index("prepare_batch")
    step = order[start : order.index("after_step") + 1]
    forwards = [name for name in step if name != "transform_features"]
    assert forwards == [
        "prepare_batch", "align_features", "pseudo_label", "refine_classifier", "weigh_objectives",
        "after_step",
    ]  # fmt: skip
    assert order[:start].count("refresh") == 1
    assert {"build", "data_needs", "param_groups"} <= set(order[:start])
    for hook in ("prepare_batch", "align_features", "pseudo_label", "refine_classifier", "after_step"):
        assert order.count(hook) == STEPS * EPOCHS
    assert order.count("refresh") == EPOCHS
    assert order.count("param_groups") == 1


def test_build_knows_the_sizes(trainer):
    model, _ = fit(trainer, {"rec": AutomaticRecorder()})
    calls = model.plugins["rec"].seen("build")
    assert calls[0]["dims"] == (6, 3)
    assert calls[0]["sizes"] == data().sizes


def test_data_needs_are_served(trainer):
    model, _ = fit(trainer, {"rec": AutomaticRecorder()})
    steps = model.plugins["rec"].seen("prepare_batch")
    for number, seen in enumerate(steps):
        assert seen["views"] == ["strong", "weak", "x"]
        assert seen["source_views"] == ["weak", "x"]
        assert seen["held_out"] == BATCH
        assert seen["target_y"] is None
        assert not seen["computed"]
        assert seen["index"] == number
        assert seen["batch_idx"] == number % STEPS
        assert seen["progress"] == pytest.approx(number / (STEPS * EPOCHS))
    counts = torch.stack([s["y"] for s in steps]).flatten().bincount()
    assert counts.max() - counts.min() <= 1  # class balanced
    target = {int(i) for s in steps for i in s["rows"][0]}
    held_out = {int(i) for s in steps for i in s["rows"][1]}
    assert held_out
    assert not target & held_out


def test_refresh_sees_whole_domains_without_gradient(trainer):
    model, _ = fit(trainer, {"rec": AutomaticRecorder()})
    sizes = data().sizes
    for seen in model.plugins["rec"].seen("refresh"):
        assert not seen["grad"]
        assert seen["training"]
        assert seen["sources"] == ["source"]
        assert seen["source"].features.shape == (sizes["source"], 6)
        assert seen["source"].y.bincount().min() >= 14  # three classes of 16 rows, a share held back
        assert seen["target"].logits.shape == (sizes["target"], 3)
        assert seen["target"].y is None


def test_refresh_every_few_steps(trainer):
    class Often(uda.Plugin):
        times = 0

        @uda.hookimpl
        def data_needs(self):
            return uda.DataNeeds(refresh="target", refresh_every=2)

        @uda.hookimpl
        def refresh(self, bank):
            assert bank.source is None
            self.times += 1

    model, _ = fit(trainer, {"often": Often()})
    assert model.plugins["often"].times == STEPS * EPOCHS // 2


def test_pool_equals_the_models_own_features(trainer):
    recorder = AutomaticRecorder()
    model = make({"rec": recorder}, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    running = trainer()
    module = data()
    running.fit(model, module)
    pool = recorder.seen("refresh")[0]["target"]
    fresh = make({"rec": AutomaticRecorder()}, **module.spec).eval()
    weights = {k: v for k, v in model.state_dict().items() if "running" not in k and "num_batches" not in k}
    fresh.load_state_dict(weights, strict=False)
    (batch,) = list(module.pool_dataloader("target"))
    torch.testing.assert_close(pool.logits, fresh(batch["x"]).detach())


def test_objectives_and_pseudo_labels_are_passed_on(trainer):
    model, _ = fit(trainer, {"rec": AutomaticRecorder()})
    rec = model.plugins["rec"]
    assert rec.seen("align_features")[0]["objectives"] == ["classification"]
    assert rec.seen("align_features")[0]["pseudo"] is None
    assert rec.seen("pseudo_label")[0]["objectives"] == ["classification", "rec/own"]
    pseudo = rec.seen("refine_classifier")[0]["pseudo"]
    assert pseudo.y.shape == (BATCH,)
    assert not pseudo.soft.requires_grad
    assert rec.seen("weigh_objectives")[0]["names"] == ["classification", "rec/own", "rec/pseudo"]
    gram = rec.seen("weigh_objectives")[0]["gram"]
    assert gram.shape == (3, 3)
    torch.testing.assert_close(gram, gram.T)
    assert all(s["grad"] for s in rec.seen("align_features"))


def test_after_step_is_without_gradient_and_knows_of_accumulation(trainer):
    model, running = fit(trainer, {"rec": AutomaticRecorder()}, accumulate_grad_batches=2)
    seen = model.plugins["rec"].seen("after_step")
    assert [s["updated"] for s in seen] == [False, True, True] * EPOCHS
    assert not any(s["grad"] for s in seen)
    assert [s["index"] for s in seen] == list(range(STEPS * EPOCHS))
    assert running.global_step == 2 * EPOCHS


def test_param_groups_claim_and_scale(trainer):
    recorder = AutomaticRecorder()
    _, running = fit(trainer, {"rec": recorder}, {"schedule": uda.optim.Constant()})
    groups = {g["name"]: g for g in running.optimizers[0].param_groups}
    assert groups["own"]["lr"] == pytest.approx(0.5 * groups["head"]["lr"])
    assert groups["own"]["weight_decay"] == 0.0
    assert groups["own"]["params"][0] is recorder.net.weight
    assert groups["rec"]["params"] == [recorder.net.bias]  # the rest trains at the head's rate
    assert groups["rec"]["lr"] == groups["head"]["lr"]


def test_parameter_claimed_twice_is_an_error(trainer):
    class Claims(uda.Plugin):
        @uda.hookimpl
        def param_groups(self, model):
            return [{"params": model.head.parameters(), "name": self.key}]

    with pytest.raises(uda.UDAError, match=r"claimed twice, by 'one' and by 'two'"):
        fit(trainer, {"one": Claims(), "two": Claims()})


def test_manual_optimisation_goes_through_optimise(trainer):
    model, running = fit(trainer, {"rec": Recorder()})
    rec = model.plugins["rec"]
    assert rec.order.count("optimise") == STEPS * EPOCHS
    assert rec.order.count("after_step") == STEPS * EPOCHS
    assert rec.order.count("weigh_objectives") == 0
    assert all(s["updated"] for s in rec.seen("after_step"))
    assert rec.seen("optimise")[0]["names"] == ["classification", "rec/own", "rec/pseudo"]
    assert running.lr_scheduler_configs[0].scheduler.last_epoch == STEPS * EPOCHS


def test_manual_without_result_takes_the_plain_sum(trainer):
    by_hand, _ = fit(trainer, {"rec": Recorder()})
    plain, _ = fit(trainer, {"rec": Recorder(steps_by_hand=False)})
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)


def test_manual_accumulates_and_clips(trainer):
    model, _ = fit(trainer, {"rec": Recorder()}, {"manual_accumulate": 2, "manual_clip": 0.1})
    assert [s["updated"] for s in model.plugins["rec"].seen("after_step")] == [False, True, True] * EPOCHS


def test_first_result_wins_and_order_is_that_of_the_config(trainer):
    log: list[str] = []

    class Labels(uda.Plugin):
        def __init__(self, answer: int | None) -> None:
            super().__init__()
            self.answer = answer

        @uda.hookimpl
        def pseudo_label(self, step):
            log.append(self.key)
            return (
                None
                if self.answer is None
                else uda.PseudoLabels(torch.full((len(step.target),), self.answer))
            )

        @uda.hookimpl
        def refine_classifier(self, step):
            assert (step.target.pseudo.y == 1).all()
            return {"x": 0.1 * step.target.logits.square().mean()}

    plugins = {"none": Labels(None), "one": Labels(1), "two": Labels(2)}
    model, _ = fit(trainer, plugins)
    assert log == ["none", "one"] * STEPS * EPOCHS
    assert list(model.plugins) == ["none", "one", "two"]


def test_features_are_chained(trainer):
    class Scale(uda.Plugin):
        def __init__(self, factor: float, shift: float) -> None:
            super().__init__()
            self.factor, self.shift = factor, shift

        @uda.hookimpl
        def transform_features(self, features):
            return features * self.factor + self.shift

    spec = data().spec
    plain, chained = make({}, **spec).eval(), make({"a": Scale(2, 1), "b": Scale(3, 0)}, **spec).eval()
    chained.load_state_dict(plain.state_dict())
    x = torch.rand(5, 6)
    torch.testing.assert_close(chained.batch(x).features, (2 * plain.batch(x).features + 1) * 3)


def test_transform_knows_the_domain(trainer):
    class HeldOut(AutomaticRecorder):
        @uda.hookimpl
        def refine_classifier(self, step):
            return {"held": 0.0 * step.held_out.logits.sum() + step.target.logits.square().mean()}

    model, _ = fit(trainer, {"rec": HeldOut()})
    roles = {(s["role"], s["name"]) for s in model.plugins["rec"].seen("transform_features")}
    assert roles == {("source", "source"), ("target", "target"), ("held_out", "target")}


def test_held_out_and_views_only_where_asked_for(trainer):
    class Plain(uda.Plugin):
        @uda.hookimpl
        def align_features(self, step):
            assert step.held_out is None
            assert list(step.target.views) == list(step.source.views) == ["x"]
            with pytest.raises(KeyError, match="ask for it in data_needs"):
                step.target.view("strong")
            return {"gap": step.target.features.mean()}

    fit(trainer, {"plain": Plain()})


def test_source_free_run_loads_no_source(trainer):
    class Free(uda.Plugin):
        @uda.hookimpl
        def data_needs(self):
            return uda.DataNeeds(source=False)

        @uda.hookimpl
        def refine_classifier(self, step):
            assert step.source is None
            assert not step.sources
            return {"entropy": uda.losses.mean_entropy(step.target.logits)}

    fit(trainer, {"free": Free()})


def test_adapt_runs_in_test_and_predict_with_gradients(trainer):
    model, running = fit(trainer, {"rec": AutomaticRecorder()})
    rec = model.plugins["rec"]
    assert rec.order.count("adapt") == 0  # not in validation
    rec.calls.clear()
    metrics = running.test(model, data(eval_batch_size=16), verbose=False)
    seen = rec.seen("adapt")
    assert [s["index"].tolist() for s in seen] == [list(range(i, i + 16)) for i in (0, 16, 32)]
    assert all(s["grad"] and not s["inference"] for s in seen)
    assert any("test/oracle/target_accuracy" in m for m in metrics)
    rec.calls.clear()
    out = running.predict(model, data(eval_batch_size=16))
    assert rec.order.count("adapt") == 3
    assert torch.cat([o["label"] for o in out]).unique().tolist() == [2]  # its logits are used


def test_adapt_refuses_inference_mode(quiet_trainer):
    model = make({"rec": AutomaticRecorder()})
    with pytest.raises(uda.UDAError, match="inference_mode=False"):
        quiet_trainer().test(model, data(), verbose=False)


def test_before_evaluation_comes_once_and_first(trainer):
    model, running = fit(trainer, {"rec": AutomaticRecorder()})
    rec = model.plugins["rec"]
    assert rec.order.count("before_evaluation") == EPOCHS
    for evaluate in (running.test, running.predict):
        rec.calls.clear()
        evaluate(model, data())
        assert rec.order[0] == "before_evaluation"
        assert rec.order.count("before_evaluation") == 1
    assert not any(s["training"] or s["grad"] for s in rec.seen("before_evaluation"))


def test_a_method_of_several_updates_a_batch_is_logged(trainer):
    """By batches: steps of the optimiser come in pairs here, and pass over every second one."""

    class Twice(uda.Plugin):
        manual = True

        @uda.hookimpl
        def optimise(self, step, objectives):
            for phase in "ab":
                again = step.model.again(step)
                step.model.manual_update(step.model.total(again), phase=phase)
            return True

    _, running = fit(trainer, {"twice": Twice()}, log_every_n_steps=2)
    assert running.global_step == 2 * STEPS * EPOCHS
    assert "train/classification" in running.callback_metrics
    assert "train/loss" in running.callback_metrics


def test_what_refresh_leaves_is_logged_later(trainer):
    class Tells(uda.Plugin):
        @uda.hookimpl
        def data_needs(self):
            return uda.DataNeeds(refresh="target")

        @uda.hookimpl
        def refresh(self, bank):
            self.log_later(size=len(bank.target), first=lambda: bank.target.logits[0, 0])

        @uda.hookimpl
        def after_step(self, step):
            self.log_later(lost=1.0)

    _, running = fit(trainer, {"tells": Tells()}, log_every_n_steps=STEPS)
    assert running.callback_metrics["train/tells/size"] == data().spec["sizes"]["target"]
    assert "train/tells/first" in running.callback_metrics


def test_predict_marks_unknowns(trainer):
    model, running = fit(trainer, {"rec": AutomaticRecorder()})
    rec = model.plugins["rec"]
    assert not any(s["training"] for s in rec.seen("predict"))
    assert {s["role"] for s in rec.seen("reject")} == {"source", "target"}
    rec.__class__ = type("NoAdapt", (AutomaticRecorder,), {"adapt": None})
    out = running.predict(make({"rec": rec}, **data().spec), data())
    label, unknown = (torch.cat([o[k] for o in out]) for k in ("label", "unknown"))
    assert torch.equal(unknown, label <= 1)  # that of ``predict``, and what ``reject`` adds to it


def test_weights_reach_the_shared_part_only(trainer):
    """With weight 2 on the only objective the backbone gets twice the gradient and the head the plain one."""

    class Twice(uda.Plugin):
        def __init__(self, weight: float | None) -> None:
            super().__init__()
            self.weight = weight

        @uda.hookimpl
        def weigh_objectives(self, objectives):
            return None if self.weight is None else {"classification": self.weight}

    grads = []
    for weight in (None, 2.0):

        class Keep(L.Callback):
            def on_before_optimizer_step(self, trainer, model, optimizer):
                grads.append({n: p.grad.clone() for n, p in model.named_parameters()})

        fit(trainer, {"twice": Twice(weight)}, max_steps=1, callbacks=[Keep()])
    for name, plain in grads[0].items():
        factor = 1 if name.startswith("head") else 2
        torch.testing.assert_close(grads[1][name], factor * plain, msg=name)


def test_a_copy_calls_its_own_plugins(trainer):
    model = make({"rec": AutomaticRecorder()}, **data().spec)
    copied = copy.deepcopy(model)
    before = len(model.plugins["rec"].calls)
    copied.hooks.all("build", model=copied)
    assert len(copied.plugins["rec"].calls) == before + 1
    assert len(model.plugins["rec"].calls) == before


def test_error_in_a_hook_names_plugin_and_hook(trainer):
    class Fails(uda.Plugin):
        @uda.hookimpl
        def align_features(self, step):
            return step.nothing

    with pytest.raises(
        uda.PluginError, match=r"Plugin 'bad' failed in hook 'align_features': AttributeError"
    ):
        fit(trainer, {"bad": Fails()})


def test_unknown_argument_of_a_hook_is_named():
    class Wrong(uda.Plugin):
        @uda.hookimpl
        def align_features(self, batch):
            return {}

    with pytest.raises(uda.UDAError, match=r"hook 'align_features' has no argument 'batch'\. It offers step"):
        make({"wrong": Wrong()})
