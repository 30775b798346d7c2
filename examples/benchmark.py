"""Measures what mixing costs on your machine, as ratios that hold on a busy one.

    python examples/benchmark.py
    python examples/benchmark.py --quick    # tiny sizes: shows that the script runs, and no more

Four questions: how far mixing a batch is from copying it (``x.clone()``, the limit set by memory); what the mixed loss
costs next to the plain one, in time and memory; what draw, mix and loss cost next to the lines that one would write by
hand, and next to the same operations with nothing around them; what a whole training step costs.

A table before these is counted, not measured, and the same on every machine: the operations of an eager step that
would launch a kernel, and the bytes that they read and write. Its tensors are on the device ``meta``, where they have
shapes and no data; what runs on the host, such as the draws of other libraries, is not counted.

Each round runs every variant once, in random order, and divides by the baseline of that same round, so that a drift of
the machine cancels. A cell is the median of these ratios, with the 20th and 80th percentile. Making and freeing the
result is part of a call. Memory is the most that the tensors made by one call take at once, on top of its inputs.
Other libraries are measured where they import: ``pip install kornia timm torchvision``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin lose whole time slices on a busy machine
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts the memory, writes to the terminal

import argparse
import contextlib
import datetime
import math
import platform
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from common import table
from einops.layers.torch import Reduce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from mixup_nn import CutMix, Mixer, MixUp, MixUpCriterion, RandomChoice
from mixup_nn.sampling import sample_mixup

Calls = dict[str, Callable[..., Any]]
Parts = Iterator[Tensor]  # of a step: the mixed batch, then the loss
MODES = "eager", "compiled"
PEERS = "kornia", "timm", "torchvision"


@dataclass(frozen=True)
class Sizes:
    """What to measure."""

    seconds: float = 4.0  # for one race; losses and training steps get four times as long
    mixing: tuple[int, ...] = (64, 3, 224, 224)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    losses: Sequence[tuple[int, int]] = ((256, 1000), (2048, 32000))
    by_hand: Sequence[tuple[int, int, int]] = ((32, 8, 10), (128, 32, 10), (64, 224, 1000))
    models: Sequence[str] = ("CNN", "transformer")
    image: tuple[int, ...] = (64, 3, 64, 64)
    tokens: tuple[int, ...] = (32, 64)
    width: int = 128
    depth: int = 3


QUICK = Sizes(0.02, (8, 3, 16, 16), (torch.float32,), ((64, 100),), ((8, 8, 10),), ("CNN",), (8, 3, 16, 16), depth=1)


@dataclass
class Bench:
    """A device and what to measure on it."""

    device: torch.device
    sizes: Sizes
    bar: Any

    def seconds(self, run: Callable[[], Any], calls: int = 1) -> float:
        """The time of a call, waiting for the device at the end."""
        start = perf_counter()
        for _ in range(calls):
            run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (perf_counter() - start) / calls

    def race(self, case: str, runs: Calls, pairs: Sequence[tuple[str, str]], scale: float = 1.0) -> list[str]:
        """Time the variants in rounds, at least five; a short call is repeated until 2 ms have passed.

        Returns cells of a table: milliseconds of the first variant, then for each pair the ratio of their times.
        """
        self.bar.set_postfix_str(case)
        # The first two calls compile and warm up.
        calls = {name: math.ceil(0.002 / [self.seconds(run) for _ in range(3)][-1]) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        stop = perf_counter() + scale * self.sizes.seconds
        while perf_counter() < stop or min(map(len, times.values())) < 5:
            for name in random.sample(list(runs), len(runs)):
                times[name].append(self.seconds(runs[name], calls[name]))
        self.bar.update()
        cells = [f"{1000 * np.median(times[next(iter(runs))]):.3g}"]
        for variant, baseline in pairs:
            if not {variant, baseline} <= times.keys():
                cells.append("-")
                continue
            low, median, high = np.percentile(np.divide(times[variant], times[baseline]), (20, 50, 80))
            cells.append(f"{median:.2f}\u00a0({low:.2f}-{high:.2f})")  # on one line of a narrow screen
        return cells

    def peak_memory(self, run: Callable[[], Any]) -> int:
        """The most bytes that the tensors made by a call take at once."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return torch.cuda.max_memory_allocated(self.device) - before
        # The allocator's own count: a process's peak RSS never falls, and a child process starts at its parent's.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def shape_of(sizes: Sequence[int]) -> str:
    """A shape as one word: ``64x3x224x224``."""
    return "x".join(map(str, sizes))


