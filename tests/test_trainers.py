"""The claims of docs/trainers.md and docs/coming-from.md, against the frameworks themselves."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.sampling import sample_mixup

from .cases import RANKS, applied, results_of_ranks
from .test_package import no_accelerator, run_blocks, timm_flags

__all__ = ["no_accelerator"]
Hook = Callable[[int], None]
INPUT, TARGET = torch.rand(8, 4), torch.randint(3, (8,))
LOADER = DataLoader(TensorDataset(INPUT, TARGET), batch_size=4)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length 8"),  # Composer's, of a last batch
    pytest.mark.usefixtures("no_accelerator", "in_tmp_path"),
]


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # trainers write into the current directory


needed: Callable[[str], Any] = importlib.import_module


def blocks_that_need(package: str, page: str = "trainers") -> dict[str, Any]:
    return run_blocks(f"docs/{page}.md", "import torch\n", f"# needs {package}\n")


class Net(nn.Module):
    """A model that mixes in its forward, and notes for each training batch whether it was mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mixed = MixUp(1.0), list[bool]()
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is None  # Hugging Face takes them out
        mixed = self.mixer(input)
        if torch.is_grad_enabled():
            self.mixed.append(not torch.equal(mixed, input))
        return self.net(mixed)  # type: ignore[no-any-return]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# Two epochs in each trainer, with a call before each


def calling(base: Any, name: str, call: Callable[..., None]) -> Any:
    return type("Before", (base,), {name: call})()  # a callback with one method


def hugging_face(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    callback = calling(
        TrainerCallback, "on_epoch_begin", lambda _self, _args, state, *_, **__: before(int(state.epoch))
    )
    arguments = TrainingArguments(
        "out", num_train_epochs=2, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True
    )
    Trainer(
        model, arguments, train_dataset=[{"input": x, "labels": y} for x, y in zip(INPUT, TARGET, strict=True)],
        callbacks=[callback], compute_loss_func=lambda outputs, labels, **_: criterion(outputs, labels),
    ).train()  # fmt: skip


def lightning(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def on_train_epoch_start(self) -> None:
            before(self.current_epoch)

        def training_step(self, batch: Any) -> Tensor:
            return criterion(model(batch[0]), batch[1])  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    average = lightning.pytorch.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1)
    silent: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[average], **silent).fit(Module(), LOADER)


def ignite(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    engines = needed("ignite.engine")
    trainer = engines.create_supervised_trainer(model, sgd(model), criterion)
    trainer.add_event_handler(engines.Events.EPOCH_STARTED, lambda engine: before(engine.state.epoch - 1))
    trainer.run(LOADER, max_epochs=2)


def skorch(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    base = needed("skorch.callbacks").Callback
    callback = calling(base, "on_epoch_begin", lambda _self, net, **_: before(len(net.history) - 1))
    options = {"max_epochs": 2, "batch_size": 4, "train_split": None, "callbacks": [callback]}
    needed("skorch").NeuralNet(model, criterion, **options).fit(INPUT.numpy(), TARGET.numpy())


def fastai(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    base, loaders = needed("fastai.callback.core").Callback, needed("fastai.data.core").DataLoaders(LOADER, LOADER)
    callback = calling(base, "before_epoch", lambda self: before(self.epoch))
    needed("fastai.learner").Learner(loaders, model, loss_func=criterion, cbs=[callback]).fit(2, lr=0.1)


def composer(model: Net, criterion: MixUpCriterion, before: Hook) -> None:
    callback = calling(
        needed("composer").Callback, "epoch_start", lambda _self, state, _logger: before(state.timestamp.epoch.value)
    )
    classifier = needed("composer.models").ComposerClassifier(model, num_classes=3, loss_fn=criterion)
    fit_composer(classifier, callbacks=[callback], eval_dataloader=LOADER)


def fit_composer(model: Any, **options: Any) -> None:
    needed("composer").Trainer(
        model=model, train_dataloader=LOADER, optimizers=sgd(model), max_duration="2ep", device="cpu", **options
    ).fit()


TRAINERS = {
    "transformers": hugging_face, "lightning": lightning, "ignite": ignite, "skorch": skorch, "fastai": fastai,
    "composer": composer,
}  # fmt: skip


@pytest.mark.parametrize("package", [pytest.param(name, marks=pytest.mark.needs(name)) for name in TRAINERS])
@pytest.mark.parametrize("off", ("p", "mode"))
def test_p_turns_mixing_off_in_every_trainer_and_eval_mode_in_lightning_alone(package: str, off: str) -> None:
    model = Net()

    def before(epoch: int) -> None:
        if off == "p":
            model.mixer.p = float(epoch == 0)
        else:
            model.mixer.train(epoch == 0)

    TRAINERS[package](model, MixUpCriterion(nn.CrossEntropyLoss(), model.mixer), before)
    assert model.mixed[:2] == [True, True]
    assert len(model.mixed) == (6 if package == "lightning" else 4)  # weight averaging adds one for batch norm
    assert any(model.mixed[2:]) == (off == "mode" and package != "lightning")


# Composer, MONAI, skorch, fastai


class Seeded(MixUp):
    """Its draws depend on the input alone."""

    def sample(self, input: Tensor) -> Mix:
        return sample_mixup(len(input), 1.0, generator=torch.Generator().manual_seed(int(1e6 * input.sum())))


@pytest.mark.needs("composer")
def test_composer_trains_to_the_weights_of_a_plain_loop_and_keeps_the_keys() -> None:
    mixed, mixer, net = blocks_that_need("composer")["Mixed"], Seeded(), nn.Linear(4, 3)
    model = mixed(copy.deepcopy(net), Seeded(), num_classes=3)
    fit_composer(model)

    criterion, optimizer = MixUpCriterion(nn.CrossEntropyLoss(), mixer), sgd(net)
    for input, target in [*LOADER, *LOADER]:
        optimizer.zero_grad()
        criterion(net(mixer(input)), target).backward()
        optimizer.step()
    weights = {f"module.{name}": value for name, value in net.state_dict().items()}
    torch.testing.assert_close(model.state_dict(), weights)


@pytest.mark.needs("monai")
def test_segmentation_with_monai_takes_the_label_of_each_voxels_source() -> None:
    page = blocks_that_need("monai", "coming-from")
    segmenter, criterion, volume, labels = (page[name] for name in ("segmenter", "criterion", "volume", "labels"))
    output, (lam, index) = segmenter(volume), applied(segmenter.mixer)
    assert set(lam.unique().tolist()) == {0.0, 1.0}
    pasted = torch.where(lam == 1, labels, labels[index])
    for y in pasted, labels:
        torch.testing.assert_close(criterion(output, labels.float()), page["loss"](output, y.float()))
        output = segmenter.eval()(volume)  # then the plain loss


@pytest.mark.needs("skorch")
def test_skorch_trains_on_the_mixture_and_returns_probabilities_also_when_cloned() -> None:
    page = blocks_that_need("skorch")
    images, labels, (input, target) = page["images"], page["labels"], page["data"].tensors
    for net in page["net"], needed("sklearn.base").clone(page["net"]).fit(images, labels):
        torch.testing.assert_close(torch.as_tensor(net.predict_proba(images)).sum(1), torch.ones(32))
        for mode in (True, False):
            output, mix = net.module_.train(mode)(input), net.module_[0].last_mix
            assert (mix is not None) == mode
            expected = MixUpCriterion(nn.CrossEntropyLoss())(output, target, mix)
            torch.testing.assert_close(net.get_loss(output, labels), expected)


@pytest.mark.needs("fastai")
def test_fastai_returns_probabilities() -> None:
    learners, loaders = needed("fastai.learner"), needed("fastai.data.core").DataLoaders(LOADER, LOADER)
    model = Net()
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), model.mixer)
    criterion.activation, criterion.decodes = partial(torch.softmax, dim=-1), partial(torch.argmax, dim=-1)
    probabilities, _ = learners.Learner(loaders, model, loss_func=criterion).get_preds(dl=LOADER)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(8))


