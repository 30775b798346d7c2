"""The life of a mixer, a model and a criterion: what users do, in any order, against a model that knows what is due."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, settings, stateful
from hypothesis import strategies as st
from torch import Tensor, nn

from mixup_nn import CutMix, Mix, Mixer, MixUp, MixUpCriterion, RandomChoice

from . import reference
from .cases import MIXERS, refused, tenfold, through_pickle, through_torch_save
from .strategies import OfParts, Weighed


class Same(MixUp):
    pass


class Uniform(Mixer):
    """The least mixer of one's own."""

    def sample_lam(self, input: Tensor) -> Tensor:
        return torch.rand(len(input), device=input.device)


class Mirrored(MixUp):
    """Partners of one's own."""

    def sample_index(self, input: Tensor) -> Tensor:
        return torch.arange(len(input), device=input.device).flip(0)


LIVES: dict[str, Callable[[], Mixer]] = {
    **{name: make for name, make in MIXERS.items() if name != "own"},
    "choice_of_subclass": lambda: RandomChoice([Same(1.0), CutMix(1.0)]),
    "subclass": lambda: Same(1.0),
    "own_lam": Uniform,
    "own_index": lambda: Mirrored(1.0, per_sample=True),
}


class Parts(OfParts):
    """Squared errors times a weight for each sample, from a target in parts."""

    def __init__(self) -> None:
        super().__init__(partial(F.mse_loss, reduction="none"), "sum")


KINDS = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.NLLLoss, Parts)
COPIES = (copy.deepcopy, through_pickle, through_torch_save)
sizes, flags = st.sampled_from((2, 3, 4)), st.booleans()
modes = st.sampled_from((None, True, False))
kinds = st.integers(0, 3)  # of mix_by_hand
RESTING: tuple[set[int], ...] = (set(), set(), {0}, {1}, {0, 1})  # entries of a choice
often = stateful.rule(size=sizes, grad=flags, p=st.sampled_from((1, 1, 0.5, 0)), resting=st.sampled_from(RESTING))
GRADIENTS = (torch.enable_grad, torch.no_grad, torch.inference_mode)


class Net(nn.Module):
    """A model with its mixer inside, or registered in it and called in the loop; returns what its layer saw too."""

    def __init__(self, mixer: Mixer, *, inside: bool) -> None:
        super().__init__()
        self.mixer, self.linear, self.inside = mixer, nn.Linear(24, 3), inside

    def forward(self, input: Tensor, mix: Mix | None = None) -> tuple[Tensor, Tensor]:
        seen = self.mixer(input, mix) if self.inside else input
        return self.linear(seen.flatten(1)), seen

    def step(self, input: Tensor, mix: Mix | None = None) -> Tensor:
        """What the layer saw of a batch, as the loop of the user calls the model."""
        seen: Tensor = (self(input, mix) if self.inside else self(self.mixer(input, mix)))[1]
        return seen


@dataclass
class Known:
    """A mixer, and what is known of it."""

    module: Mixer
    training: bool = True
    drawn: Mix | None = None


def mix_by_hand(size: int, kind: int) -> Mix:
    """A mix of each shape of lam, with partners that repeat."""
    lam = torch.rand(((), (size,), (1, 1, 3, 4), (size, 1, 3, 4))[kind])
    return Mix(lam, torch.randint(size, (size,)))


