"""Every recipe of docs/recipes.md, taken from the page, against the formula of its paper in loops and in float64."""

from __future__ import annotations

import cmath
import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.functional import mix_inputs, mix_loss, mix_targets
from mixup_nn.sampling import sample_beta

from .cases import MIXERS, applied
from .reference import mixed, one_hot, positions, share
from .test_package import run_blocks

Page = dict[str, Any]
Draw = Callable[[Page, Tensor], tuple[Tensor, Mix]]  # the mixed batch, and the mix for its targets
PARTNERS = torch.tensor([3, 0, 1, 5, 2, 4])
seeds = pytest.mark.parametrize("seed", range(3))


def recipe(*blocks: str, seed: int = 0) -> Page:
    """The names that the first block of the page and those with these strings define."""
    torch.manual_seed(seed)
    return run_blocks("docs/recipes.md", "import torch\n", *blocks)


def close(actual: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=2e-6, atol=2e-6)


def exact(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def nll(logits: Tensor, label: Tensor | int) -> Tensor:
    return logits.double().exp().sum().log() - logits[int(label)].double()


def mean_nll(logits: Tensor, y: Tensor, index: Tensor, own: Sequence[Any], partner: Sequence[Any]) -> Tensor:
    """The two losses of each sample with their weights, averaged over the samples."""
    losses = [own[i] * nll(logits[i], y[i]) + partner[i] * nll(logits[i], y[j]) for i, j in enumerate(index.tolist())]
    return torch.stack(losses).mean()


def complement(weights: Sequence[Any]) -> list[Any]:
    return [1 - weight for weight in weights]


def images(*sizes: int) -> Tensor:
    return torch.rand(6, 3, *sizes, generator=torch.Generator().manual_seed(1))


IMAGES = images(8, 12)


# Masks


@seeds
@pytest.mark.parametrize("sizes", ((6, 9), (7, 4)))
def test_fmix_keeps_the_brightest_part_of_an_image_of_low_frequencies(seed: int, sizes: tuple[int, int]) -> None:
    page, (height, width) = recipe("class FMix"), sizes
    torch.manual_seed(seed)
    lam = page["FMix"]().sample_lam(images(*sizes))

    torch.manual_seed(seed)
    real, imaginary = torch.randn(2, height, width // 2 + 1).double().tolist()
    kept = math.ceil(float(sample_beta(1.0)) * height * width)
    brightness = {}
    for row, column in positions(torch.Size(sizes)):
        brightness[row, column] = 0.0
        for u, v in positions(torch.Size((height, width // 2 + 1))):
            down, across = min(u, height - u) / height, v / width
            decay = max(math.sqrt(down**2 + across**2), 1 / max(sizes)) ** 3
            wave = cmath.exp(2j * math.pi * (u * row / height + v * column / width))
            twice = 1 if v == 0 or 2 * v == width else 2  # the other half of the spectrum is its mirror image
            brightness[row, column] += twice * (complex(real[u][v], imaginary[u][v]) / decay * wave).real
    brightest = sorted(brightness, key=lambda place: -brightness[place])[:kept]
    expected = torch.zeros(1, 1, *sizes)
    for row, column in brightest:
        expected[0, 0, row, column] = 1
    assert torch.equal(lam, expected)


@seeds
@pytest.mark.parametrize("sizes", ((8, 12), (9, 6)))
def test_gridmix_gives_a_box_of_each_cell_to_the_partner(seed: int, sizes: tuple[int, int]) -> None:
    page = recipe("class GridMix")
    torch.manual_seed(seed)
    lam = page["GridMix"]().sample_lam(images(*sizes))
    torch.manual_seed(seed)
    side = math.sqrt(1 - float(sample_beta(1.0)))  # of the box, where that of a cell is 1

    expected = torch.ones(1, 1, *sizes)
    for pixel in positions(torch.Size(sizes)):
        places = [(where + 0.5) / (size / 4) for where, size in zip(pixel, sizes, strict=True)]
        if all(place - math.floor(place) < side for place in places):
            expected[0, 0, pixel[0], pixel[1]] = 0
    assert torch.equal(lam, expected)


@seeds
def test_smoothmix_is_a_gaussian_bump(seed: int) -> None:
    page, (height, width) = recipe("class SmoothMix"), (6, 9)
    torch.manual_seed(seed)
    lam = page["SmoothMix"]().sample_lam(images(height, width))
    torch.manual_seed(seed)
    row, column, wide = torch.rand(3).tolist()

    deviation = 0.25 + wide / 4
    for i, j in positions(lam.shape[2:]):
        squared = ((i + 0.5) / height - row) ** 2 + ((j + 0.5) / width - column) ** 2
        close(lam[0, 0, i, j], math.exp(-squared / (2 * deviation**2)))


@seeds
def test_saliencymix_centres_the_box_on_the_peak_of_the_partner(seed: int) -> None:
    page, (height, width) = recipe("class SaliencyMix"), (6, 9)
    input = images(height, width)
    for per_sample in (False, True):
        torch.manual_seed(seed)
        mix = page["SaliencyMix"](1.0, per_sample=per_sample).sample(input)
        torch.manual_seed(seed)
        drawn = MixUp(1.0, per_sample=per_sample).sample(input)
        assert torch.equal(mix.index, drawn.index)

        for i, partner in enumerate(drawn.index.tolist()):
            side = math.sqrt(1 - float(drawn.lam[i] if per_sample else drawn.lam))
            contrast = {}
            for p in positions(input.shape[2:]):
                colours = [input[partner, c, p[0], p[1]] - input[partner, c].mean() for c in range(3)]
                contrast[p] = sum(float(colour.abs()) for colour in colours)
            row, column = max(contrast, key=lambda p: contrast[p])
            for p in contrast:
                inside = abs(p[0] - row) < side * height / 2 and abs(p[1] - column) < side * width / 2
                assert float(mix.lam[i, 0, p[0], p[1]]) == (not inside)


@seeds
def test_classmix_pastes_half_of_the_classes_of_the_partner(seed: int) -> None:
    page = recipe("def classmix(")
    K, index = page["K"], PARTNERS
    maps = torch.randint(K, (6, 2, 3), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    mix = page["classmix"](maps, index)
    torch.manual_seed(seed)
    scores = torch.rand(6, K)

    assert torch.equal(mix.index, index)
    for i, partner in enumerate(index.tolist()):
        present = sorted(set(maps[partner].flatten().tolist()), key=lambda k: -float(scores[partner, k]))
        chosen = present[: len(present) // 2]
        for row, column in positions(maps.shape[1:]):
            assert float(mix.lam[i, 0, row, column]) == (int(maps[partner, row, column]) not in chosen)


def test_classmix_trains_each_pixel_on_its_label() -> None:
    page = recipe("def classmix(")
    maps, mix, losses = page["maps"], page["mix"], []
    assert set(mix.lam.flatten().tolist()) == {0.0, 1.0}
    output = exact(page["segment"])(mixed(page["x"], mix))
    for i, j in enumerate(mix.index.tolist()):
        for row, column in positions(maps.shape[1:]):
            source = i if mix.lam[i, 0, row, column] == 1 else j
            losses.append(nll(output[i, :, row, column], maps[source, row, column]))
    close(page["loss"], torch.stack(losses).mean())


@seeds
def test_resizemix_pastes_the_whole_partner_made_small(seed: int) -> None:
    page, (height, width) = recipe("def resizemix("), (6, 9)
    input = images(height, width)
    torch.manual_seed(seed)
    output, mix = page["resizemix"](input, PARTNERS)
    torch.manual_seed(seed)
    scale = float(torch.empty(()).uniform_(0.1, 0.8))
    across, down = ((2 * torch.rand(2).double() - 1) * (1 - scale)).tolist()

    assert torch.equal(mix.index, PARTNERS)
    expected, lam = input.double(), torch.ones(1, 1, height, width)
    for row, column in positions(input.shape[2:]):
        place = [((2 * row + 1) / height - 1 - down) / scale, ((2 * column + 1) / width - 1 - across) / scale]
        if max(map(abs, place)) > 1:
            continue
        lam[0, 0, row, column] = 0
        for i, j in enumerate(PARTNERS.tolist()):
            expected[i, :, row, column] = bilinear(input[j], place)
    assert torch.equal(mix.lam, lam)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def bilinear(image: Tensor, place: list[float]) -> Tensor:
    """The value at a place in [-1, 1] of each axis, the border continued outwards."""
    corners = []
    for size, where in zip(image.shape[1:], place, strict=True):
        pixel = min(max((where + 1) * size / 2 - 0.5, 0), size - 1)
        low = min(int(pixel), size - 2)
        corners.append(((low, 1 - pixel + low), (low + 1, pixel - low)))
    value = torch.zeros(len(image), dtype=torch.float64)
    for (row, a), (column, b) in itertools.product(*corners):
        value += a * b * image[:, row, column].double()
    return value


def test_resizemix_weighs_labels_by_the_box() -> None:
    page = recipe("def resizemix(")
    mix, output = page["mix"], exact(page["net"])(page["mixed"].double())
    pixels = mix.lam.flatten().tolist()
    lam = [pixels.count(1.0) / len(pixels)] * page["B"]
    close(page["loss"], mean_nll(output, page["y"], mix.index, lam, complement(lam)))


@pytest.mark.parametrize("spatial_dims", (2, 3))
def test_a_video_keeps_or_takes_whole_frames_alike(spatial_dims: int) -> None:
    page = recipe("clips =")
    clips = page["clips"]
    assert page["box"].spatial_dims == 2
    for clip in (clips, clips.transpose(1, 2)):
        box = CutMix(spatial_dims=spatial_dims)
        output = box(clip)
        lam, index = applied(box)
        assert lam.shape == (1, 1, 1 if spatial_dims == 2 else clip.shape[2], 8, 8)
        assert 0 < lam.mean() < 1
        for i, j in enumerate(index.tolist()):
            for a, b in itertools.product(range(clip.shape[1]), range(clip.shape[2])):
                frame = lam[0, 0, 0 if spatial_dims == 2 else b]
                assert torch.equal(output[i, a, b], clip[i, a, b].where(frame == 1, clip[j, a, b]))


@seeds
def test_labels_of_frames_take_the_share_of_their_frame(seed: int) -> None:
    page = recipe("clips =", "of_frames =", seed=seed)
    mix, labels, losses = page["mix"], page["frame_labels"], []
    for i, j in enumerate(mix.index.tolist()):
        for t in range(labels.shape[1]):
            pixels = mix.lam[0, 0, t].flatten().tolist()
            lam = pixels.count(1.0) / len(pixels)
            logits = page["output"][i, :, t]
            losses.append(lam * nll(logits, labels[i, t]) + (1 - lam) * nll(logits, labels[j, t]))
    close(page["loss"], torch.stack(losses).mean())


# Partners


class Spied:
    """Stands for torch.multinomial, and keeps the weights that it is called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draw, self.weights = torch.multinomial, torch.empty(0)
        monkeypatch.setattr(torch, "multinomial", self)

    def __call__(self, weights: Tensor, number: int) -> Tensor:
        self.weights = weights
        return self.draw(weights, number)


@seeds
def test_c_mixup_draws_partners_by_a_gaussian_kernel_of_label_distances(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spied = Spied(monkeypatch)
    page = recipe("def close_partners", seed=seed)
    values, mix, weights = page["values"], page["mix"], spied.weights.double()
    for i, j in positions(weights.shape):
        kernel = [math.exp(-float((values[i, 0] - values[k, 0]) ** 2) / (2 * 0.5**2)) for k in range(page["B"])]
        close(weights[i, j] / weights[i].sum(), kernel[j] / sum(kernel))
    wide = torch.tensor([[0.0, 0.0], [3.0, 4.0]])  # the distance of vectors is 5
    page["close_partners"](wide, 5.0)
    close(spied.weights, torch.tensor([[1, math.exp(-0.5)], [math.exp(-0.5), 1]]))

    lam, losses = float(mix.lam), []
    output = exact(page["regress"])(mixed(page["x"], mix))
    for i, j in enumerate(mix.index.tolist()):
        losses.append((output[i, 0] - lam * values[i, 0].double() - (1 - lam) * values[j, 0].double()) ** 2)
    close(page["loss"], torch.stack(losses).mean())


def test_lisa_mixes_domains_of_a_class_or_classes_of_a_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    spied, ways = Spied(monkeypatch), set()
    for seed in range(6):
        page = recipe("def partners(", seed=seed)
        B, y, domain, by_class = page["B"], page["y"].tolist(), page["domain"].tolist(), bool(page["by_class"])
        ways.add(by_class)
        for i in range(B):
            if by_class:
                others = [k for k in range(B) if y[k] == y[i] and domain[k] != domain[i]]
            else:
                others = [k for k in range(B) if domain[k] == domain[i] and y[k] != y[i]]
            assert spied.weights[i].nonzero().flatten().tolist() == (others or [i])
            assert int(page["mix"].index[i]) in (others or [i])
        assert set(spied.weights.flatten().tolist()) == {0, 1}

        mix, lam = page["mix"], [page["mix"].lam.double()] * B
        output = exact(page["net"])(mixed(page["x"], mix))
        close(page["loss"], mean_nll(output, page["y"], mix.index, lam, complement(lam)))
    assert ways == {True, False}


def test_balanced_mixup_mixes_two_batches_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rand = torch.rand

    def known(*shape: Any, **options: Any) -> Tensor:
        return torch.tensor(0.9) if shape == ((),) else rand(*shape, **options)

    monkeypatch.setattr(torch, "rand", known)
    page = recipe("lam = 1 - torch.rand")
    x, other, y, other_y = (page[name] for name in ("x", "other", "y", "other_y"))
    weight = 0.9**5  # of the other batch: the distribution function of Beta(0.2, 1) is t ** 0.2
    losses = []
    for i in range(page["B"]):
        close(page["mixed"][i], (1 - weight) * x[i].double() + weight * other[i].double())
        logits = exact(page["net"])(page["mixed"][i : i + 1].double())[0]
        losses.append((1 - weight) * nll(logits, y[i]) + weight * nll(logits, other_y[i]))
    close(page["loss"], torch.stack(losses).mean())


# Weights of the labels


@seeds
def test_transmix_weighs_labels_by_the_attention_that_their_patches_get(seed: int) -> None:
    page = recipe("attention.detach()", seed=seed)
    mix, attention = page["mix"], page["attention"].double()
    lam = []
    for i in range(page["B"]):
        kept = 0.0
        for row, column in positions(torch.Size((4, 4))):
            kept += float(attention[i, 4 * row + column] * mix.lam[0, 0, 2 * row, 2 * column])
        lam.append(kept / float(attention[i].sum()))
    output = exact(page["net"])(mixed(page["x"], mix))
    close(page["loss"], mean_nll(output, page["y"], mix.index, lam, complement(lam)))


def test_remix_gives_the_label_of_the_rare_class_unless_the_frequent_one_dominates() -> None:
    seen = set()
    for seed in (0, 2, 3, 12, 13, 14, 17, 18):
        page = recipe("ratio, lam =", seed=seed)
        y, counts, mix = page["y"], page["counts"].tolist(), page["mix"]
        drawn, lam = float(mix.lam), []
        for i, j in enumerate(mix.index.tolist()):
            own, partner = counts[y[i]], counts[y[j]]
            if own / partner >= 3 and drawn < 0.5:
                lam.append(0.0)
            elif own / partner <= 1 / 3 and 1 - drawn < 0.5:
                lam.append(1.0)
            else:
                lam.append(drawn)
        seen |= {"own" if value == 1 else "partner" if value == 0 else "both" for value in lam}
        output = exact(page["net"])(mixed(page["x"], mix))
        close(page["loss"], mean_nll(output, y, mix.index, lam, complement(lam)))
    assert seen == {"own", "partner", "both"}


@seeds
def test_snapmix_weighs_labels_by_their_evidence_in_sight(seed: int) -> None:
    page = recipe("evidence =", seed=seed)
    mix, evidence = page["mix"], page["evidence"].double()
    own, partner = [], []
    for i, j in enumerate(mix.index.tolist()):
        inside = [p for p in positions(evidence.shape[1:]) if mix.lam[0, 0, p[0], p[1]] == 0]
        own.append(1 - sum(float(evidence[i, p[0], p[1]]) for p in inside) / float(evidence[i].sum()))
        partner.append(sum(float(evidence[j, p[0], p[1]]) for p in inside) / float(evidence[j].sum()))
    output = exact(page["net"])(mixed(page["x"], mix))
    close(page["loss"], mean_nll(output, page["y"], mix.index, own, partner))


def test_moex_takes_the_moments_of_the_partner() -> None:
    page = recipe("def moex(")
    x, index = page["x"].double(), page["index"]
    expected = torch.empty_like(x)
    for i, j in enumerate(index.tolist()):
        for p in positions(x.shape[2:]):
            own, partner = x[i, :, p[0], p[1]], x[j, :, p[0], p[1]]
            scale = ((partner.var() + 1e-5) / (own.var() + 1e-5)).sqrt()
            expected[i, :, p[0], p[1]] = (own - own.mean()) * scale + partner.mean()
    close(page["moex"](page["x"], index), expected)
    lam = [0.9] * page["B"]
    close(page["loss"], mean_nll(exact(page["net"])(expected), page["y"], index, lam, complement(lam)))


# Other uses


def test_regmixup_adds_the_loss_of_the_clean_batch_to_that_of_the_mixed() -> None:
    page = recipe("strong = MixUp")
    mix, x, y = applied(page["strong"]), page["x"], page["y"]
    assert len(mix.index) == page["B"]
    clean, lam = exact(page["net"])(x.double()), [mix.lam.double()] * page["B"]
    output = exact(page["net"])(mixed(x, mix))
    plain = torch.stack([nll(logits, label) for logits, label in zip(clean, y, strict=True)]).mean()
    close(page["loss"], plain + mean_nll(output, y, mix.index, lam, complement(lam)))


@seeds
def test_mixstyle_mixes_mean_and_deviation_of_each_channel(seed: int) -> None:
    page, input = recipe("class MixStyle"), images(6, 9).requires_grad_()
    mixer = page["MixStyle"](0.5, p=0.5, per_sample=True)
    torch.manual_seed(seed)
    output = mixer(input)
    torch.manual_seed(seed)
    mix = MixUp(0.5, p=0.5, per_sample=True).sample(input)

    x, rows = input.detach().double().requires_grad_(), []
    for i, j in enumerate(mix.index.tolist()):
        lam = mix.lam[i].double()
        for c in range(3):
            means, deviations = zip(*((x[k, c].mean(), (x[k, c].var() + 1e-6).sqrt()) for k in (i, j)), strict=True)
            mean, deviation = (lam * own.detach() + (1 - lam) * other.detach() for own, other in (means, deviations))
            rows.append((x[i, c] - means[0].detach()) / deviations[0].detach() * deviation + mean)
    expected = torch.stack(rows).view_as(x)
    close(output, expected)
    weights = images(6, 9)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    assert input.grad is not None
    assert x.grad is not None
    close(input.grad, x.grad)
    assert mixer.eval()(input) is input


def test_mixstyle_keeps_the_plain_loss_and_no_criterion_follows_it() -> None:
    page = recipe("class MixStyle")
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), page["model"][0])
    with pytest.raises(RuntimeError, match="to have mixed a batch"):
        criterion(page["model"](page["x"]), page["y"])


@seeds
def test_i_mix_is_the_contrastive_loss_against_mixed_numbers(seed: int) -> None:
    page = recipe("queries, keys", seed=seed)
    B, net, mix = page["B"], exact(page["net"]), applied(page["uniform"])
    queries = net(mixed(page["first_view"], mix))
    keys = net(page["second_view"].double())
    losses = []
    for i, j in enumerate(mix.index.tolist()):
        cosines = [queries[i] @ key / queries[i].norm() / key.norm() for key in keys]
        logits = torch.stack(cosines) / 0.2
        losses.append(mix.lam.double() * nll(logits, i) + (1 - mix.lam.double()) * nll(logits, j))
    assert len(losses) == B
    close(page["loss"], torch.stack(losses).mean())


def test_ict_mixes_what_the_teacher_says_of_each_sample_alone() -> None:
    page = recipe("unlabelled, teacher")
    mix, x = applied(page["mixup"]), page["unlabelled"]
    output = exact(page["net"])(mixed(x, mix))
    errors = []
    for i, j in enumerate(mix.index.tolist()):
        own, partner = (exact(page["teacher"])(x[k : k + 1].double())[0].exp() for k in (i, j))
        target = mix.lam.double() * own / own.sum() + (1 - mix.lam.double()) * partner / partner.sum()
        errors.append((output[i].exp() / output[i].exp().sum() - target) ** 2)
    close(page["loss"], torch.stack(errors).mean())


def pixels_of(mixes: Sequence[Mix], size: int) -> Tensor:
    """The share of each sample in each mixed one, (B, B), pixel by pixel through one mix after the other."""
    B = len(mixes[0].index)
    total = torch.zeros(B, B, dtype=torch.float64)
    for row, column in positions(torch.Size((size, size))):
        shares = torch.eye(B, dtype=torch.float64)
        for lam, index in mixes:
            weights = lam.double() if lam.ndim < 2 else lam[:, 0, row, column].double()
            weights = weights.expand(B)
            shares = torch.stack([weights[i] * shares[i] + (1 - weights[i]) * shares[index[i]] for i in range(B)])
        total += shares / size**2
    return total


def loss_of_shares(logits: Tensor, y: Tensor, shares: Tensor) -> Tensor:
    B = len(y)
    losses = [sum((shares[i, j] * nll(logits[i], y[j]) for j in range(B)), torch.tensor(0.0)) for i in range(B)]
    return torch.stack(losses).mean()


@seeds
def test_of_two_mixes_the_first_is_the_outermost_criterion(seed: int) -> None:
    page = recipe("first, second = CutMix(), MixUp", seed=seed)
    first, second = applied(page["first"]), applied(page["second"])
    output = exact(page["net"])(mixed(mixed(page["x"], first), second))
    shares = pixels_of((first, second), 8)
    close(page["loss"], loss_of_shares(output, page["y"], shares))


@seeds
def test_two_masks_leave_four_shares(seed: int) -> None:
    page = recipe("def two_masks", seed=seed)
    first, second = applied(page["first"]), applied(page["second"])
    output = exact(page["net"])(mixed(mixed(page["x"], first), second))
    shares = pixels_of((first, second), 8)
    close(page["loss"], loss_of_shares(output, page["y"], shares))
    targets = page["two_masks"](page["y"], first, second)
    close(targets, shares @ one_hot(page["y"], page["K"]))


def test_where_the_first_lam_is_per_sample_dense_targets_are_exact_and_indices_refused() -> None:
    page = recipe()
    x, y, net, first, second = page["x"], page["y"], page["net"], MixUp(1.0, per_sample=True), CutMix(per_sample=True)
    output = net(second(first(x)))
    for reduction in ("mean", "none"):
        criterion = MixUpCriterion(MixUpCriterion(nn.CrossEntropyLoss(reduction=reduction), second), first)
        with pytest.raises(ValueError, match="^expected one lam per batch of the mix applied first"):
            criterion(output, y)
    shares = pixels_of((applied(first), applied(second)), 8)
    expected = loss_of_shares(exact(net)(mixed(mixed(x, applied(first)), applied(second))), y, shares)
    close(criterion(output, F.one_hot(y, page["K"]).float()).mean(), expected)


@seeds
def test_folding_lists_the_same_mixtures_under_the_dominant_sample(seed: int) -> None:
    page = recipe("folded_cut =", seed=seed)
    mix, cut, x = page["mix"], page["cut"], page["x"].double()
    close(page["folded"].lam, torch.tensor([max(lam, 1 - lam) for lam in mix.lam.tolist()]))
    assert share(page["folded_cut"], 0) >= 0.5

    inverse = torch.empty_like(mix.index)
    for i, j in enumerate(mix.index.tolist()):
        inverse[j] = i
    for draw in (mix._replace(lam=torch.tensor(0.2)), cut._replace(index=mix.index)):
        folded = draw._replace(lam=torch.where(draw.share < 0.5, 1 - draw.lam, draw.lam), index=inverse)
        if draw.share < 0.5:
            close(mixed(x, draw), mixed(x, folded)[mix.index])
    swapped = cut.share < 0.5
    assert torch.equal(page["folded_cut"].lam, 1 - cut.lam if swapped else cut.lam)


# Targets


@seeds
def test_heads_of_a_dict_look_their_targets_up_by_sample_numbers(seed: int) -> None:
    page = recipe("def heads(", seed=seed)
    mix, targets = applied(page["mixup"]), page["targets"]
    output = exact(page["model"])(mixed(page["x"], mix))
    losses = []
    for i, j in enumerate(mix.index.tolist()):
        for k, lam in ((i, mix.lam.double()), (j, 1 - mix.lam.double())):
            regression = (output[i, 0] - targets["age"][k].double()) ** 2
            losses.append(lam * targets["weight"][k] * (nll(output[i, 1:], targets["class"][k]) + regression))
    close(page["loss"], torch.stack(losses).sum() / page["B"])

    page["mixup"].eval()
    plain = page["criterion"]((page["model"](page["x"]), targets), torch.arange(page["B"]))
    close(plain, page["heads"]((page["model"](page["x"]), targets), torch.arange(page["B"])).double())


def test_boxes_are_looked_up_by_sample_numbers() -> None:
    page = recipe("def detection(")
    mix, boxes = applied(page["mixup"]), page["boxes"]
    output, total = exact(page["net"])(mixed(page["x"], mix)), torch.tensor(0.0).double()
    for i, j in enumerate(mix.index.tolist()):
        for box in boxes[i]:
            total += mix.lam.double() * (output[i, :4] - box).abs().sum()
        for box in boxes[j]:
            total += (1 - mix.lam.double()) * (output[i, :4] - box).abs().sum()
    close(page["loss"], total / page["B"])


@seeds
def test_ctc_takes_the_tokens_and_the_lengths_of_each_text(seed: int) -> None:
    page = recipe("def ctc(", seed=seed)
    mix, total = page["mix"], torch.tensor(0.0).double()
    frames = [max(page["frames"][i], page["frames"][j]) for i, j in enumerate(mix.index.tolist())]
    for i, j in enumerate(mix.index.tolist()):
        for k, lam in ((i, mix.lam.double()), (j, 1 - mix.lam.double())):
            text = page["tokens"][k, : page["lengths"][k]].tolist()
            total += lam * ctc(page["output"][: frames[i], i].double().exp().tolist(), text)
    torch.testing.assert_close(page["loss"].double(), total / page["B"], rtol=1e-5, atol=0)


def ctc(probabilities: list[list[float]], text: list[int]) -> float:
    """Minus the logarithm of the probability of all paths that read ``text``, by the recursion of the paper."""
    path = [0]
    for token in text:
        path += [token, 0]
    forward = [probabilities[0][path[0]], probabilities[0][path[1]]] + [0.0] * (len(path) - 2)
    for frame in probabilities[1:]:
        sums = []
        for s, token in enumerate(path):
            skips = s > 1 and token not in (0, path[s - 2])
            sums.append(sum(forward[max(s - (2 if skips else 1), 0) : s + 1]) * frame[token])
        forward = sums
    return -math.log(forward[-1] + forward[-2])


@seeds
def test_hard_maps_keep_each_label_whole_the_ignored_one_too(seed: int) -> None:
    page = recipe("def classmix(", "hard =", seed=seed)
    maps, mix, hard = page["maps"], page["mix"], page["hard"]
    assert set(mix.lam.flatten().tolist()) == {0.0, 1.0}
    assert hard.dtype == torch.int64
    for i, j in enumerate(mix.index.tolist()):
        for row, column in positions(maps.shape[1:]):
            source = i if mix.lam[0, 0, row, column] == 1 else j
            assert hard[i, row, column] == maps[source, row, column]


@seeds
def test_a_smaller_output_takes_a_smaller_lam_and_smaller_labels(seed: int) -> None:
    page = recipe("def classmix(", "hard =", "half =", seed=seed)
    mix, maps, net = page["mix"], page["maps"], exact(page["small"])
    output, losses = net(mixed(page["x"], mix)), []
    for i, j in enumerate(mix.index.tolist()):
        for row, column in positions(torch.Size((4, 4))):
            label = maps[i if mix.lam[0, 0, 2 * row, 2 * column] == 1 else j, 2 * row, 2 * column]
            if label != 255:
                losses.append(nll(output[i, :, row, column], label))
    assert len(losses) == page["B"] * 12  # the first row is ignored
    close(page["loss"], torch.stack(losses).mean())


def test_targets_of_another_shape_take_the_share() -> None:
    page = recipe("def classmix(", "hard =", "half =", "points, output")
    mix, points, output = page["mix"], page["points"].double(), page["output"].double()
    errors = []
    for i, j in enumerate(mix.index.tolist()):
        target = share(mix, i) * points[i] + (1 - share(mix, i)) * points[j]
        errors.append((output[i] - target) ** 2)
    close(page["loss"], torch.stack(errors).mean())


@seeds
def test_dice_of_a_cut_batch_is_that_of_its_hard_map(seed: int) -> None:
    page = recipe("def dice(", seed=seed)
    mix, maps, K = applied(page["cutmix"]), page["maps"], page["K"]
    output = exact(page["segment"])(mixed(page["x"], mix)).exp()
    probability, losses = (output / output.sum(1, keepdim=True)).tolist(), []
    for i, j in enumerate(mix.index.tolist()):
        hard = {p: int(maps[i if mix.lam[0, 0, p[0], p[1]] == 1 else j][p]) for p in positions(maps.shape[1:])}
        scores = []
        for c in range(K):
            overlap = total = 0.0
            for (row, column), label in hard.items():
                overlap += probability[i][c][row][column] * (label == c)
                total += probability[i][c][row][column] + (label == c)
            scores.append(1 - (2 * overlap + 1) / (total + 1))
        losses.append(sum(scores) / K)
    close(page["loss"], sum(losses) / len(losses))


def test_only_mixed_targets_make_a_perfect_map_a_perfect_dice() -> None:
    page = recipe("def dice(")
    mix, maps, K = applied(page["cutmix"]), page["maps"], page["K"]
    hard = maps.where(mix.lam[0] == 1, maps[mix.index])
    perfect = 100 * one_hot(hard, K)
    assert page["criterion"](perfect, maps).max() < 1e-6
    dense = one_hot(maps, K)
    interpolated = mix_loss(page["dice"], perfect, dense, mix._replace(lam=mix.share))
    assert interpolated.min() > 0.1


@seeds
def test_a_union_holds_the_tags_of_both(seed: int) -> None:
    page = recipe("sound, frames", "union =", seed=seed)
    tags, (lam, index) = page["tags"], applied(page["mixup"])
    for i, j in enumerate(index.tolist()):
        heard = [k for k, volume in ((i, lam), (j, 1 - lam)) if volume > 0]
        for tag in range(tags.shape[1]):
            assert page["union"][i, tag] == max(tags[k, tag] for k in heard)


# What holds for every mixer


def mixer(name: str, **options: Any) -> Draw:
    def draw(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
        mixer = MIXERS[name]() if name in MIXERS else page[name](**options)
        return mixer(input), applied(mixer)

    return draw


def resizemix(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    output: tuple[Tensor, Mix] = page["resizemix"](input, MixUp().sample(input).index)
    return output


def classmix(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    maps = torch.randint(page["K"], (len(input), *input.shape[2:]), device=input.device)
    mix: Mix = page["classmix"](maps, MixUp().sample(input).index)
    return mix_inputs(input, mix), mix


def close_partners(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    values = torch.randn(len(input), 2, device=input.device)
    mix = MixUp(1.0).sample(input)._replace(index=page["close_partners"](values, 1.0))
    return mix_inputs(input, mix), mix


def choice(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    mixers: list[Mixer] = [MixUp(1.0), CutMix(per_sample=True), *(page[name]() for name in OWN)]
    mixer = RandomChoice(mixers, per_sample=True)
    return mixer(input), applied(mixer)


OWN = ("FMix", "GridMix", "SmoothMix")
DRAWS: dict[str, Draw] = {
    **{name: mixer(name) for name in MIXERS},
    **{name: mixer(name) for name in OWN},
    "SaliencyMix": mixer("SaliencyMix", alpha=1.0, p=0.9),
    "SaliencyMix_per_sample": mixer("SaliencyMix", alpha=1.0, per_sample=True),
    "resizemix": resizemix,
    "classmix": classmix,
    "close_partners": close_partners,
    "choice_of_the_page": choice,
}
DEFINES = (
    "class FMix",
    "class GridMix",
    "class SmoothMix",
    "class SaliencyMix",
    "class MixStyle",
    "def resizemix(",
    "def classmix(",
    "def close_partners",
    "def moex(",
    "def partners(",
)


@pytest.fixture(scope="module")
def page() -> Page:
    return recipe(*DEFINES)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_target_weighs_what_the_network_sees_of_its_sample(draw: Draw, page: Page) -> None:
    """The promise: each sample is an image of its own colour, so that a mixed image shows its shares."""
    colours = torch.eye(6)[:, :, None, None].expand(-1, -1, 8, 12).contiguous()
    shares = []
    for _ in range(5):
        output, mix = draw(page, colours)
        close(mix_targets(torch.arange(6), mix, 6), output.double().mean((2, 3)))
        shares.append(mix.share)
    assert len({float(value.mean()) for value in shares}) > 1
    assert any(bool((value < 1).any()) for value in shares)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_follows_the_device_of_the_input_and_its_dtype(draw: Draw, page: Page) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        output, mix = draw(page, images(8, 12).to(dtype))
        assert output.dtype == dtype
        assert mix.lam.dtype == torch.float32
    with torch.device("meta"):  # where a tensor lands that is made without a device
        output, mix = draw(page, IMAGES)
    assert output.device == mix.lam.device == mix.index.device == IMAGES.device


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ("FMix", "GridMix", "SmoothMix", "SaliencyMix", "MixStyle"))
def test_a_mixer_of_the_page_is_one_graph(name: str, page: Page) -> None:
    mixer = page[name](p=0.9)
    graph: Callable[..., Tensor] = torch.compile(mixer, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    output = graph(IMAGES)
    torch.manual_seed(1)
    close(output, mixer(IMAGES).double())
    assert not torch.equal(output, IMAGES)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ("resizemix", "classmix", "close_partners", "partners", "moex"))
def test_a_function_of_the_page_is_one_graph(name: str, page: Page) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "resizemix": (IMAGES, PARTNERS),
        "classmix": (torch.randint(page["K"], (6, 8, 12)), PARTNERS),
        "close_partners": (torch.randn(6, 1), 0.5),
        "partners": (torch.rand(6, 6) < 0.3,),
        "moex": (IMAGES, PARTNERS),
    }
    graph: Callable[..., Any] = torch.compile(page[name], fullgraph=True, backend="eager")
    graph(*arguments[name])