def in_mode(mode: str, calls: Calls) -> Calls:
    """The calls themselves, or compiled, each as one graph."""
    torch.compiler.reset()
    return {name: torch.compile(call, fullgraph=True) for name, call in calls.items()} if mode == "compiled" else calls


def load_peer(name: str, num_classes: int) -> Calls:
    """Another library's mixers, called with inputs and class indices."""
    if name == "kornia":  # one uniform lam or box per sample, drawn on the CPU; the labels are optional and left out
        from kornia.augmentation import RandomCutMixV2, RandomMixUpV2

        mixup, cutmix = RandomMixUpV2(data_keys=["input"]), RandomCutMixV2(data_keys=["input"])
        return {"MixUp": lambda x, y: (mixup(x),), "CutMix": lambda x, y: (cutmix(x),)}  # noqa: ARG005
    if name == "timm":  # writes into the batch, which saves the allocation that the others make; labels become dense
        from timm.data import Mixup

        alphas = {"MixUp": (0.2, 0.0), "CutMix": (0.0, 1.0), "choice": (0.2, 1.0)}
        return {name: Mixup(*pair, label_smoothing=0.0, num_classes=num_classes) for name, pair in alphas.items()}
    from torchvision.transforms import v2  # mixes neighbours in the batch, without a permutation; labels become dense

    mixup, cutmix = v2.MixUp(alpha=0.2, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)
    return {"MixUp": mixup, "CutMix": cutmix, "choice": v2.RandomChoice([mixup, cutmix])}


@cache
def peers() -> list[str]:
    """The other libraries that import."""
    found = []
    for name in PEERS:
        with contextlib.suppress(ImportError, RuntimeError):  # RuntimeError: built for another torch
            load_peer(name, 10)
            found.append(name)
    return found


class Count(TorchDispatchMode):
    """Counts the operations on ``meta`` that would launch a kernel, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it and count it; views and allocations are none."""
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        read, written = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), out))
        if func.is_view or "empty" in name or not any(t.is_meta for t in (*read, *written)):
            return out
        if name in ("index", "index_select"):
            read[0] = out  # it reads what it fetches
        elif name in ("nll_loss_forward", "nll_loss_backward", "scatter_"):
            read = [t[:, 0] if t.ndim == 2 else t for t in read]  # one element of each row
            written = read[:1] if name == "scatter_" else written
        self.operations += 1
        self.bytes += sum(map(bytes_of, [*{id(t): t for t in read}.values(), *written]))
        return out


