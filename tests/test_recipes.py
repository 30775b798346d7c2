"""Every recipe of docs/recipes.md against the formula of its paper in loops and in float64, and docs/criterion.md."""

from __future__ import annotations

import cmath
import copy
import itertools
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixup_nn import CutMix, Mix, Mixer, MixUp, RandomChoice
from mixup_nn.functional import mix_inputs, mix_loss, mix_targets
from mixup_nn.sampling import sample_beta

from .cases import MIXERS, applied
from .reference import mixed, one_hot, pairs, positions, share
from .strategies import KINDS
from .test_package import FENCE, ROOT

Page = dict[str, Any]
Draw = Callable[[Page, Tensor], tuple[Tensor, Mix]]  # the mixed batch, and the mix for its targets
PARTNERS = torch.tensor([3, 0, 1, 5, 2, 4])
seeds = pytest.mark.parametrize("seed", range(3))


def recipe(*blocks: str, seed: int = 0, of: str = "recipes", **names: Any) -> Page:
    """What the first block of a page defines, changed by ``names``, and then those with these strings."""
    torch.manual_seed(seed)
    first, *others = FENCE.findall((ROOT / "docs" / f"{of}.md").read_text())
    module = types.ModuleType(f"{of}_{len(sys.modules)}")
    sys.modules[module.__name__] = module  # where Dynamo looks for it
    page = vars(module)
    exec(first, page)
    page.update(names)
    found = [block for block in others if any(each in block for each in blocks)]
    assert len(found) == len(blocks)
    for block in found:
        exec(block, page)
    return page


DEFINES = (
    "class FMix", "class GridMix", "class SmoothMix", "class SaliencyMix", "class MixStyle",
    "def resizemix(", "def classmix(", "def close_partners", "def moex(", "def partners(",
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Page:
    return recipe(*DEFINES)


def seeded(seed: int, draw: Callable[..., Any], *args: Any) -> Any:
    """What is drawn from a seed, which stands again afterwards."""
    torch.manual_seed(seed)
    drawn = draw(*args)
    torch.manual_seed(seed)
    return drawn


def close(actual: Tensor, expected: Tensor | float) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected.detach(), rtol=2e-6, atol=2e-6)


def exact(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def gradients(loss: Tensor, leaves: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(leaves))])


def nll(logits: Tensor, label: Tensor | int) -> Tensor:
    return logits.double().exp().sum().log() - logits[int(label)].double()


def mean_nll(logits: Tensor, y: Tensor, mix: Mix, own: Sequence[Any] = (), partner: Sequence[Any] = ()) -> Tensor:
    """The two losses of each sample with their weights, by default its share, averaged over the samples."""
    own = own or [share(mix, i) for i in range(len(y))]
    rest = partner or [1 - weight for weight in own]
    losses = [own[i] * nll(logits[i], y[i]) + rest[i] * nll(logits[i], y[j]) for i, j in enumerate(mix.index.tolist())]
    return torch.stack(losses).mean()


def loss_of(page: Page, mix: Mix, own: Sequence[Any] = (), partner: Sequence[Any] = ()) -> Tensor:
    """That of the network of the page on its mixed batch, and on its labels with these weights."""
    return mean_nll(exact(page["net"])(mixed(page["x"], mix)), page["y"], mix, own, partner)


def terms(mix: Mix) -> Iterator[tuple[int, int, Tensor]]:
    """Each sample twice: with itself and its share, and with its partner and the rest."""
    for i, j, own in pairs(mix):
        yield i, i, own
        yield i, j, 1 - own


def images(*sizes: int) -> Tensor:
    return torch.rand(6, 3, *sizes, generator=torch.Generator().manual_seed(1))


IMAGES = images(8, 12)


# Masks


@seeds
@pytest.mark.parametrize("sizes", ((6, 9), (7, 4)))
def test_fmix_keeps_the_brightest_part_of_a_random_image(seed: int, sizes: tuple[int, int], page: Page) -> None:
    height, width = sizes
    lam = seeded(seed, page["FMix"]().sample_lam, images(*sizes))
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
    for row, column in brightness:
        assert float(lam[0, 0, row, column]) == ((row, column) in brightest)