# Loaders, and an attribute of a Sequential


@pytest.mark.needs("accelerate")
def test_accelerate_joins_a_mix_as_if_it_held_samples() -> None:
    concatenate, mixes = needed("accelerate.utils").concatenate, [sample_mixup(4, per_sample=True) for _ in range(2)]
    assert torch.equal(concatenate(mixes).index[4:], mixes[1].index)  # samples of the first batch
    with pytest.raises(RuntimeError, match="zero-dimensional"):
        concatenate([sample_mixup(4) for _ in range(2)])


def test_flags_of_timm_take_the_spatial_dims_of_clips() -> None:
    page = run_blocks("docs/coming-from.md", "import torch\n", "def mixer_of_flags")
    choice = page["mixer_of_flags"](timm_flags(mixup=0.8, cutmix=1.0), spatial_dims=2)
    assert choice.mixers[1](torch.rand(4, 3, 5, 8, 8)).shape == (4, 3, 5, 8, 8)
    assert applied(choice.mixers[1]).lam.shape[2:] == (1, 8, 8)


# Gradients of the Hugging Face recipe


class Model(nn.Linear):
    def forward(self, pixel_values: Tensor, labels: None = None) -> dict[str, Tensor]:  # type: ignore[override]
        assert labels is None
        return {"logits": super().forward(pixel_values)}


def hugging_face_step(folder: str) -> tuple[Tensor, Tensor]:
    """The gradient of one update by the recipe of docs/trainers.md, without mixing, and the plain one."""
    from transformers import Trainer, TrainingArguments

    recipe = run_blocks("docs/trainers.md", "import torch\n", "def mixing(")
    importlib.import_module("accelerate.state").AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    net = Model(4, 3)
    input, target = torch.randn(16, 4), torch.randint(3, (16,))
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(net(input)["logits"], target), [net.weight])
    before = net.weight.detach().clone()

    model, loss_of_outputs = recipe["mixing"](net, MixUp(p=0))
    arguments = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=16 // RANKS // 4, gradient_accumulation_steps=4,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
    )  # fmt: skip
    rows = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(input, target, strict=True)]
    Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss_of_outputs).train()
    return before - net.weight.detach(), expected


@pytest.mark.needs("transformers", "accelerate")
def test_hugging_face_gradients_are_the_plain_ones_over_accumulation_steps_and_processes(tmp_path: Path) -> None:
    for gradients in results_of_ranks(partial(hugging_face_step, str(tmp_path)), tmp_path):
        torch.testing.assert_close(*gradients)