def bytes_of(tensor: Tensor) -> int:
    """The bytes of its different elements: a broadcast dimension has stride 0 and one element."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def counts() -> str:
    """Operations and bytes of an eager step."""
    x, y = torch.empty((64, 3, 224, 224), device="meta"), torch.empty((64,), dtype=torch.int64, device="meta")
    logits = torch.empty((64, 1000), device="meta", requires_grad=True)
    rows = []
    for name, step in steps(1000).items():
        stages: list[Count] = []
        # kornia leaves the loss to the user: StopIteration. What another library does may need data: RuntimeError.
        with contextlib.suppress(*((StopIteration, RuntimeError) if name in peers() else ())), Count() as whole:
            with Count() as draw_and_mix:
                next(parts := step(x, y, logits))
            stages.append(draw_and_mix)
            with Count() as forward:
                loss = next(parts)
            with Count() as backward:
                torch.autograd.grad(loss, logits)
            stages += [forward, backward, whole]
        cells = [f"{stage.operations}\u00a0({stage.bytes / x.nbytes / 2:.2f})" for stage in stages]
        rows.append([name, *cells, *["-"] * (4 - len(cells))])
    title = "Counted, not measured: operations of an eager step, and in brackets their bytes over those of x.clone()"
    return f"{title}\n\n{table(['64x3x224x224', 'draw and mix', 'loss', 'backward', 'step'], rows)}"


def mixing(bench: Bench) -> str:
    """The mixers in training mode, the draw included, and those of other libraries."""
    names = "MixUp", "CutMix", "choice"
    columns = [*names, *(f"{peer} {name}" for peer in peers() for name in names if name in load_peer(peer, 10))]
    rows = []
    formats = torch.contiguous_format, torch.channels_last
    for dtype, layout, mode in product(bench.sizes.dtypes, formats, MODES):
        x = torch.rand(bench.sizes.mixing, device=bench.device, dtype=dtype).contiguous(memory_format=layout)
        y = torch.randint(10, x.shape[:1], device=bench.device)
        calls = in_mode(mode, {"MixUp": MixUp(), "CutMix": CutMix(), "choice": RandomChoice([MixUp(), CutMix()])})
        runs: Calls = {"clone": x.clone, **{name: partial(call, x) for name, call in calls.items()}}
        if mode == "eager":
            for peer in peers():
                runs |= {f"{peer} {name}": partial(call, x, y) for name, call in load_peer(peer, 10).items()}
        label = [str(dtype)[6:], str(layout)[6:].removesuffix("_format"), mode]
        cells = bench.race(" ".join(["mixing", *label]), runs, [(name, "clone") for name in columns])
        rows.append([*label, *cells])
    text = table(["dtype", "format", "mode", "clone, ms", *columns], rows)
    missing = [peer for peer in PEERS if peer not in peers()]
    note = f"\n\nnot installed: {', '.join(missing)}" if missing else ""
    return f"Mixing {shape_of(bench.sizes.mixing)}: time over x.clone()\n\n{text}{note}"


def loss(bench: Bench) -> str:
    """Three ways to the mixed loss, forward and backward."""
    cross_entropy = nn.CrossEntropyLoss()
    losses: Calls = {
        "plain": lambda logits, y, mix: cross_entropy(logits, y),  # noqa: ARG005
        "MixUpCriterion": MixUpCriterion(cross_entropy),
        "two losses": two_losses,
        "dense targets": MixUpCriterion(F.cross_entropy, interpolate_loss=False),
    }
    _, *others = losses
    rows = []
    for size, mode in product(bench.sizes.losses, MODES):
        arguments = logits_and_targets(size, bench.device)
        runs: Calls = {name: partial(gradient, call, *arguments) for name, call in in_mode(mode, losses).items()}
        cells = bench.race(f"loss {size} {mode}", runs, [(name, "plain") for name in others], scale=4)
        rows.append([shape_of(size), mode, *cells])
    title = "Cross entropy, forward and backward: time over the plain loss on class indices"
    return f"{title}\n\n{table(['logits', 'mode', 'plain, ms', *others], rows)}"


def memory(bench: Bench) -> str:
    """The peak memory of the mixed loss with its backward."""
    rows = []
    for size, dtype, smoothing, mode in product(bench.sizes.losses, bench.sizes.dtypes, (0.0, 0.1), MODES):
        cross_entropy = nn.CrossEntropyLoss(label_smoothing=smoothing)
        arguments = logits_and_targets(size, bench.device, dtype)
        losses: Calls = {
            "plain": lambda logits, y, mix, loss=cross_entropy: loss(logits, y),  # noqa: ARG005
            "MixUpCriterion": MixUpCriterion(cross_entropy),
        }
        runs = [partial(gradient, call, *arguments) for call in in_mode(mode, losses).values()]
        plain, ours = (max(bench.peak_memory(run) for _ in range(3)) for run in runs)  # the first call compiles
        smoothed = "0.1" if smoothing else "-"
        rows.append([shape_of(size), str(dtype)[6:], smoothed, mode, f"{plain / 2**20:.3g}", f"{ours / plain:.2f}"])
    header = ["logits", "dtype", "smoothing", "mode", "plain, MiB", "MixUpCriterion"]
    return f"The same: peak memory over that of the plain loss\n\n{table(header, rows)}"


def logits_and_targets(size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Logits that need a gradient, class indices, and a mix."""
    logits = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    return logits, torch.randint(size[1], size[:1], device=device), sample_mixup(size[0], device=device)