class Life(stateful.RuleBasedStateMachine):
    make: Callable[[], Mixer]

    @stateful.initialize(seed=st.integers(0, 99), inside=flags, mode=modes)
    def begin(self, seed: int, inside: bool, mode: bool | None) -> None:
        torch.manual_seed(seed)
        self.own, self.other = Known(self.make()), Known(MixUp(1.0))
        self.net = Net(self.own.module, inside=inside)
        self.criterion = MixUpCriterion(nn.CrossEntropyLoss(), self.own.module, interpolate_loss=mode)
        self.link: Known | None = self.own
        self.loss_trains, self.mode, self.scale, self.p = True, mode, 1, self.own.module.p
        self.kind: type[nn.Module] = nn.CrossEntropyLoss
        self.resting: set[int] = set()

    def due(self, size: int, given: Mix | None) -> Mix | list[type[Exception]] | None:
        """The mix that is meant, none, or the errors of which one is due: the contract in a few lines."""
        if given is not None:
            return given if len(given.index) == size else [ValueError]
        if self.link is None or not (self.link.training and self.loss_trains):
            return None
        drawn = self.link.drawn
        other_size = drawn is not None and len(drawn.index) != size
        if drawn is None or not torch.is_grad_enabled():
            return [RuntimeError, ValueError] if other_size else [RuntimeError]
        return [ValueError] if other_size else drawn

    # Modes

    @stateful.rule(who=st.sampled_from(("mixer", "net", "criterion", "parent")), on=flags)
    def switch(self, who: str, on: bool) -> None:
        parent = nn.ModuleDict({"net": self.net, "criterion": self.criterion})
        {"mixer": self.own.module, "net": self.net, "criterion": self.criterion, "parent": parent}[who].train(on)
        if who != "criterion":
            self.own.training, self.resting = on, set()
        if who in ("criterion", "parent"):
            self.loss_trains = on

    # Forward

    def step(self, size: int, grad: bool, p: float, resting: set[int]) -> None:
        self.own.module.p = self.p = p
        if isinstance(self.own.module, RandomChoice) and self.own.training:
            self.resting = resting
            for i, entry in enumerate(self.own.module.mixers):
                entry.train(i not in resting)
        input, state = torch.randn(size, 2, 3, 4), torch.get_rng_state()
        drawn = self.own.module.sample(input)
        torch.set_rng_state(state)
        with torch.set_grad_enabled(grad) if self.own.training else torch.inference_mode(grad):
            seen = self.net.step(input)
        if not self.own.training:
            assert seen is input
            assert torch.equal(torch.get_rng_state(), state)
            return
        torch.testing.assert_close(seen, reference.mixed(input, drawn).float())
        self.own.drawn, lam, partners = drawn, drawn.lam, drawn.index.tolist()
        if isinstance(self.own.module, Mirrored):
            assert partners == list(range(size))[::-1]
        else:
            assert all(i != j for i, j in enumerate(partners))
        if self.p == 0 or self.resting == {0, 1}:
            assert (lam == 1).all()
        elif 0 in self.resting:  # what mixes numbers rests: boxes alone
            assert ((lam == 0) | (lam == 1)).all()
        elif 1 in self.resting:  # what cuts boxes rests
            assert (lam.flatten(1).amin(1) == lam.flatten(1).amax(1)).all()

    forward, forward_again = often(step), often(step)  # each rule is as likely as another

    @stateful.rule(size=sizes, kind=kinds, set_by_hand=flags)
    def forward_with_a_mix(self, size: int, kind: int, set_by_hand: bool) -> None:
        input, mix = torch.randn(size, 2, 3, 4), mix_by_hand(size, kind)
        state = torch.get_rng_state()
        torch.testing.assert_close(self.net.step(input, mix), reference.mixed(input, mix).float())
        assert torch.equal(torch.get_rng_state(), state)
        if self.own.training:
            assert self.own.module.last_mix is mix
            self.own.drawn = mix
            if set_by_hand:
                self.own.module.last_mix = self.own.drawn = mix_by_hand(size, kind)

    @stateful.rule(size=sizes)
    def forward_that_fails(self, size: int) -> None:
        with refused(ValueError):
            self.net.step(torch.randn(size, 2, 3, 4), mix_by_hand(size + 1, 0))
        with refused(TypeError):
            self.net.step(torch.ones(size, 2, 3, 4).long(), mix_by_hand(size, 0))

    @stateful.rule(size=sizes, on=flags)
    def forward_of_another_model(self, size: int, on: bool) -> None:
        self.other.module.train(on)(torch.randn(size, 2, 3, 4))
        self.other.training = on
        self.other.drawn = self.other.module.last_mix if on else self.other.drawn

    # Loss

    @stateful.invariant()
    def losses_are_those_of_the_mix_that_is_meant(self) -> None:
        """At every step: of the batch that is meant, and one of the many others."""
        drawn = None if self.link is None else self.link.drawn
        size = 4 if drawn is None else len(drawn.index)
        self.loss(size, None, torch.enable_grad)
        other, kind, misfit, grad = (int(torch.randint(n, ())) for n in (3, 4, 9, 3))
        self.loss(size + (other == 0), mix_by_hand(size + (misfit == 0), kind) if other == 1 else None, GRADIENTS[grad])

    def loss(self, size: int, mix: Mix | None, grad: Any) -> None:
        of_labels = self.kind is nn.CrossEntropyLoss or (self.mode is False and self.kind is not Parts)
        labels = self.kind is nn.NLLLoss or (of_labels and bool(torch.rand(()) < 0.5))
        output = torch.randn(size, 3, requires_grad=True)
        target: Any = torch.randint(3, (size,)) if labels else torch.rand(size, 3)
        target = {"weighed": Weighed(target, torch.rand(size))} if self.kind is Parts else target
        with grad():
            due, state, options = self.due(size, mix), torch.get_rng_state(), repr(vars(self.criterion.loss))
            if self.kind is Parts and self.mode is False and due is not None:
                due = [*due, ValueError, TypeError] if isinstance(due, list) else [ValueError, TypeError]
            if isinstance(due, list):
                with refused(*due):
                    self.criterion(output, target, mix)
                return
            value = self.criterion(output, target, mix)
            assert torch.equal(torch.get_rng_state(), state)
            assert repr(vars(self.criterion.loss)) == options
            if due is None and (not labels or self.kind in (nn.CrossEntropyLoss, nn.NLLLoss)):
                assert torch.equal(value, self.criterion.loss(output, target))
            expected = self.scale * self.by_the_oracle(output, target, due)
            torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-5)
        if value.requires_grad:
            both = (torch.autograd.grad(each, output)[0] for each in (value, expected))
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)

    def by_the_oracle(self, output: Tensor, target: Any, due: Mix | None) -> Tensor:
        known = {"hard": self.kind is nn.NLLLoss, "cross_entropy": self.kind is nn.CrossEntropyLoss}
        floats = reference.each_part(lambda part: part.double() if part.is_floating_point() else part, target)
        return reference.criterion(reference.of_torch(self.kind()), output.double(), floats, due, self.mode, **known)

    # The criterion changed

    @stateful.rule(to=st.sampled_from(("own", "own", "other", "none", "net")))
    def relink(self, to: str) -> None:
        if to == "net":
            with refused(TypeError):
                self.criterion.mixer = self.net  # type: ignore[assignment]
            return
        self.link = {"own": self.own, "other": self.other, "none": None}[to]
        self.criterion.mixer = None if self.link is None else self.link.module

    @stateful.rule(kind=st.sampled_from(KINDS), hooked=flags)
    def replace_the_loss(self, kind: type[nn.Module], hooked: bool) -> None:
        if kind is nn.NLLLoss and self.mode is False:
            with refused(ValueError):
                self.criterion.loss = kind()
        else:
            loss = self.criterion.loss = kind()
            self.kind, self.scale = kind, 10 if hooked else 1
            _ = hooked and loss.register_forward_hook(tenfold)
        assert type(self.criterion.loss) is self.kind

    @stateful.rule(mode=modes)
    def change_what_is_interpolated(self, mode: bool | None) -> None:
        if self.kind is nn.NLLLoss and mode is False:
            with refused(ValueError):
                self.criterion.interpolate_loss = mode
        else:
            self.criterion.interpolate_loss = self.mode = mode

    # Copies: none carries a draw

    @stateful.rule(how=st.sampled_from((copy.copy, *COPIES)))
    def copy_the_mixer(self, how: Callable[[Any], Any]) -> None:
        copied, input = how(self.own.module), torch.randn(3, 2, 3, 4)
        assert (type(copied), repr(copied)) == (type(self.own.module), repr(self.own.module))
        assert (copied.training, copied.last_mix) == (self.own.training, None)
        assert how(self.own.module).train().last_mix is None
        state, output = torch.get_rng_state(), copied(input)
        torch.set_rng_state(state)
        mix = self.own.module.sample(input)
        torch.testing.assert_close(output, reference.mixed(input, mix).float() if self.own.training else input)

    @stateful.rule(how=st.sampled_from(COPIES), what=st.sampled_from(("both", "model", "criterion", "shallow")))
    def copy_model_or_criterion(self, how: Callable[[Any], Any], what: str) -> None:
        net, criterion = how((self.net, self.criterion))
        own = Known(net.mixer, self.own.training)
        link = None if self.link is None else Known(criterion.mixer, self.link.training)
        if what == "both":
            self.net, self.criterion = net, criterion
            self.link = own if self.link is self.own else link
            self.own = own
        elif what == "model":
            self.net, self.own = net, own
        elif what == "criterion":
            self.criterion, self.link = how(self.criterion), link
            if link is not None:
                assert isinstance(self.criterion.mixer, Mixer)
                link.module = self.criterion.mixer
        else:
            self.criterion = copy.copy(self.criterion)

    # What always holds

    @stateful.invariant()
    def modes_draws_and_links_are_as_known(self) -> None:
        for known in (self.own, self.other, *([] if self.link is None else [self.link])):
            assert known.module.training == known.training
            drawn = known.drawn if known.training else None
            if drawn is None or known.module.last_mix is None:
                assert known.module.last_mix is drawn
            else:
                assert all(map(torch.equal, known.module.last_mix, drawn))
        assert self.own.module is self.net.mixer
        assert self.own.module.p == self.p
        assert self.criterion.mixer is (None if self.link is None else self.link.module)
        assert (self.criterion.training, self.criterion.interpolate_loss) == (self.loss_trains, self.mode)

    @stateful.invariant()
    def there_is_no_state_but_that_of_the_layers(self) -> None:
        parent = nn.ModuleDict({"net": self.net, "criterion": self.criterion})
        assert list(parent.state_dict()) == ["net.linear.weight", "net.linear.bias"]
        assert (len(list(parent.parameters())), len(list(parent.buffers()))) == (2, 0)
        assert [name for name, _ in self.criterion.named_modules()] == ["", "loss"]


@pytest.mark.parametrize("name", LIVES)
def test_any_order_of_events_uses_the_mix_that_is_meant(name: str) -> None:
    class Lived(Life):
        make = staticmethod(LIVES[name])

    phases = Phase.explicit, Phase.generate  # a failure would be shrunk for minutes
    examples = settings(max_examples=settings().max_examples // 4, stateful_step_count=25, phases=phases)
    stateful.run_state_machine_as_test(Lived, settings=examples)
