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

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion
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


@pytest.mark.parametrize("name", ("guide", "programs", "criterion", "faq", "recipes"))
def test_code_of_a_page_fits_into_its_column(name: str) -> None:
    for block in FENCE.findall((ROOT / "docs" / f"{name}.md").read_text()):
        assert max(map(len, block.splitlines())) <= 88


# The mixer in the loop, and turning it off


def test_a_mix_made_by_workers_travels_with_its_batch() -> None:
    page = guide("def mix_batch")
    for x, y, mix in DataLoader(TensorDataset(page["x"], torch.arange(12)), 4, collate_fn=page["mix_batch"]):
        torch.testing.assert_close(x, mix_inputs(page["x"][y], mix))


def test_a_mixer_that_is_an_attribute_is_off_in_validation() -> None:
    page = guide("total = sum(criterion(model(x), y)")
    plain = F.cross_entropy(page["model"](page["x"]), page["y"])
    torch.testing.assert_close(page["total"] / 2, plain)
    assert page["mixer"].last_mix is None
    assert list(page["model"].children())[-1] is page["mixer"]


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.usefixtures("no_accelerator")
def test_hugging_face_trains_the_last_epochs_unmixed(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    mixer, shares = MixUp(1.0), []
    page = guide("class LastEpochsUnmixed", mixer=mixer)

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
    Trainer(Model(), arguments, train_dataset=rows, callbacks=[page["LastEpochsUnmixed"]()]).train()
    assert [value == 1 for value in shares] == [False] * 4 + [True] * 4


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
    page = guide("embeddings = nn.ModuleList", mixer=MixUp(1.0))
    rows = []
    for codes, numbers in zip(page["codes"], page["numbers"].tolist(), strict=True):
        embedded = [table.weight[code] for table, code in zip(page["embeddings"], codes, strict=True)]
        filled, missing = zip(*((0.0, 1.0) if value != value else (value, 0.0) for value in numbers), strict=True)
        rows.append(torch.cat((*embedded, torch.tensor((*filled, *missing)))))
    assert sum(row[-4:].sum() for row in rows) == 1
    torch.testing.assert_close(page["mixed"].double(), mixed(torch.stack(rows), applied(page["mixer"])))


def test_of_a_dict_a_table_takes_the_share() -> None:
    page = guide('batch = {"image"', mixer=CutMix(per_sample=True))
    mix, table = applied(page["mixer"]), page["batch"]["table"]
    torch.testing.assert_close(page["mixed"]["table"].double(), mixed(table, mix, of_positions=False))


@seeds
def test_values_per_frame_without_a_channel_are_mixed_by_the_share(seed: int) -> None:
    torch.manual_seed(seed)
    mix = CutMix().sample(torch.rand(4, 3, 40))
    output, values = torch.randn(4, 1, 40), torch.rand(4, 1, 40)
    criterion, hard = MixUpCriterion(nn.MSELoss()), values.where(mix.lam == 1, values[mix.index])
    expected = F.mse_loss(output, hard)
    torch.testing.assert_close(criterion(output, values, mix), expected)
    assert not torch.isclose(criterion(output[:, 0], values[:, 0], mix), expected, rtol=1e-3)


# What is not averaged


@pytest.mark.parametrize("what", ("angles", "signs", "NaN", "codes"))
def test_a_loss_sees_what_has_no_mean_as_it_is(what: str) -> None:
    hidden, annotated_bce = torch.rand(6, 5) < 0.4, guide("def annotated_bce", mixer=MixUp())["annotated_bce"]
    cases: dict[str, tuple[Any, Tensor]] = {
        "angles": (lambda output, angle: (1 - torch.cos(output - angle)).mean(), 6.28 * torch.rand(6, 5)),
        "signs": (lambda output, sign: (1 - sign * output).relu().mean(), 2.0 * torch.randint(2, (6, 5)) - 1),
        "NaN": (
            lambda output, y: (output - y)[~y.isnan()].square().mean(),
            torch.randn(6, 5).where(~hidden, torch.nan),
        ),
        "codes": (annotated_bce, torch.randint(2, (6, 5)).float().where(~hidden, -1)),
    }
    loss, target = cases[what]
    mix, output = Mix(torch.tensor(0.3), torch.tensor([1, 2, 3, 4, 5, 0])), torch.randn(6, 5, requires_grad=True)
    expected = 0.3 * loss(output, target) + 0.7 * loss(output, target[mix.index])
    found = [MixUpCriterion(loss, interpolate_loss=way)(output, target, mix) for way in (True, None)]
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, output, retain_graph=True) for each in (found[0], expected)))
    assert not torch.isclose(found[1], expected, rtol=1e-3)


def test_padding_of_a_mixed_text_is_what_is_padding_in_both() -> None:
    page = guide("tokens, length = ")
    longer = torch.maximum(page["length"], page["length"][page["mix"].index])
    assert torch.equal(page["valid"], torch.arange(12) < longer[:, None])