def gradient(call: Callable[..., Tensor], logits: Tensor, *arguments: Any) -> Any:
    """The loss and its backward."""
    return torch.autograd.grad(call(logits, *arguments), logits)


def two_losses(logits: Tensor, y: Tensor, mix: Any) -> Tensor:
    """The formula, on losses."""
    lam, index = mix
    return lam * F.cross_entropy(logits, y) + (1 - lam) * F.cross_entropy(logits, y[index])


def hand_step(x: Tensor, y: Tensor, logits: Tensor, lam: float, index: Tensor) -> Parts:
    """The formula, on the batch and on the losses."""
    yield lam * x + (1 - lam) * x[index]
    yield two_losses(logits, y, (lam, index))


def draw_by_hand(x: Tensor) -> tuple[float, Tensor]:
    """The draw of a training loop."""
    return np.random.beta(0.2, 0.2), torch.randperm(len(x), device=x.device)


def bare_step(x: Tensor, y: Tensor, logits: Tensor, alpha: float = 0.2) -> Parts:
    """The operations of ``MixUp`` and ``MixUpCriterion``, without modules and checks."""
    u, v = torch.rand((2,), device=x.device).unbind()
    half = torch.asinh(torch.expm1(torch.log(u) / -alpha).sqrt() * torch.cos(2 * math.pi * v))
    lam = torch.sigmoid(half + half)
    if torch.compiler.is_compiling():  # as in mixup_nn.sampling.cycle
        order = torch.rand((len(x),), device=x.device).argsort()
        following = order.index_select(0, torch.arange(1, len(x) + 1, device=x.device) % len(x))
    else:
        order = torch.randperm(len(x), device=x.device)
        following = order.roll(-1)
    index = torch.empty_like(order).index_copy_(0, order, following)
    yield x.index_select(0, index).lerp_(x, lam)
    log_probs = logits.log_softmax(1)
    yield torch.lerp(F.nll_loss(log_probs, y.index_select(0, index)), F.nll_loss(log_probs, y), lam)


def our_step(mixer: Mixer) -> Callable[..., Parts]:
    """A step of this library."""
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)

    def step(x: Tensor, y: Tensor, logits: Tensor) -> Parts:
        yield mixer(x)
        yield criterion(logits, y)

    return step


def peer_step(peer: str, num_classes: int) -> Callable[..., Parts]:
    """A step of another library; kornia leaves the loss to the user."""
    mixup = load_peer(peer, num_classes)["MixUp"]

    def step(x: Tensor, y: Tensor, logits: Tensor) -> Parts:
        mixed, *targets = mixup(x, y)
        yield mixed
        yield from (F.cross_entropy(logits, target) for target in targets)

    return step


def steps(num_classes: int) -> dict[str, Callable[..., Parts]]:
    """Draw, mix and loss: without mixing, by this library, by bare operations, by hand and by other libraries."""
    return {
        "no mixing": our_step(MixUp().eval()),
        "MixUp": our_step(MixUp()),
        "CutMix": our_step(CutMix()),
        "choice": our_step(RandomChoice([MixUp(), CutMix()])),
        "bare operations": bare_step,
        "by hand": lambda x, y, logits: hand_step(x, y, logits, *draw_by_hand(x)),
        **{peer: peer_step(peer, num_classes) for peer in peers()},
    }


def in_a_row(step: Callable[..., Parts]) -> Callable[..., tuple[Tensor, ...]]:
    """All parts of a step in one call."""
    return lambda *given: tuple(step(*given))