@seeds
@pytest.mark.parametrize("sizes", ((8, 12), (9, 6)))
def test_gridmix_gives_a_box_of_each_cell_to_the_partner(seed: int, sizes: tuple[int, int], page: Page) -> None:
    lam = seeded(seed, page["GridMix"]().sample_lam, images(*sizes))
    side = math.sqrt(1 - float(sample_beta(1.0)))  # of the box, where that of a cell is 1
    for pixel in positions(torch.Size(sizes)):
        places = [(where + 0.5) / (size / 4) for where, size in zip(pixel, sizes, strict=True)]
        inside = all(place - math.floor(place) < side for place in places)
        assert float(lam[0, 0, pixel[0], pixel[1]]) == (not inside)


@seeds
def test_smoothmix_is_a_gaussian_bump(seed: int, page: Page) -> None:
    height, width = 6, 9
    lam = seeded(seed, page["SmoothMix"]().sample_lam, images(height, width))
    row, column, wide = torch.rand(3).tolist()
    for i, j in positions(lam.shape[2:]):
        squared = ((i + 0.5) / height - row) ** 2 + ((j + 0.5) / width - column) ** 2
        close(lam[0, 0, i, j], math.exp(-squared / (2 * (0.25 + wide / 4) ** 2)))


@seeds
def test_saliencymix_centres_the_box_on_the_peak_of_the_partner(seed: int, page: Page) -> None:
    input, width, height = images(6, 9), 9, 6
    for per_sample in (False, True):
        mix = seeded(seed, page["SaliencyMix"](1.0, per_sample=per_sample).sample, input)
        drawn = MixUp(1.0, per_sample=per_sample).sample(input)
        assert torch.equal(mix.index, drawn.index)
        for i, partner in enumerate(drawn.index.tolist()):
            side = math.sqrt(1 - float(drawn.lam[i] if per_sample else drawn.lam))
            contrast = (input[partner] - input[partner].mean((1, 2), keepdim=True)).abs().sum(0)
            row, column = divmod(int(contrast.argmax()), width)
            for p in positions(input.shape[2:]):
                inside = abs(p[0] - row) < side * height / 2 and abs(p[1] - column) < side * width / 2
                assert float(mix.lam[i, 0, p[0], p[1]]) == (not inside)


