"""Claims of the guide, the criterion page and the questions that a block alone does not prove."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate

from mixup_nn import CutMix, Mixer, MixUp, MixUpCriterion
from mixup_nn.functional import mix_cross_entropy, mix_inputs

from .cases import applied
from .reference import mixed, one_hot, pairs, positions, share
from .test_package import FENCE, ROOT, no_accelerator, run_blocks

__all__ = ["no_accelerator"]  # a fixture
Page = dict[str, Any]
GUIDE = "docs/guide.md"
seeds = pytest.mark.parametrize("seed", range(3))


def guide(*blocks: str, **names: Any) -> Page:
    """What the first block of the guide defines, changed by ``names``, and then those with these strings."""
    page = run_blocks(GUIDE, "import torch\n")
    page.update(names)
    found = [block for block in FENCE.findall((ROOT / GUIDE).read_text()) if any(each in block for each in blocks)]
    assert len(found) == len(blocks)
    for block in found:
        exec(block, page)
    return page


# All pages


@pytest.mark.parametrize("name", ("guide", "criterion", "faq", "recipes"))
def test_code_of_a_page_fits_into_its_column(name: str) -> None:
    for block in FENCE.findall((ROOT / "docs" / f"{name}.md").read_text()):
        assert max(map(len, block.splitlines())) <= 88


# The mixer in the loop, and turning it off


def test_a_mixer_that_is_an_attribute_is_off_in_validation() -> None:
    page = guide("total = sum(criterion(model(x), y)")
    plain = F.cross_entropy(page["model"](page["x"]), page["y"])
    torch.testing.assert_close(page["total"] / 2, plain)
    assert page["mixer"].last_mix is None


def test_a_sequential_calls_the_attribute_as_its_last_layer_and_mixes_the_logits() -> None:
    input, mixer, net = torch.rand(6, 4), MixUp(1.0), nn.Sequential(nn.Linear(4, 3))
    net.mixer = mixer
    drawn = mixer(input)
    mix = applied(mixer)
    logits = net(drawn)
    assert applied(mixer) is not mix
    torch.testing.assert_close(logits, mix_inputs(net[0](drawn), applied(mixer)))
    assert applied(mixer).lam.min() < 1


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("callback, unmixed", (("LastEpochsUnmixed", 4), ("EvalMode", 0)))
def test_hugging_face_trains_the_last_epochs_unmixed_by_p_but_not_by_eval_mode(
    callback: str, unmixed: int, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    mixer, shares = MixUp(1.0), []
    page = guide("class LastEpochsUnmixed", mixer=mixer)

    class EvalMode(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            mixer.train(state.epoch < args.num_train_epochs - 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer, self.net = mixer, nn.Linear(4, 3)

        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = self.net(self.mixer(pixels))
            shares.append(float(applied(self.mixer).share))
            return {"loss": MixUpCriterion(nn.CrossEntropyLoss(), self.mixer)(output, labels), "logits": output}

    rows = [{"pixels": torch.rand(4), "labels": k % 3} for k in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=4, per_device_train_batch_size=4, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    callbacks = {"LastEpochsUnmixed": page["LastEpochsUnmixed"], "EvalMode": EvalMode}
    Trainer(Model(), arguments, train_dataset=rows, callbacks=[callbacks[callback]()]).train()
    assert [value == 1 for value in shares] == [False] * (8 - unmixed) + [True] * unmixed


def drawn_share(mixer: Mixer, samples: list[list[Tensor]]) -> float:
    return float(mixer.sample(default_collate(samples)[0]).share)


def test_a_p_changed_later_never_reaches_workers_that_persist() -> None:
    for persistent in (False, True):
        mixer = MixUp(1.0)
        options: dict[str, Any] = {"num_workers": 1, "persistent_workers": persistent}
        loader = DataLoader(TensorDataset(torch.rand(4, 2)), 2, collate_fn=partial(drawn_share, mixer), **options)
        assert all(value < 1 for value in loader)
        mixer.p = 0.0
        assert all((value == 1) is not persistent for value in loader)


def test_a_mixer_in_a_part_in_eval_mode_does_not_mix_and_one_outside_does() -> None:
    page = guide("backbone, head")
    assert applied(page["mixer"]).share < 1
    assert page["head"].weight.grad.abs().sum() > 0
    inside = nn.Sequential(page["mixer"], page["backbone"]).eval()
    model = nn.Sequential(inside, page["head"]).train()
    inside.eval()
    output = model(page["x"])
    torch.testing.assert_close(page["criterion"](output, page["y"]), F.cross_entropy(output, page["y"]))


# Inputs


@seeds
def test_pixels_of_channels_last_are_kept_or_taken_whole(seed: int) -> None:
    page = guide("from einops.layers")
    torch.manual_seed(seed)
    input = torch.rand(6, 8, 8, 3)
    output, mix = page["channels_last"](input), applied(page["cutmix"])
    for i, j, _ in pairs(mix):
        for row, column in positions((8, 8)):
            source = i if mix.lam[0, 0, row, column] == 1 else j
            assert torch.equal(output[i, row, column], input[source, row, column])


def test_rows_of_a_table_are_mixed_after_their_codes_are_embedded_and_nan_stays_at_home() -> None:
    page = guide("class Table", y=torch.randint(10, (12,)))
    model, codes, numbers = page["model"], page["codes"], page["numbers"]
    output, mix = model(codes, numbers), applied(model.mixer)
    rows = []
    for i in range(12):
        embedded = [table.weight[codes[i, k]] for k, table in enumerate(model.embeddings)]
        filled = [0.0 if value != value else value for value in numbers[i].tolist()]
        rows.append(torch.cat((*embedded, torch.tensor(filled), numbers[i].isnan().float())))
    expected = F.linear(mixed(torch.stack(rows), mix), model.net.weight.double(), model.net.bias.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


# Metrics, pictures, replay


@seeds
def test_metrics_of_an_epoch_count_both_labels_with_their_shares(seed: int) -> None:
    torch.manual_seed(seed)
    batches = [(torch.rand(12, 3, 8, 8), torch.randint(2, (12,))) for _ in range(2)]
    mixer = MixUp(1.0)
    model = nn.Sequential(mixer, nn.Flatten(), nn.Linear(192, 2))
    page = guide("from sklearn.metrics", loader=batches, model=model, mixer=mixer)
    scores, labels, weights = (page[name].double() for name in ("scores", "labels", "weights"))
    torch.testing.assert_close(weights.sum(), torch.tensor(24.0).double())

    own, other = labels == 1, labels == 0
    above = (scores[own, None] > scores[other]).double() + (scores[own, None] == scores[other]) / 2
    of_pairs = weights[own, None] * weights[other]
    torch.testing.assert_close(page["auroc"], float((above * of_pairs).sum() / of_pairs.sum()))

    at = scores.unique()
    found = torch.stack([weights[own & (scores >= level)].sum() for level in at])
    precision = found / torch.stack([weights[scores >= level].sum() for level in at])
    steps = (found - torch.cat((found[1:], torch.zeros(1)))) / weights[own].sum()
    torch.testing.assert_close(float(page["precision"]), float((precision * steps).sum()))

    true = weights[own & (scores > 0)].sum()
    f1 = 2 * true / (weights[scores > 0].sum() + weights[own].sum())
    torch.testing.assert_close(float(f1_score(labels, scores > 0, sample_weight=weights)), float(f1))


def test_a_drawn_batch_shows_both_labels_with_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = guide("import matplotlib", mixer=CutMix(per_sample=True))
    assert Path("batch.png").stat().st_size > 1000
    for (i, j, own), axis in zip(pairs(page["mix"]), page["axes"].flat, strict=True):
        assert axis.get_title() == f"{page['y'][i]}: {own:.2f}, {page['y'][j]}: {1 - own:.2f}"
        assert torch.equal(torch.as_tensor(axis.images[0].get_array().data).movedim(-1, 0), page["mixed"][i])


def test_a_replay_repeats_the_dropout_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 10))

    page = guide("torch.save((x, y, mixer.last_mix, state)", Network=network, mixer=MixUp(1.0))
    assert torch.equal(page["loss"], page["again"])
    assert not torch.equal(page["criterion"](page["model"](page["mixed"]), page["y"], page["mix"]), page["loss"])


# Losses and targets


def test_stored_predictions_are_targets_and_those_of_a_mixture_are_not() -> None:
    page = guide("stored = teacher")
    y, mix, output = page["y"], applied(page["mixer"]), page["output"]
    targets = mixed(page["stored"], mix, of_positions=False)
    expected = mix_cross_entropy(output, y, mix) - (targets * output.double().log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(page["loss"].double(), expected.double())


def test_a_label_map_of_floats_is_exact_under_cutmix_where_targets_are_interpolated() -> None:
    def dice(output: Tensor, labels: Tensor) -> Tensor:  # makes its target dense itself, as MONAI's does
        target, probability = one_hot(labels[:, 0].long(), 4), output.softmax(1)
        return 1 - 2 * (target * probability).sum() / (target + probability).sum()

    labels, cutmix = torch.randint(4, (6, 1, 8, 8)).float(), CutMix()
    cutmix(torch.rand(6, 3, 8, 8))
    output, mix = torch.randn(6, 4, 8, 8), applied(cutmix)
    hard = labels.where(mix.lam == 1, labels[mix.index])
    loss = MixUpCriterion(dice, cutmix, interpolate_loss=False)(output, labels)
    torch.testing.assert_close(loss, dice(output, hard))


@pytest.mark.needs("kornia")
def test_focal_losses_of_kornia_are_linear_and_the_usual_one_is_not() -> None:
    from kornia.losses import BinaryFocalLossWithLogits

    def focal(output: Tensor, tags: Tensor) -> Tensor:  # torchvision's
        losses, p = F.binary_cross_entropy_with_logits(output, tags, reduction="none"), output.sigmoid()
        return (losses * (1 - p * tags - (1 - p) * (1 - tags)) ** 2).mean(1)

    mix, output = MixUp(1.0, per_sample=True).sample(torch.rand(6, 4)), torch.randn(6, 4)
    tags = (torch.rand(6, 4) < 0.4).float()
    for loss, linear in ((BinaryFocalLossWithLogits(0.25, reduction="none"), True), (focal, False)):
        losses, targets = (MixUpCriterion(loss, interpolate_loss=way)(output, tags, mix) for way in (True, False))
        assert torch.allclose(losses, targets, atol=1e-6) is linear


# Mixers of one's own


def test_masks_per_sample_have_one_share_and_a_mirrored_mixer_keeps_p() -> None:
    page = guide("class Blobs")
    input = torch.rand(6, 3, 8, 8)
    mix = page["Blobs"]().sample(input)
    assert mix.lam.shape == (6, 1, 8, 8)
    assert len({share(mix, i).item() for i in range(6)}) == 1
    assert not torch.equal(mix.lam[0], mix.lam[1])
    logits, y = torch.randn(6, 10), torch.randint(10, (6,))
    one = MixUpCriterion(lambda output, y: F.cross_entropy(output, y))(logits, y, mix._replace(lam=mix.share[0]))
    torch.testing.assert_close(one, MixUpCriterion(nn.CrossEntropyLoss())(logits, y, mix))

    mirrored = page["Mirrored"](1.0, p=0.5, per_sample=True)
    lam, index = mirrored.sample(torch.rand(400, 1))
    assert index.tolist() == list(reversed(range(400)))
    assert 150 < (lam == 1).sum() < 250


# Activation checkpointing


@pytest.mark.parametrize("restored", (True, False))
def test_a_draw_in_a_checkpoint_is_drawn_again_in_backward(restored: bool) -> None:
    x, y, mixer, net = torch.rand(8, 4), torch.randint(3, (8,)), MixUp(1.0), nn.Linear(4, 3)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": restored}
    output = checkpoint(nn.Sequential(mixer, net), x, **options)
    loss, mix = MixUpCriterion(nn.CrossEntropyLoss(), mixer)(output, y), applied(mixer)
    expected = mix_cross_entropy(net(mix_inputs(x, mix)), y, mix)
    torch.testing.assert_close(loss, expected)
    (right,) = torch.autograd.grad(expected, [net.weight])
    loss.backward()
    assert net.weight.grad is not None
    assert torch.allclose(right, net.weight.grad) is restored
    assert torch.equal(applied(mixer).lam, mix.lam) is restored


def test_a_mix_passed_is_right_in_every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        gradients.append(run_blocks("docs/faq.md")["net"].weight.grad)
        monkeypatch.setattr("torch.utils.checkpoint.checkpoint", lambda function, *args, **_: function(*args))
    torch.testing.assert_close(*gradients)