def test_an_additive_mask_becomes_the_union_and_is_the_intersection_as_a_quantity() -> None:
    valid = torch.arange(4) < torch.tensor([[4], [2]])
    mask, mix = torch.zeros(2, 4).masked_fill(~valid, -1e4), Mix(torch.tensor(0.6), torch.tensor([1, 0]))
    assert torch.equal(mix_inputs((mask == 0).float(), mix) > 0, valid | valid.flip(0))
    assert torch.equal(mix_inputs(mask, mix).softmax(1) > 0, valid & valid.flip(0))


# Metrics, pictures, replay


@seeds
def test_metrics_of_an_epoch_count_both_labels_with_their_shares(seed: int) -> None:
    torch.manual_seed(seed)
    batches = [(torch.rand(12, 3, 8, 8), torch.randint(2, (12,))) for _ in range(2)]
    mixer = MixUp(1.0)
    model = nn.Sequential(mixer, nn.Flatten(), nn.Linear(192, 2))
    page = guide("from sklearn.metrics", loader=batches, model=model, mixer=mixer)
    scores, labels, weights = (torch.cat(page[name]).double() for name in ("scores", "labels", "weights"))
    torch.testing.assert_close(page["weights"][-2], applied(mixer).share.expand(12))

    own, other = labels == 1, labels == 0
    above = (scores[own, None] > scores[other]).double() + (scores[own, None] == scores[other]) / 2
    of_pairs = weights[own, None] * weights[other]
    torch.testing.assert_close(page["auroc"], float((above * of_pairs).sum() / of_pairs.sum()))

    true = weights[own & (scores > 0)].sum()
    f1 = 2 * true / (weights[scores > 0].sum() + weights[own].sum())
    torch.testing.assert_close(float(f1_score(labels, scores > 0, sample_weight=weights)), float(f1))


def test_a_drawn_batch_shows_both_labels_with_their_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = guide("import matplotlib", mixer=CutMix(per_sample=True))
    assert page["cut"] > 0.5
    (cut,) = [line for line in (ROOT / GUIDE).read_text().splitlines() if line.startswith("cut = ")]
    exec(cut, of_mixup := {"mix": MixUp().sample(page["x"])})
    assert not of_mixup["cut"]
    assert Path("batch.png").stat().st_size > 1000
    for (i, j, own), axis in zip(pairs(page["mix"]), page["axes"].flat, strict=True):
        assert axis.get_title() == f"{page['y'][i]}: {own:.2f}, {page['y'][j]}: {1 - own:.2f}"
        assert torch.equal(torch.as_tensor(axis.images[0].get_array().data).movedim(-1, 0), page["mixed"][i])


def test_a_replay_repeats_the_dropout_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def network(*_: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 10))

    page = guide("torch.save((x, y, mixer.last_mix, state)", Network=network, mixer=MixUp(1.0))
    assert torch.equal(page["loss"], page["again"])
    assert not torch.equal(page["criterion"](page["model"](page["mixed"]), page["y"], page["mix"]), page["loss"])


# Losses and targets


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


def test_blobs_have_a_mask_for_each_sample_and_a_mirrored_mixer_keeps_p() -> None:
    page = guide("class Blobs")
    mix = page["Blobs"]().sample(torch.rand(6, 3, 8, 8))
    assert len({share(mix, i).item() for i in range(6)}) == 1
    assert len({tuple(mask.flatten().tolist()) for mask in mix.lam}) == 6

    mirrored = page["Mirrored"](1.0, p=0.5, per_sample=True)
    lam, index = mirrored.sample(torch.rand(400, 1))
    assert index.tolist() == list(reversed(range(400)))
    assert 150 < (lam == 1).sum() < 250


# Activation checkpointing


def test_a_draw_in_a_checkpoint_is_another_in_backward_if_the_random_state_is_not_restored() -> None:
    x, y, mixer, net = torch.rand(8, 4), torch.randint(3, (8,)), MixUp(1.0), nn.Linear(4, 3)
    output = checkpoint(nn.Sequential(mixer, net), x, use_reentrant=False, preserve_rng_state=False)
    loss, mix = MixUpCriterion(nn.CrossEntropyLoss(), mixer)(output, y), applied(mixer)
    expected = mix_cross_entropy(net(mix_inputs(x, mix)), y, mix)
    torch.testing.assert_close(loss, expected)
    (right,) = torch.autograd.grad(expected, [net.weight])
    loss.backward()
    assert net.weight.grad is not None
    assert not torch.allclose(right, net.weight.grad)
    assert not torch.equal(applied(mixer).lam, mix.lam)


def test_a_mix_passed_is_right_in_every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        gradients.append(run_blocks("docs/faq.md")["net"].weight.grad)
        monkeypatch.setattr("torch.utils.checkpoint.checkpoint", lambda function, *args, **_: function(*args))
    torch.testing.assert_close(*gradients)
