"""docs/programs.md: each program equals its formula, written by hand, and the line that one writes first does not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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

Loss = Callable[[Any], Any]
NUMBERS = torch.arange(8)  # of samples
TEXT = (ROOT / "docs" / "programs.md").read_text()


def section(heading: str) -> Any:
    """What the first block of the page and those of this section define, and a criterion that is linked."""
    page: Any = ModuleType("program")
    first, *others = TEXT.split("\n### ")
    (own,) = [each for each in others if each.startswith(f"{heading}\n")]
    sys.modules["program"] = page  # so that what it defines can be pickled
    for block in FENCE.findall(first) + FENCE.findall(own):
        exec(block, page.__dict__)
    page.follows = MixUpCriterion(nn.CrossEntropyLoss(), page.mixer)
    return page


def blend(value: Any, mix: Mix, loss: Loss = lambda value: value) -> Any:
    """The values, or what a loss makes of them, of the samples and of their partners."""
    return mix.lam * loss(value) + (1 - mix.lam) * loss(value[mix.index])


def entropies(output: Tensor) -> Loss:
    return lambda y: -output.log_softmax(1)[torch.arange(len(y)), y]


def entropy(output: Tensor, y: Tensor, mix: Mix) -> Any:
    return blend(y, mix, entropies(output)).mean()


def soft_entropy(output: Tensor, target: Tensor) -> Any:
    return -(target.detach() * output.log_softmax(1)).sum(1).mean()


def stale(p: Any, output: Tensor) -> Any:
    """The loss of the criterion after the mixer was called once more."""
    p.mixer(p.x)
    return p.follows(output, p.y)


# Of the page: (the loss by hand, that of the line that one writes first)


def adversarial(p: Any) -> tuple[Any, Any]:
    p.mixer.eval()  # as model.eval() would
    output = p.model(p.attacked)
    losses = entropy(output, p.y, p.mix), p.follows(output, p.y)
    attacks = [torch.autograd.grad(loss, p.attacked, retain_graph=True)[0].sign() for loss in losses]
    hand, first = (entropy(p.model(p.mixed + 0.03 * attack), p.y, p.mix) for attack in attacks)
    return hand, first


def matched(p: Any) -> tuple[Any, None]:
    assert torch.equal(p.guessed, p.model(p.x[3:]).softmax(1))
    assert p.dominant.lam.min() >= 0.5
    dominant = Mix(p.dominant.lam[:, None], p.dominant.index)
    soft, output = blend(torch.cat((F.one_hot(p.y[:3], 10), p.guessed)), dominant), p.output
    torch.testing.assert_close(output, p.model(blend(p.x.flatten(1), dominant)))
    guesses = (output[3:].softmax(1) - soft[3:]).square().mean()
    return 75 * guesses + soft_entropy(output[:3], soft[:3]), None


def stepped(p: Any) -> tuple[Any, Any]:
    p.loss = p.closure().detach()
    return entropy(p.model(p.mixed), p.y, p.mix).detach(), p.follows(p.model(p.mixer(p.x)), p.y)


def decoded(p: Any) -> tuple[Any, Any]:
    def logits(text: Tensor) -> Tensor:  # (B, V, T)
        before = torch.cat((torch.zeros(8, 1, dtype=torch.long), text[:, :-1]), 1)
        return torch.stack([p.embed(before[:, t]) + memory for t in range(5)], 2)

    memory = p.encoder(blend(p.sound, p.mix))
    words = [lambda text, t=t: entropies(logits(text)[:, :, t])(text[:, t]).mean() / 5 for t in range(5)]
    return sum(blend(p.text, p.mix, word) for word in words), p.follows(logits(p.text), p.text)


def margins(p: Any) -> tuple[Any, Any]:
    features = F.normalize(p.body(p.mixed))
    angles = torch.stack([(features * F.normalize(speaker, dim=0)).sum(1).acos() for speaker in p.speakers], 1)

    def logits(y: Tensor) -> Tensor:
        return 30 * (angles + 0.2 * (y[:, None] == torch.arange(10))).cos()

    return blend(p.y, p.mix, lambda y: entropies(logits(y))(y)).mean(), p.follows(logits(p.y), p.y)


def contrasted(p: Any) -> tuple[Any, Any]:
    queries, zeros = p.model(p.mixed), torch.zeros_like(p.y)

    def logits(keys: Tensor) -> Tensor:
        return torch.cat(((queries @ keys.T).diagonal()[:, None], queries @ p.queue.T), 1)

    return blend(p.keys, p.mix, lambda keys: entropies(logits(keys))(zeros)).mean(), p.follows(logits(p.keys), zeros)


def survived(p: Any) -> tuple[Any, Any]:
    def cox(time: Tensor, event: Tensor) -> Tensor:
        dead = event.nonzero()[:, 0]  # as .bool() would
        return torch.stack([risk[time >= time[k]].logsumexp(0) - risk[k] for k in dead]).mean()

    risk, (time, event) = p.model(p.mixed)[:, 0], p.target.values()
    hand = blend(NUMBERS, p.mix, lambda i: cox(time[i], event[i]))
    return hand, cox(blend(time, p.mix), blend(event, p.mix))


def hooked(p: Any) -> tuple[Any, None]:
    assert list(p.backbone.state_dict()) == ["weight", "bias"]
    model, mix, x = through_torch_save(p.backbone), applied(p.backbone.mixer), p.x.flatten(1)
    torch.testing.assert_close(model(x), F.linear(blend(x, applied(model.mixer)), model.weight, model.bias))
    assert torch.equal(model.eval()(x), F.linear(x, model.weight, model.bias))
    return entropy(F.linear(blend(x, mix), p.backbone.weight, p.backbone.bias), p.y, mix), None


def normal(p: Any) -> tuple[Any, None]:
    mean, log_variance = p.head(p.mixed).chunk(2, 1)
    return (log_variance + (blend(p.value, p.mix) - mean).square() / log_variance.exp()).mean() / 2, None


def selected(p: Any) -> tuple[Any, None]:
    torch.testing.assert_close(p.time_first.transpose(0, 1), blend(p.frames.transpose(0, 1), p.mix))
    return blend(p.y, p.mix, entropies(p.model(p.mixed))).sort().values[4:].mean(), None


PROGRAMS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "Adversarial attacks": adversarial,
    "Two networks": lambda p: (
        sum(entropy(each(p.mixed), p.y, p.mix) for each in p.pair), sum(stale(p, each(p.mixed)) for each in p.pair),
    ),
    "Two views or frames": lambda p: (
        entropy(p.first, p.y, p.mix) + (p.first - p.model(blend(p.views[1], p.mix))).square().mean(),
        stale(p, p.first) + (p.first - p.model(p.mixer(p.views[1]))).square().mean(),
    ),
    "Joined batches": lambda p: (
        sum(entropy(p.model(blend(x, mix)), p.y, mix) for x, mix in zip(p.parts, p.draws, strict=True)),
        sum(p.follows(output, p.y) for output in p.outputs),
    ),
    "MixMatch: two batches": matched,
    "Optimizers that call forward again": stepped,
    "An EMA copy": lambda p: (entropies(p.model(p.x))(p.y).mean().detach(), p.follows(p.model(p.x), p.y)),
    "A teacher": lambda p: (
        (stored := soft_entropy(p.output, blend(p.teacher(p.x).softmax(1), p.mix)))
        + soft_entropy(p.output, p.teacher(p.mixed).softmax(1)),
        stored + p.follows(p.output, p.soft),
    ),
    "Acting in training mode": lambda p: (
        entropy(p.model(p.mixed), p.model(p.x).argmax(1), p.mix),
        entropy(p.model(p.mixed), p.model(p.mixed).argmax(1), p.mix),
    ),
    "Federated clients": lambda p: (
        entropy(output := p.client(blend(p.x, mix := applied(p.mixer))), p.y, mix), stale(p, output)
    ),
    "Teacher forcing": decoded,
    "Margin heads": margins,
    "MoCo and labels of 0": contrasted,
    "CLIP: both directions": lambda p: (
        (images := entropy(p.logits, NUMBERS, p.mix))
        + entropy(p.logits.T, NUMBERS, Mix(p.mix.lam, p.mix.index.argsort())),  # the inverse permutation
        images + p.follows(p.logits.T, NUMBERS),
    ),
    "Weights of samples": lambda p: (
        blend(NUMBERS, p.mix, lambda i: p.weight[i] * entropies(p.model(p.mixed))(p.y[i])).mean(),
        (p.weight * blend(p.y, p.mix, entropies(p.model(p.mixed)))).mean(),
    ),
    "Losses of more than two arguments": survived,
    "Variance and quantile heads": normal,
    "Another batch size": selected,
    "A model that computes its own loss": lambda p: (
        entropy(p.output, p.y, p.mix),
        MixUpCriterion(lambda output, y: p.follows(output, y), p.mixer)(p.output, p.y),
    ),
    "A model that is not yours": hooked,
    "A frozen part": lambda p: (
        entropy(p.head(p.backbone(blend(p.x, applied(p.mixer)))), p.y, applied(p.mixer)),
        F.cross_entropy(p.head(nn.Sequential(MixUp(1.0), p.backbone).eval()(p.x)), p.y),
    ),
}  # fmt: skip


@pytest.mark.parametrize("heading", PROGRAMS)
def test_a_program_is_right_and_the_line_that_one_writes_first_is_not(heading: str) -> None:
    page = section(heading)
    expected, first = PROGRAMS[heading](page)
    torch.testing.assert_close(page.loss, expected)
    assert first is None or not torch.isclose(first, expected, rtol=2e-5)
    if expected.requires_grad:
        modules = [value for value in vars(page).values() if isinstance(value, nn.Module)]
        weights = list({weight: None for each in modules for weight in each.parameters() if weight.requires_grad})
        options: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        gradients = [torch.autograd.grad(loss, weights, **options) for loss in (page.loss, expected)]
        torch.testing.assert_close(*gradients)
        assert any(gradient.any() for gradient in gradients[1])


@pytest.mark.needs("transformers")
def test_a_text_model_of_a_library_gets_the_union_of_both_masks() -> None:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}
    bert = library.BertModel(library.BertConfig(vocab_size=20, **sizes, **dropout))
    plain, bert.mixer = copy.deepcopy(bert), MixUp(1.0)
    bert.register_forward_pre_hook(section("A text model of a library").mix_text, with_kwargs=True)
    tokens, mask = torch.randint(20, (4, 6)), (torch.arange(6) < torch.tensor([[6], [2], [4], [3]])).long()
    output = bert(input_ids=tokens, attention_mask=mask)[0]
    mix, words = applied(bert.mixer), bert.get_input_embeddings().weight[tokens]
    right, own = (plain(inputs_embeds=blend(words, mix), attention_mask=m)[0] for m in (mask | mask[mix.index], mask))
    torch.testing.assert_close(output, right)
    assert not torch.allclose(output, own, rtol=1e-3)
    output = bert.eval()(input_ids=tokens, attention_mask=mask)[0]
    torch.testing.assert_close(output, plain(input_ids=tokens, attention_mask=mask)[0])


@slow_vmap
def test_a_sample_enters_the_gradients_of_two_mixtures_and_under_vmap_of_none() -> None:
    p = section("Per-sample gradients and privacy")

    def gradients(losses: Tensor) -> Tensor:
        return torch.stack([torch.autograd.grad(loss, p.model[1].weight, retain_graph=True)[0] for loss in losses])

    def inside(parameters: Any, x: Tensor, y: Tensor) -> Any:
        return p.follows(functional_call(p.model, parameters, p.mixer(x.unsqueeze(0))), y.unsqueeze(0))

    found = vmap(grad(inside), (None, 0, 0), randomness="different")(p.parameters, p.x, p.y)["1.weight"]
    torch.testing.assert_close(found, gradients(entropies(p.model(p.x))(p.y)))  # of unmixed samples
    expected = gradients(blend(p.y, p.mix, entropies(p.model(p.mixed))))
    torch.testing.assert_close(p.gradients["1.weight"], expected)
    p.x[0] += 1
    changed = vmap(grad(p.loss_of_one), (None, 0, 0))(p.parameters, p.mixer(p.x, p.mix), p.dense)["1.weight"]
    assert (changed != p.gradients["1.weight"]).flatten(1).any(1).sum() == 2


@pytest.mark.parametrize("way, variance, coverage", ((False, 0.21, 0.87), (True, 0.82, 0.96)))
def test_heads_of_variances_and_quantiles_learn_the_numbers_of_the_page_and_are_repaired(
    way: bool, variance: float, coverage: float
) -> None:
    def data() -> tuple[Tensor, Tensor]:
        x = 2 * torch.randn(20_000, 1)
        return x, x + torch.randn_like(x) / 2

    def trained(loss: Any) -> Any:
        def closure() -> Any:
            optimizer.zero_grad()
            value = criterion(head(mixed), y, mix).mean()
            value.backward()
            return value

        head, criterion = nn.Linear(1, 2), MixUpCriterion(loss, interpolate_loss=way)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")
        optimizer.step(closure)
        return head.requires_grad_(False)

    (x, y), (held_out, value), mix = data(), data(), MixUp(0.2, per_sample=True).sample(torch.empty(20_000))
    mixed, page = MixUp()(x, mix), section("Variance and quantile heads")
    found: dict[str, Any] = {"head": trained(page.gaussian), "x": held_out, "value": value}
    exec(FENCE.findall(TEXT.split("### Variance and quantile heads\n")[1])[1], found)
    learned = found["log_variance"].exp().mean()
    assert abs(learned - variance) < 0.015
    assert abs(found["factor"] * learned - 0.25) < 0.015

    errors = value - trained(lambda o, y: torch.maximum(0.9 * (y - o), -0.1 * (y - o))[:, :1])(held_out)[:, :1]
    assert abs((errors <= 0).float().mean() - coverage) < 0.015