@seeds
def test_classmix_pastes_half_of_the_classes_of_the_partner(seed: int, page: Page) -> None:
    K, index = page["K"], PARTNERS
    maps = torch.randint(K, (6, 2, 3), generator=torch.Generator().manual_seed(seed))
    mix = seeded(seed, page["classmix"], maps, index)
    scores = torch.rand(6, K)
    assert torch.equal(mix.index, index)
    for i, partner in enumerate(index.tolist()):
        present = sorted(set(maps[partner].flatten().tolist()), key=lambda k: -float(scores[partner, k]))
        chosen = present[: len(present) // 2]
        for row, column in positions(maps.shape[1:]):
            assert float(mix.lam[i, 0, row, column]) == (int(maps[partner, row, column]) not in chosen)


def test_classmix_trains_each_pixel_on_its_label() -> None:
    page = recipe("def classmix(")
    maps, mix = page["maps"], page["mix"]
    assert set(mix.lam.flatten().tolist()) == {0.0, 1.0}
    output = exact(page["segment"])(mixed(page["x"], mix))
    close(page["loss"], F.cross_entropy(output, maps.where(mix.lam[:, 0] == 1, maps[mix.index])))


@seeds
def test_resizemix_pastes_the_whole_partner_made_small(seed: int, page: Page) -> None:
    input, (height, width) = images(6, 9), (6, 9)
    output, mix = seeded(seed, page["resizemix"], input, PARTNERS)
    scale = float(torch.empty(()).uniform_(0.1, 0.8))
    across, down = ((2 * torch.rand(2).double() - 1) * (1 - scale)).tolist()

    assert torch.equal(mix.index, PARTNERS)
    expected, lam = input.double(), torch.ones(1, 1, height, width)
    for row, column in positions(input.shape[2:]):
        place = [((2 * row + 1) / height - 1 - down) / scale, ((2 * column + 1) / width - 1 - across) / scale]
        if max(map(abs, place)) <= 1:
            lam[0, 0, row, column] = 0
            expected[:, :, row, column] = torch.stack([bilinear(input[j], place) for j in PARTNERS])
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


def test_resizemix_is_a_mixer_that_weighs_labels_by_the_box() -> None:
    page = recipe("def resizemix(")
    mixer, x = page["mixer"], page["x"]
    output = seeded(1, mixer, x)
    assert torch.equal(output, page["resizemix"](x, mixer.sample_index(x))[0])
    expected = mean_nll(exact(page["net"])(output.double()), page["y"], applied(mixer))
    close(page["criterion"](page["net"](output), page["y"]), expected)
    assert mixer.eval()(x) is x


@pytest.mark.parametrize("spatial_dims", (2, 3))
def test_a_video_keeps_or_takes_whole_frames_alike(spatial_dims: int) -> None:
    page = recipe("clips, box")
    clips = page["clips"]
    assert page["box"].spatial_dims == 2
    for clip in (clips, clips.transpose(1, 2)):
        box = CutMix(spatial_dims=spatial_dims)
        output = box(clip)
        lam, index = applied(box)
        assert lam.shape == (1, 1, 1 if spatial_dims == 2 else clip.shape[2], 8, 8)
        assert 0 < lam.mean() < 1
        assert torch.equal(output, clip.where(lam == 1, clip[index]))


@seeds
def test_labels_of_frames_take_the_share_of_their_frame(seed: int) -> None:
    page = recipe("clips, box", "of_frames =", seed=seed)
    mix, frames = page["mix"], zip(page["output"].unbind(2), page["frame_labels"].unbind(1), strict=True)
    losses = [mean_nll(*frame, mix._replace(lam=mix.lam[:, :, t])) for t, frame in enumerate(frames)]
    close(page["loss"], torch.stack(losses).mean())


# Partners


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those that torch.multinomial was called with."""
    draw, seen = torch.multinomial, list[Tensor]()

    def spy(weights: Tensor, number: int) -> Tensor:
        seen.append(weights)
        return draw(weights, number)

    monkeypatch.setattr(torch, "multinomial", spy)
    return seen


@seeds
def test_c_mixup_draws_partners_by_a_gaussian_kernel_of_label_distances(seed: int, weights: list[Tensor]) -> None:
    page = recipe("def close_partners", seed=seed)
    values, mix, of_page = page["values"], page["mix"], weights[0].double()
    for i, j in positions(of_page.shape):
        kernel = [math.exp(-float((values[i, 0] - values[k, 0]) ** 2) / (2 * 0.5**2)) for k in range(page["B"])]
        close(of_page[i, j] / of_page[i].sum(), kernel[j] / sum(kernel))
    page["close_partners"](torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 5.0)  # the distance is 5
    close(weights[1], torch.tensor([[1, math.exp(-0.5)]]))

    output = exact(page["regress"])(mixed(page["x"], mix))
    errors = [(output[i] - own * values[i].double() - (1 - own) * values[j].double()) ** 2 for i, j, own in pairs(mix)]
    close(page["loss"], torch.stack(errors).mean())


def test_lisa_mixes_domains_of_a_class_or_classes_of_a_domain(weights: list[Tensor]) -> None:
    ways = set()
    for seed in range(6):
        page = recipe("def partners(", seed=seed)
        by_class = bool(page["by_class"])
        ways.add(by_class)
        same, other = (page["y"], page["domain"])[:: 1 if by_class else -1]
        for i, partner in enumerate(page["mix"].index.tolist()):
            others = [k for k in range(page["B"]) if same[k] == same[i] and other[k] != other[i]]
            assert weights[-1][i].nonzero().flatten().tolist() == (others or [i])
            assert partner in (others or [i])
        assert set(weights[-1].flatten().tolist()) == {0, 1}
        close(page["loss"], loss_of(page, page["mix"]))
    assert ways == {True, False}


def test_balanced_mixup_mixes_two_batches_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rand, number = torch.rand, torch.tensor(0.9)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: rand(*shape, **options) if shape[0] else number)
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
    page = recipe("attention = torch.rand", seed=seed)
    mix, lam = page["mix"], []
    for attention in page["attention"].double():
        kept = [attention[4 * i + j] * mix.lam[0, 0, 2 * i, 2 * j] for i, j in positions((4, 4))]
        lam.append(torch.stack(kept).sum() / attention.sum())
    close(page["loss"], loss_of(page, mix, lam))


def test_remix_gives_the_label_of_the_rare_class_unless_the_frequent_one_dominates() -> None:
    seen = set()
    for seed in (0, 2, 3, 12, 13, 14, 17, 18):
        page = recipe("ratio, lam =", seed=seed)
        y, counts, mix = page["y"], page["counts"].tolist(), page["mix"]
        drawn, lam = float(mix.lam), []
        for i, j in enumerate(mix.index.tolist()):
            ratio = counts[y[i]] / counts[y[j]]
            lam.append(1.0 if ratio <= 1 / 3 and 1 - drawn < 0.5 else 0.0 if ratio >= 3 and drawn < 0.5 else drawn)
        seen |= {"own" if value == 1 else "partner" if value == 0 else "both" for value in lam}
        close(page["loss"], loss_of(page, mix, lam))
    assert seen == {"own", "partner", "both"}


@seeds
def test_snapmix_weighs_labels_by_their_evidence_in_sight(seed: int) -> None:
    page = recipe("evidence =", seed=seed)
    mix, evidence = applied(page["cutmix"]), page["evidence"].double()
    own, partner = [], []
    for i, j in enumerate(mix.index.tolist()):
        inside = [p for p in positions(evidence.shape[1:]) if mix.lam[0, 0, p[0], p[1]] == 0]
        own.append(1 - sum(float(evidence[i, p[0], p[1]]) for p in inside) / float(evidence[i].sum()))
        partner.append(sum(float(evidence[j, p[0], p[1]]) for p in inside) / float(evidence[j].sum()))
    close(page["loss"], loss_of(page, mix, own, partner))


def test_moex_takes_the_moments_of_the_partner() -> None:
    page = recipe("def moex(")
    x, index = page["x"].double(), page["mix"].index
    expected = torch.empty_like(x)
    for i, j in enumerate(index.tolist()):
        for p in positions(x.shape[2:]):
            own, partner = x[i, :, p[0], p[1]], x[j, :, p[0], p[1]]
            scale = ((partner.var() + 1e-5) / (own.var() + 1e-5)).sqrt()
            expected[i, :, p[0], p[1]] = (own - own.mean()) * scale + partner.mean()
    close(page["moex"](page["x"], index), expected)
    close(page["loss"], mean_nll(exact(page["net"])(expected), page["y"], page["mix"], [0.9] * page["B"]))


# Other uses


def test_regmixup_adds_the_loss_of_the_clean_batch_to_that_of_the_mixed() -> None:
    page = recipe("strong = MixUp")
    mix, x, y = applied(page["strong"]), page["x"], page["y"]
    assert len(mix.index) == page["B"]
    close(page["loss"], mean_nll(exact(page["net"])(x.double()), y, mix, [1] * page["B"]) + loss_of(page, mix))


@seeds
def test_mixstyle_mixes_mean_and_deviation_of_each_channel(seed: int, page: Page) -> None:
    input, mixer = images(6, 9).requires_grad_(), page["MixStyle"](0.5, p=0.5, per_sample=True)
    output = seeded(seed, mixer, input)
    mix = MixUp(0.5, p=0.5, per_sample=True).sample(input)

    x, rows = input.detach().double().requires_grad_(), []
    for i, j, lam in pairs(mix):
        for c in range(3):
            means, deviations = zip(*((x[k, c].mean(), (x[k, c].var() + 1e-6).sqrt()) for k in (i, j)), strict=True)
            mean, deviation = (lam * own.detach() + (1 - lam) * other.detach() for own, other in (means, deviations))
            rows.append((x[i, c] - means[0].detach()) / deviations[0].detach() * deviation + mean)
    expected = torch.stack(rows).view_as(x)
    close(output, expected)
    weights = images(6, 9)
    close(gradients((output * weights).sum(), [input]), gradients((expected * weights).sum(), [x]))
    assert mixer.eval()(input) is input


@seeds
def test_i_mix_and_supcon_are_contrastive_losses_against_mixed_numbers(seed: int) -> None:
    page = recipe("queries, keys", seed=seed)
    net, mix, y, losses = exact(page["net"]), applied(page["uniform"]), page["y"].tolist(), []
    queries, keys = net(mixed(page["x"], mix)), net(page["view"].double())
    for i, source, lam in terms(mix):
        logits = torch.stack([queries[i] @ key / queries[i].norm() / key.norm() for key in keys]) / 0.2
        of_class = [nll(logits, k) for k, label in enumerate(y) if label == y[source]]
        losses.append(torch.stack((lam * nll(logits, source), lam * torch.stack(of_class).mean())))
    close(torch.stack((page["loss"], page["supcon"])), torch.stack(losses).sum(0) / page["B"])


def test_ict_mixes_what_the_teacher_says_of_each_sample_alone() -> None:
    page = recipe("teacher(unlabelled)")
    mix, x = applied(page["mixup"]), page["unlabelled"]
    output, guess = exact(page["net"])(mixed(x, mix)).softmax(1), exact(page["teacher"])(x.double()).softmax(1)
    errors = [(output[i] - own * guess[i] - (1 - own) * guess[j]) ** 2 for i, j, own in pairs(mix)]
    close(page["loss"], torch.stack(errors).mean())


@seeds
@pytest.mark.parametrize("block", ("first, second = CutMix(), MixUp", "CutMix(per_sample=True), CutMix()"))
def test_two_mixes_in_a_row_leave_the_shares_of_their_pixels(block: str, seed: int) -> None:
    page = recipe(block, seed=seed)
    B, mixes = page["B"], (applied(page["first"]), applied(page["second"]))
    total = torch.zeros(B, B, dtype=torch.float64)  # the share of each sample in each mixed one
    for row, column in positions((8, 8)):
        shares = torch.eye(B, dtype=torch.float64)
        for mix in mixes:
            kept = (mix.lam if mix.lam.ndim < 2 else mix.lam[:, 0, row, column]).double().view(-1, 1)
            shares = kept * shares + (1 - kept) * shares[mix.index]
        total += shares / 64
    close(page["targets"], total @ one_hot(page["y"], page["K"]))
    output = exact(page["net"])(mixed(mixed(page["x"], mixes[0]), mixes[1]))
    losses = [total[i, j] * nll(output[i], page["y"][j]) for i, j in positions(total.shape)]
    close(page["loss"], torch.stack(losses).sum() / B)


@seeds
def test_folding_lists_the_same_mixtures_under_the_dominant_sample(seed: int) -> None:
    page = recipe("folded_cut =", seed=seed)
    mix, cut, x = page["mix"], page["cut"], page["x"].double()
    close(page["folded"].lam, torch.tensor([max(lam, 1 - lam) for lam in mix.lam.tolist()]))
    assert share(page["folded_cut"], 0) >= 0.5
    inverse = torch.empty_like(mix.index).index_copy(0, mix.index, torch.arange(page["B"]))
    for draw in (mix._replace(lam=torch.tensor(0.2)), cut._replace(index=mix.index)):
        folded = draw._replace(lam=torch.where(draw.share < 0.5, 1 - draw.lam, draw.lam), index=inverse)
        if draw.share < 0.5:
            close(mixed(x, draw), mixed(x, folded)[mix.index])
    assert torch.equal(page["folded_cut"].lam, 1 - cut.lam if cut.share < 0.5 else cut.lam)


# Targets


def test_boxes_are_looked_up_by_sample_numbers_or_joined_with_the_share_of_their_image() -> None:
    page = recipe("def detection(", "joined =")
    mix, boxes, losses = page["mix"], page["boxes"], []
    output, rows = exact(page["net"])(mixed(page["x"], mix)), [torch.empty(0, 5)] * page["B"]
    for i, k, lam in terms(mix):
        losses += [lam * (output[i, :4] - box).abs().sum() for box in boxes[k]]
        rows[i] = torch.cat((rows[i], torch.cat((boxes[k], lam.expand(len(boxes[k]), 1)), 1)))
    close(page["loss"], torch.stack(losses).sum() / page["B"])
    for expected, joined, weights in zip(rows, page["joined"], page["weights"], strict=True):
        close(torch.cat((joined, torch.tensor(weights)[:, None]), 1), expected)


@seeds
def test_ctc_takes_the_tokens_and_the_lengths_of_each_text(seed: int) -> None:
    page = recipe("def ctc(", seed=seed)
    mix, frames, output, losses = page["mix"], page["frames"].tolist(), page["output"].double(), []
    for i, k, lam in terms(mix):
        length, heard = page["lengths"][k], max(frames[i], frames[mix.index[i]])
        own = F.ctc_loss(output[:heard, i], page["tokens"][k, :length], torch.tensor(heard), length, reduction="sum")
        losses.append(lam * own)
    torch.testing.assert_close(page["loss"].double(), torch.stack(losses).sum() / page["B"], rtol=1e-5, atol=0)


@seeds
def test_a_smaller_output_takes_a_smaller_lam_and_smaller_labels(seed: int) -> None:
    page = recipe("def classmix(", "hard =", "half =", seed=seed)
    mix, maps, net = page["mix"], page["maps"], exact(page["small"])
    kept, labels = mix.lam[0, :, ::2, ::2] == 1, maps[:, ::2, ::2]
    hard = labels.where(kept, labels[mix.index])
    assert (hard == 255).sum() == page["B"] * 4  # the first row is ignored
    close(page["loss"], F.cross_entropy(net(mixed(page["x"], mix)), hard, ignore_index=255))


@seeds
def test_hard_maps_of_frames_keep_their_codes(seed: int) -> None:
    x, maps = torch.rand(6, 3, 10), torch.randint(10, (6, 10), generator=torch.Generator().manual_seed(seed))
    page = recipe("hard =", seed=seed, x=x, maps=maps)
    hard, (lam, index) = page["hard"], page["mix"]
    assert hard[:, 0].eq(255).all()
    assert torch.equal(hard, maps.where(lam[0] == 1, maps[index]))


@seeds
@pytest.mark.parametrize("training", (True, False))
def test_dice_and_cross_entropy_of_a_cut_batch_are_those_of_its_hard_map(training: bool, seed: int) -> None:
    page = recipe("def dice(", seed=seed)
    mix, labels, K = applied(page["cutmix"]), page["labels"][:, 0], page["K"]
    output = exact(page["segment"])(mixed(page["x"], mix))
    loss = page["loss"] if training else page["criterion"].eval()(output, page["maps"].where(labels != 255, -1))
    hard, scores = labels.where(mix.lam[0] == 1, labels[mix.index]) if training else labels, []
    valid = hard != 255
    assert 0 < valid.double().mean() < 1
    for i, c in positions((page["B"], K)):
        probability, target = output[i].softmax(0)[c], (hard[i] == c).double()
        total = probability[valid[i]].sum() + target.sum()
        scores.append(1 - (2 * probability[target == 1].sum() + 1) / (total + 1))
    close(loss, torch.stack(scores).mean() + F.cross_entropy(output, hard, ignore_index=255))


def test_only_mixed_targets_make_a_perfect_map_a_perfect_dice() -> None:
    page = recipe("def dice(")
    maps, K, half = torch.randint(10, (8, 8, 8)), page["K"], (torch.arange(8) < 4).float().expand(1, 1, 8, 8)
    mix = Mix(half, torch.arange(page["B"]).roll(1))
    page["cutmix"](page["x"], mix)
    perfect = 100 * one_hot(maps.where(mix.lam[0] == 1, maps[mix.index]), K)
    assert page["criterion"](perfect, maps) < 1e-6
    interpolated = mix_loss(page["dice"], perfect, one_hot(maps, K), mix._replace(lam=mix.share))
    assert interpolated.min() > 0.1


@seeds
def test_a_union_holds_the_tags_of_both(seed: int) -> None:
    page = recipe("sound, frames", "union =", seed=seed)
    tags, (lam, index) = page["tags"], applied(page["mixup"])
    for i, j in enumerate(index.tolist()):
        heard = [k for k, volume in ((i, lam), (j, 1 - lam)) if volume > 0]
        assert torch.equal(page["union"][i], tags[heard].amax(0))


# The page of the criterion


def test_the_page_sorts_the_losses_of_torch_by_what_they_do() -> None:
    text = (ROOT / "docs/criterion.md").read_text()
    lists = re.findall(r"^- (four raise|five give)(.*?);$", text, re.DOTALL | re.MULTILINE)
    named = {start: re.findall(r"`(\w+Loss)`", rest) for start, rest in lists}
    assert named == {
        "four raise": [kind.module.__name__ for kind in KINDS if kind.hard],
        "five give": [kind.module.__name__ for kind in KINDS if kind.linear],
    }


@seeds
def test_parts_of_a_target_are_those_of_one_sample(seed: int) -> None:
    page = recipe("def two_heads(", of="criterion", seed=seed)
    net, mix, part, losses = exact(page["net"]), applied(page["mixup"]), page["target"], []
    output = net(mixed(page["x"], mix))
    for i, k, lam in terms(mix):
        regression = (output[i, 0] - part["age"][k].double()) ** 2
        losses.append(lam * part["weight"][k] * (nll(output[i, 1:], part["class"][k]) + regression))
    loss = torch.stack(losses).sum() / len(output)
    close(page["loss"], loss)
    close(gradients(page["loss"], page["net"].parameters()), gradients(loss, net.parameters()))


# What holds for every mixer


def mixer(name: str, **options: Any) -> Draw:
    def draw(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
        mixer = MIXERS[name]() if name in MIXERS else page[name](**options)
        return mixer(input), applied(mixer)

    return draw


def classmix(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    maps = torch.randint(page["K"], (len(input), *input.shape[2:]), device=input.device)
    mix: Mix = page["classmix"](maps, MixUp().sample_index(input))
    return mix_inputs(input, mix), mix


def close_partners(page: Page, input: Tensor) -> tuple[Tensor, Mix]:
    values = torch.randn(len(input), 2, device=input.device)
    mix = MixUp(1.0).sample(input)._replace(index=page["close_partners"](values, values, 1.0))
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
    "ResizeMix": mixer("ResizeMix"),
    "classmix": classmix,
    "close_partners": close_partners,
    "choice_of_the_page": choice,
}


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
    mixer.sample_index = lambda _: PARTNERS  # compiled, partners are drawn in another way
    graph: Callable[..., Tensor] = torch.compile(mixer, fullgraph=True, backend="eager")
    output = seeded(1, graph, IMAGES)
    close(output, mixer(IMAGES).double())
    assert not torch.equal(output, IMAGES)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ("resizemix", "classmix", "close_partners", "partners", "moex"))
def test_a_function_of_the_page_is_one_graph(name: str, page: Page) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "resizemix": (IMAGES, PARTNERS),
        "classmix": (torch.randint(page["K"], (6, 8, 12)), PARTNERS),
        "close_partners": (torch.randn(6, 1), torch.randn(9, 1), 0.5),
        "partners": (torch.rand(6, 6) < 0.3,),
        "moex": (IMAGES, PARTNERS),
    }
    graph: Callable[..., Any] = torch.compile(page[name], fullgraph=True, backend="eager")
    graph(*arguments[name])