def by_hand(bench: Bench) -> str:
    """What this library does in a training step: the logits are given, there is no model."""
    rows = []
    others = ["by hand", "by hand, compiled", "bare operations", *(peer for peer in peers() if peer != "kornia")]
    for (batch, side, classes), mode in product(bench.sizes.by_hand, MODES):
        x = torch.rand((batch, 3, side, side), device=bench.device)
        logits = torch.randn((batch, classes), device=bench.device, requires_grad=True)
        arguments = x, torch.randint(classes, (batch,), device=bench.device), logits

        def mixed_and_gradient(call: Callable[..., Any], arguments: tuple[Tensor, ...] = arguments) -> Any:
            mixed, loss = call(*arguments)
            return mixed, torch.autograd.grad(loss, arguments[2])

        eager = {name: in_a_row(step) for name, step in steps(classes).items()}
        calls = in_mode(mode, {"ours": eager["MixUp"], "bare operations": eager["bare operations"]})
        calls["by hand"] = eager["by hand"]
        if mode == "eager":
            calls |= {peer: eager[peer] for peer in others[3:]}
        else:
            # The draw is left out: np.random.beta breaks the graph, and Inductor of torch 2.13 fails on randperm.
            compiled = torch.compile(in_a_row(hand_step), fullgraph=True)
            calls["by hand, compiled"] = lambda x, y, logits, call=compiled: call(x, y, logits, *draw_by_hand(x))
        runs: Calls = {name: partial(mixed_and_gradient, call) for name, call in calls.items()}
        label = [shape_of(x.shape), str(classes), mode]
        rows.append([*label, *bench.race(" ".join(["by hand", *label]), runs, [("ours", other) for other in others])])
    header = ["batch", "classes", "mode", "ours, ms", *(f"over {other}" for other in others)]
    return (
        f"A step by hand (draw, mix, loss, and backward to the logits): our time over theirs\n\n{table(header, rows)}"
    )


def build(model: str, sizes: Sizes, *mixer: nn.Module) -> nn.Module:
    """A small CNN that mixes its images, or a small transformer that mixes its embeddings."""
    width, head = sizes.width, nn.Linear(sizes.width, 100)
    if model == "CNN":
        widths = [3, *(width >> shift for shift in reversed(range(sizes.depth)))]
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 1 if a == 3 else 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        return nn.Sequential(*mixer, *stages, Reduce("b c h w -> b c", "mean"), head)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, sizes.depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(1000, width), *mixer, encoder, Reduce("b t d -> b d", "mean"), head)


def training_step(model: str, mode: str, bench: Bench, mixer: Mixer | None = None) -> Callable[[], None]:
    """A training step of a fresh model."""
    sizes, device = bench.sizes, bench.device
    x = torch.randn(sizes.image, device=device)
    if model == "transformer":
        x = torch.randint(1000, sizes.tokens, device=device)
    y = torch.randint(100, x.shape[:1], device=device)
    net = build(model, sizes, *([mixer] if mixer else [])).to(device)
    criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixer)  # without a mixer, the plain loss
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(net(x), y)

    compute_loss = torch.compile(forward, fullgraph=True) if mode == "compiled" else forward

    def step() -> None:
        optimizer.zero_grad()
        compute_loss(x, y).backward()
        optimizer.step()

    return step


def training(bench: Bench) -> str:
    """Training steps of two models, with and without mixing."""
    rows = []
    for model, mode in product(bench.sizes.models, MODES):
        torch.compiler.reset()
        mixers = {"plain": None, "MixUp": MixUp(), "choice": RandomChoice([MixUp(), CutMix()])}
        if model == "transformer":
            del mixers["choice"]  # embeddings are no pictures
        runs: Calls = {name: training_step(model, mode, bench, mixer) for name, mixer in mixers.items()}
        runs["plain again"] = runs["plain"]
        pairs = [(name, "plain") for name in ("MixUp", "choice", "plain again")]
        rows.append([model, mode, *bench.race(f"step {model} {mode}", runs, pairs, scale=4)])
    text = table(["model", "mode", "plain, ms", "MixUp", "choice", "plain again: the noise"], rows)
    return f"A training step (forward, loss, backward, AdamW): time over the step without mixing\n\n{text}"


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    name = platform.processor()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].partition("\n")[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"
    found = {"device": name, "date": datetime.date.today().isoformat(), "python": platform.python_version()}
    return found | {package: version(package) for package in ("torch", "einops", "mixup_nn", *peers())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the other libraries
    torch.manual_seed(0)
    np.random.seed(0)
    with tqdm(unit="case", dynamic_ncols=True) as bar:
        bench = Bench(options.device, QUICK if options.quick else Sizes(), bar)
        bar.write("\n".join(f"{key}: {value}" for key, value in environment(options.device).items()))
        bar.write("\n" + counts())
        for measure in (mixing, loss, memory, by_hand, training):
            bar.write("\n" + measure(bench))


if __name__ == "__main__":
    main()
