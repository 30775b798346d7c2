"""docs/programs.md: each program equals its formula, written by hand, and the line that one writes first does not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from mixup_nn import Mix, MixUp, MixUpCriterion

from .cases import applied, slow_vmap, through_torch_save
from .test_package import FENCE, ROOT

Pair = Sequence[Any]
Loss = Callable[[Any], Any]
NUMBERS = torch.arange(8)  # of samples
TEXT = (ROOT / "docs" / "programs.md").read_text()


def section(heading: str) -> Any:
    """What the first block of the page and those of this section define, and a criterion that is linked."""
    page: Any = ModuleType("program")
    sys.modules["program"] = page  # so that what it defines can be pickled
    first, own = (TEXT.split(f"{start}\n")[1].split("\n### ")[0] for start in ("# Programs", f"### {heading}"))
    for block in FENCE.findall(first) + FENCE.findall(own):
        exec(block, page.__dict__)
    page.follows = MixUpCriterion(nn.CrossEntropyLoss(), page.mixer)
    return page


def blend(value: Any, mix: Mix, loss: Loss = lambda value: value) -> Any:
    """The values, or what a loss makes of them, of the samples and of their partners."""
    return mix.lam * loss(value) + (1 - mix.lam) * loss(value[mix.index])


def entropies(output: Tensor, y: Tensor) -> Any:
    return -output.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


def entropy(output: Tensor, y: Tensor, mix: Mix) -> Any:
    return blend(y, mix, lambda y: entropies(output, y)).mean()


def soft_entropy(output: Tensor, target: Tensor) -> Any:
    return -(target.detach() * output.log_softmax(1)).sum(1).mean()


def stale(p: Any, output: Tensor) -> Any:
    p.mixer(p.x)  # once more, and the criterion follows
    return p.follows(output, p.y)


def read(p: Any, target: Tensor, logits: Loss, labels: Loss = lambda target: target) -> Pair:
    """Logits that depend on the target: by hand for both targets, and by a criterion with those of the sample."""
    hand = blend(target, p.mix, lambda target: entropies(logits(target), labels(target)).mean())
    return hand, p.follows(logits(target), labels(target))


def adversarial(p: Any) -> Pair:
    p.mixer.eval()  # as model.eval() would
    clean, output = p.model(p.mixed), p.model(p.start)
    losses = entropy(output, p.y, p.mix), p.follows(output, p.y)
    gradients = (torch.autograd.grad(loss, p.start, retain_graph=True)[0] for loss in losses)
    right, wrong = (p.model(p.mixed + 0.03 * gradient.sign()) for gradient in gradients)
    divergence = soft_entropy(right, clean.softmax(1)) - soft_entropy(clean, clean.softmax(1))
    torch.testing.assert_close(p.trades, entropy(clean, p.y, p.mix) + 6 * divergence)
    return entropy(right, p.y, p.mix), entropy(wrong, p.y, p.mix)


def matched(p: Any) -> Pair:
    assert torch.equal(p.guessed, p.model(p.x[3:]).softmax(1))
    assert p.dominant.lam.min() >= 0.5
    dominant = Mix(p.dominant.lam[:, None], p.dominant.index)
    soft, output = blend(torch.cat((F.one_hot(p.y[:3], 10), p.guessed)), dominant), p.output
    torch.testing.assert_close(output, p.model(blend(p.x.flatten(1), dominant)))
    return 75 * (output[3:].softmax(1) - soft[3:]).square().mean() + soft_entropy(output[:3], soft[:3]), None


def stepped(p: Any) -> Pair:
    p.loss = p.closure().detach()
    return entropy(p.model(p.mixed), p.y, p.mix).detach(), p.follows(p.model(p.mixer(p.x)), p.y)


def survived(p: Any) -> Pair:
    def cox(time: Tensor, event: Tensor) -> Tensor:
        return torch.stack([risk[time >= time[k]].logsumexp(0) - risk[k] for k in event.nonzero()[:, 0]]).mean()

    risk, (time, event) = p.model(p.mixed)[:, 0], p.target.values()
    return blend(NUMBERS, p.mix, lambda i: cox(time[i], event[i])), cox(blend(time, p.mix), blend(event, p.mix))


def selected(p: Any) -> Pair:
    torch.testing.assert_close(p.time_first.transpose(0, 1), blend(p.frames.transpose(0, 1), p.mix))
    torch.testing.assert_close(p.of_words, entropy(p.logits.transpose(1, 2), p.words, p.mix))
    return blend(p.y, p.mix, lambda y: entropies(p.model(p.mixed), y)).sort().values[4:].mean(), None


def hooked(p: Any) -> Pair:
    assert list(p.backbone.state_dict()) == ["weight", "bias"]
    model, mix, x = through_torch_save(p.backbone), applied(p.backbone.mixer), p.x.flatten(1)
    torch.testing.assert_close(model(x), F.linear(blend(x, applied(model.mixer)), model.weight, model.bias))
    assert torch.equal(model.eval()(x), F.linear(x, model.weight, model.bias))
    return entropy(F.linear(blend(x, mix), p.backbone.weight, p.backbone.bias), p.y, mix), None


# The loss by hand, and that of the line that one writes first
PROGRAMS: dict[str, Callable[[Any], Pair]] = {
    "Adversarial attacks": adversarial,
    "Two networks": lambda p: (
        sum(entropy(each(p.mixed), p.y, p.mix) for each in p.pair), sum(stale(p, each(p.mixed)) for each in p.pair)),
    "Two views or frames": lambda p: (
        entropy(p.first, p.y, p.mix) + (p.first - p.model(blend(p.views[1], p.mix))).square().mean(),
        stale(p, p.first) + (p.first - p.model(p.mixer(p.views[1]))).square().mean()),
    "Joined batches": lambda p: (
        sum(entropy(p.model(blend(x, mix)), p.y, mix) for x, mix in zip(p.parts, p.draws, strict=True)),
        sum(p.follows(output, p.y) for output in p.outputs)),
    "MixMatch: two batches": matched,
    "Optimizers that call forward again": stepped,
    "An EMA copy": lambda p: (entropies(p.model(p.x), p.y).mean().detach(), p.follows(p.model(p.x), p.y)),
    "A teacher": lambda p: [
        soft_entropy(p.output, blend(p.teacher(p.x).softmax(1), p.mix)) + other
        for other in (soft_entropy(p.output, p.teacher(p.mixed).softmax(1)), p.follows(p.output, p.soft))],
    "Acting in training mode": lambda p: [
        entropy(p.model(p.mixed), p.model(seen).argmax(1), p.mix) for seen in (p.x, p.mixed)],
    "Federated clients": lambda p: (
        entropy(output := p.client(blend(p.x, mix := applied(p.mixer))), p.y, mix), stale(p, output)),
    "Teacher forcing": lambda p: read(p, p.text, lambda text: torch.stack(
        [p.embed(word) + p.encoder(blend(p.sound, p.mix)) for word in (0 * text[:, 0], *text.T[:-1])], 2)),
    "Margin heads": lambda p: read(p, p.y, lambda y: 30 * torch.cos(
        (F.normalize(p.body(p.mixed)) @ F.normalize(p.speakers).T).acos() + 0.2 * (y[:, None] == torch.arange(10)))),
    "MoCo and labels of 0": lambda p: read(p, p.keys, lambda keys: torch.cat(
        ((p.model(p.mixed) @ keys.T).diagonal()[:, None], p.model(p.mixed) @ p.queue.T), 1), lambda _: 0 * p.y),
    "CLIP: both directions": lambda p: [
        entropy(p.logits, NUMBERS, p.mix) + back for back in (  # of the inverse permutation
            entropy(p.logits.T, NUMBERS, p.mix._replace(index=p.mix.index.argsort())), p.follows(p.logits.T, NUMBERS))],
    "Weights of samples": lambda p: (
        blend(NUMBERS, p.mix, lambda i: p.weight[i] * entropies(p.model(p.mixed), p.y[i])).mean(),
        (p.weight * blend(p.y, p.mix, lambda y: entropies(p.model(p.mixed), y))).mean()),
    "Losses of more than two arguments": survived,
    "Variance and quantile heads": lambda p: (
        ((spread := p.head(p.mixed)[:, 1:]) + (blend(p.value, p.mix) - p.head(p.mixed)[:, :1]).square() / spread.exp())
        .mean() / 2, None),
    "Another batch size": selected,
    "A model that computes its own loss": lambda p: (
        entropy(p.output, p.y, p.mix), MixUpCriterion(lambda output, y: p.follows(output, y), p.mixer)(p.output, p.y)),
    "A model that is not yours": hooked,
    "A frozen part": lambda p: (
        entropy(p.head(p.backbone(blend(p.x, applied(p.mixer)))), p.y, applied(p.mixer)),
        F.cross_entropy(p.head(nn.Sequential(MixUp(1.0), p.backbone).eval()(p.x)), p.y)),
}  # fmt: skip


@pytest.mark.parametrize("heading", PROGRAMS)
def test_a_program_is_right_and_the_line_that_one_writes_first_is_not(heading: str) -> None:
    p = section(heading)
    expected, first = PROGRAMS[heading](p)
    torch.testing.assert_close(p.loss, expected)
    assert first is None or not torch.isclose(first, expected, rtol=2e-5)
    if expected.requires_grad:
        weights = [w for m in vars(p).values() if isinstance(m, nn.Module) for w in m.parameters() if w.requires_grad]
        options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        gradients = [torch.autograd.grad(loss, weights, **options) for loss in (p.loss, expected)]
        torch.testing.assert_close(*gradients)
        assert any(gradient.any() for gradient in gradients[1])


@pytest.mark.needs("transformers")
def test_a_text_model_of_a_library_gets_the_union_of_both_masks() -> None:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = library.BertModel(library.BertConfig(vocab_size=20, **sizes)).eval()  # without dropout
    plain, bert.mixer = copy.deepcopy(bert), MixUp(1.0)
    bert.register_forward_pre_hook(section("A text model of a library").mix_text, with_kwargs=True)
    tokens, mask = torch.randint(20, (4, 6)), (torch.arange(6) < torch.tensor([[6], [2], [4], [3]])).long()
    output = bert(input_ids=tokens, attention_mask=mask)[0]
    mix, words = applied(bert.mixer), bert.get_input_embeddings().weight[tokens]
    right, own = (plain(inputs_embeds=blend(words, mix), attention_mask=m)[0] for m in (mask | mask[mix.index], mask))
    torch.testing.assert_close(output, right)
    assert not torch.allclose(output, own, rtol=1e-3)
    bert.mixer.eval()
    torch.testing.assert_close(*(model(input_ids=tokens, attention_mask=mask)[0] for model in (bert, plain)))


@slow_vmap
def test_a_sample_enters_the_gradients_of_two_mixtures_and_under_vmap_of_none() -> None:
    p = section("Per-sample gradients and privacy")
    each, losses = vmap(grad(p.loss_of_one), (None, 0, 0)), blend(p.y, p.mix, lambda y: entropies(p.model(p.mixed), y))
    expected = [torch.autograd.grad(loss, p.model[1].weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(p.gradients["1.weight"], torch.stack(expected))

    def inside(parameters: Any, x: Tensor, y: Tensor) -> Any:
        return p.follows(functional_call(p.model, parameters, p.mixer(x.unsqueeze(0))), y.unsqueeze(0))

    found = vmap(grad(inside), (None, 0, 0), randomness="different")(p.parameters, p.x, p.y)
    torch.testing.assert_close(found, each(p.parameters, p.x, F.one_hot(p.y, 10).float()))  # of unmixed samples
    p.x[0] += 1
    changed = each(p.parameters, p.mixer(p.x, p.mix), p.dense)["1.weight"]
    assert (changed != p.gradients["1.weight"]).flatten(1).any(1).sum() == 2


@pytest.mark.parametrize("way, variance, coverage", ((False, 0.21, 0.87), (True, 0.82, 0.96)))
def test_heads_learn_the_numbers_of_the_page_and_are_repaired(way: bool, variance: float, coverage: float) -> None:
    def trained(loss: Any) -> Any:
        def closure() -> Any:
            optimizer.zero_grad()
            (value := criterion(head(mixed), y, mix).mean()).backward()
            return value

        head, criterion = nn.Linear(1, 2), MixUpCriterion(loss, interpolate_loss=way)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")
        optimizer.step(closure)
        return head.requires_grad_(False)

    x, held_out = 2 * torch.randn(2, 20_000, 1)
    y, value = (each + torch.randn_like(each) / 2 for each in (x, held_out))
    mixed, page = MixUp()(x, mix := MixUp(0.2, per_sample=True).sample(x)), section("Variance and quantile heads")
    vars(page).update(head=trained(page.gaussian), x=held_out, value=value)
    exec(FENCE.findall(TEXT.split("### Variance and quantile heads\n")[1])[1], vars(page))
    learned = page.log_variance.exp().mean()
    quantile = trained(lambda o, y: torch.maximum(0.9 * (y - o), -0.1 * (y - o))[:, :1])(held_out)[:, :1]
    found = torch.stack([learned, page.factor * learned, (value <= quantile).float().mean()])
    torch.testing.assert_close(found, torch.tensor([variance, 0.25, coverage]), atol=0.015, rtol=0)
