"""Measures what MixUp costs on your machine, as ratios that hold on a busy one.

    python examples/benchmark.py            # about 8 minutes on two CPU cores
    python examples/benchmark.py --quick    # under a minute: tiny sizes, which show that the script runs and no more

Five questions: how far mixing a batch is from copying it (``x.clone()``, the memory's limit), and where other libraries
are; what the loss costs next to the plain one, in time and memory; what a training step costs; what ``torch.compile``
makes of that step (graphs, kernels, cold compile time); how the costs grow, with a picture.

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
import json
import math
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from common import table
from einops.layers.torch import Reduce
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache
from tqdm import tqdm

from mixup_nn import Mix, MixUp, MixUpCriterion
from mixup_nn.sampling import sample_mix

Run = Callable[[], Any]
Mixer = Callable[[Tensor], Any]
Loss = Callable[[Tensor, Tensor, Mix], Tensor]
Times = dict[str, np.ndarray]  # seconds of each variant, one entry per round


@dataclass(frozen=True)
class Sizes:
    """What to measure."""

    seconds: float = 4.0  # for one race; losses and training steps get five times as long
    mixing: Sequence[tuple[int, ...]] = ((64, 3, 224, 224), (256, 3, 32, 32), (32, 512, 768))
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    formats: Sequence[torch.memory_format] = (torch.contiguous_format, torch.channels_last)
    losses: Sequence[tuple[int, int]] = ((256, 1000), (2048, 32000), (8192, 128000))
    models: Sequence[str] = ("CNN", "transformer")
    image: tuple[int, ...] = (64, 3, 64, 64)
    tokens: tuple[int, ...] = (32, 64)
    width: int = 128
    depth: int = 3
    batches: Sequence[int] = (8, 16, 32, 64, 128, 256, 512)
    classes: Sequence[int] = (30, 100, 300, 1000, 3000, 10000, 30000, 100000)


QUICK = Sizes(
    seconds=0.02,
    mixing=((8, 3, 32, 32),),
    dtypes=(torch.float32,),
    formats=(torch.contiguous_format,),
    losses=((64, 100),),
    models=("CNN",),
    image=(8, 3, 16, 16),
    width=16,
    depth=1,
    batches=(2, 4, 8),
    classes=(10, 100, 1000),
)


@dataclass
class Bench:
    """A device, what to measure on it, and the figures so far."""

    device: torch.device
    sizes: Sizes
    bar: Any
    figures: list[dict[str, Any]] = field(default_factory=list)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def race(self, case: str, runs: dict[str, Run], scale: float = 1.0) -> Times:
        """Time the variants in rounds, at least five; a short call is repeated until 2 ms have passed."""
        self.bar.set_postfix_str(case)
        calls = {}
        for name, run in runs.items():
            run(), run()  # compiles, warms up
            self.synchronize()
            start = perf_counter()
            run()
            self.synchronize()
            calls[name] = math.ceil(0.002 / (perf_counter() - start))
        times: dict[str, list[float]] = {name: [] for name in runs}
        stop = perf_counter() + scale * self.sizes.seconds
        while perf_counter() < stop or len(times[name]) < 5:
            for name in random.sample(list(runs), len(runs)):
                start = perf_counter()
                for _ in range(calls[name]):
                    runs[name]()
                self.synchronize()
                times[name].append((perf_counter() - start) / calls[name])
        self.bar.update()
        return {name: np.array(seconds) for name, seconds in times.items()}

    def ratio(self, case: str, variant: str, times: Times, baseline: str) -> str:
        """A cell of a table: median (20th - 80th percentile) of the ratios of the rounds."""
        low, median, high = np.percentile(times[variant] / times[baseline], (20, 50, 80))
        ratio = {"median": median, "p20": low, "p80": high, "rounds": len(times[variant])}
        self.figures.append({"case": case, "variant": variant, "over": baseline, **ratio, "ms": ms(times[variant])})
        return f"{median:.2f} ({low:.2f}-{high:.2f})"

    def peak_memory(self, run: Run) -> int:
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


def ms(seconds: np.ndarray) -> float:
    """The median in milliseconds."""
    return 1000 * float(np.median(seconds))


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table with what stands above and below it."""
    return "\n".join(["", title, "", table(header, rows), *([""] if notes else []), *notes])


def load_peer(name: str) -> Mixer:
    """Another library's MixUp, as its documentation calls it: each draws as well, and handles a label per image."""
    if name == "kornia":  # one uniform lam per sample, drawn on the CPU; the labels are optional and left out
        from kornia.augmentation import RandomMixUpV2

        return RandomMixUpV2(data_keys=["input"])
    if name == "timm":  # writes into the batch, which saves the allocation that the others make; labels become dense
        from timm.data import Mixup

        mixup = Mixup(mixup_alpha=0.2, label_smoothing=0.0, num_classes=10)
    else:  # mixes each sample with its neighbour in the batch, without a permutation; labels become dense
        from torchvision.transforms.v2 import MixUp as TorchvisionMixUp

        mixup = TorchvisionMixUp(alpha=0.2, num_classes=10)
    return lambda x: mixup(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))


PEERS = ("kornia", "timm", "torchvision")


def load_peers(device: torch.device) -> tuple[dict[str, Mixer], list[str]]:
    """Those that import, compiled too where that gives one graph; and a note on those that do not."""
    peers: dict[str, Mixer] = {}
    notes = []
    for name in PEERS:
        try:
            peers[name] = load_peer(name)
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            notes.append(f"{name} is missing: {type(error).__name__}: {error}")
            continue
        compiled = torch.compile(peers[name], fullgraph=True)
        try:
            compiled(torch.rand(4, 3, 8, 8, device=device))
            peers[f"{name}, compiled"] = compiled
        except Exception as error:  # whatever the compiler meets in other people's code
            notes.append(f"{name} is eager only: torch.compile(fullgraph=True) raises {type(error).__name__}")
    return peers, notes


def mixing(bench: Bench) -> str:
    """MixUp in training mode, the draw included, and the other libraries on images."""
    peers, notes = load_peers(bench.device)
    rows = []
    for shape, dtype, memory_format in product(bench.sizes.mixing, bench.sizes.dtypes, bench.sizes.formats):
        if len(shape) != 4 and memory_format == torch.channels_last:
            continue
        torch.compiler.reset()
        x = torch.rand(shape, device=bench.device, dtype=dtype).contiguous(memory_format=memory_format)
        calls: dict[str, Mixer] = {"clone": torch.clone, "MixUp": MixUp()}
        calls["MixUp, compiled"] = torch.compile(MixUp(), fullgraph=True)
        calls |= peers if len(shape) == 4 else {}
        label = [str(shape), str(dtype)[6:], str(memory_format)[6:].removesuffix("_format")]
        case = " ".join(["mixing", *label])
        times = bench.race(case, {name: partial(call, x) for name, call in calls.items()})
        columns = ("MixUp", "MixUp, compiled", *peers)
        cells = [bench.ratio(case, name, times, "clone") if name in calls else "-" for name in columns]
        rows.append([*label, f"{ms(times['clone']):.3f}", *cells])
    header = ["shape", "dtype", "format", "clone, ms", "MixUp", "MixUp, compiled", *peers]
    return section("Mixing a batch: time over x.clone()", header, rows, notes)


def loss_variants() -> dict[str, Loss]:
    """Cross entropy without MixUp, and three ways to the same loss with it."""
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss()

    def plain(input: Tensor, target: Tensor, mix: Mix) -> Tensor:  # noqa: ARG001  # called like the others
        return cross_entropy(input, target)

    def two_losses(input: Tensor, target: Tensor, mix: Mix) -> Tensor:
        return mix.lam * cross_entropy(input, target) + (1 - mix.lam) * cross_entropy(input, target[mix.index])

    criterion, dense = MixUpCriterion(cross_entropy), MixUpCriterion(cross_entropy, interpolate_loss=False)
    return {"plain": plain, "MixUpCriterion": criterion, "two losses": two_losses, "dense targets": dense}


def loss_runs(losses: dict[str, Loss], size: tuple[int, int], device: torch.device) -> dict[str, Run]:
    """Loss and gradient, on the same logits, class indices and mix for all."""
    logits = torch.randn(size, device=device, requires_grad=True)
    target = torch.randint(size[1], size[:1], device=device)
    mix = sample_mix(size[0], device=device)

    def gradient(loss: Loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(logits, target, mix), logits)

    return {name: partial(gradient, loss) for name, loss in losses.items()}


def loss(bench: Bench) -> str:
    """Forward and backward, time and memory."""
    if bench.device.type == "cuda":
        memory = torch.cuda.mem_get_info(bench.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    speed, peak, notes = [], [], []
    for size, mode in product(bench.sizes.losses, ("eager", "compiled")):
        needed = 4 * 8 * math.prod(size)  # float32 logits and what eager dense targets, the hungriest, make of them
        if needed > memory:
            notes.append(f"{size}, {mode} is skipped: it needs {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}")
            bench.bar.update()
            continue
        torch.compiler.reset()
        losses = loss_variants()
        if mode == "compiled":
            losses = {name: torch.compile(call, fullgraph=True) for name, call in losses.items()}
        case = f"loss {size} {mode}"
        plain, *others = runs = loss_runs(losses, size, bench.device)
        times = bench.race(case, runs, scale=5)
        cells = [bench.ratio(case, name, times, plain) for name in others]
        speed.append([str(size), mode, f"{ms(times[plain]):.2f}", *cells])
        peaks = {name: bench.peak_memory(run) for name, run in runs.items()}
        bench.figures.append({"case": case, "peak memory, bytes": peaks})
        cells = [f"{peaks[name] / peaks[plain]:.2f}" for name in others]
        peak.append([str(size), mode, f"{peaks[plain] / 2**20:.1f}", *cells])
    title = "Cross entropy, forward and backward: time over the plain loss on class indices"
    text = section(title, ["logits", "mode", "plain, ms", *others], speed)
    return text + "\n" + section("The same: peak memory", ["logits", "mode", "plain, MiB", *others], peak, notes)


def build(model: str, sizes: Sizes, *mixup: nn.Module) -> nn.Module:
    """A small CNN that mixes its images, or a small transformer that mixes its embeddings."""
    width, head = sizes.width, nn.Linear(sizes.width, 100)
    if model == "CNN":
        widths = [3, *(width >> shift for shift in reversed(range(sizes.depth)))]
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 1 if a == 3 else 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        return nn.Sequential(*mixup, *stages, Reduce("b c h w -> b c", "mean"), head)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, sizes.depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(1000, width), *mixup, encoder, Reduce("b t d -> b d", "mean"), head)


class Step:
    """A training step of a fresh model: forward, loss, backward, optimizer."""

    def __init__(self, model: str, bench: Bench, mixup: MixUp | None = None) -> None:
        sizes, device = bench.sizes, bench.device
        self.x = torch.randn(sizes.image, device=device)
        if model == "transformer":
            self.x = torch.randint(1000, sizes.tokens, device=device)
        self.y = torch.randint(100, self.x.shape[:1], device=device)
        self.model = build(model, sizes, *([mixup] if mixup else [])).to(device)
        self.criterion = MixUpCriterion(nn.CrossEntropyLoss(), mixup) if mixup else nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.loss: Callable[[Tensor, Tensor], Tensor] = lambda x, y: self.criterion(self.model(x), y)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.loss(self.x, self.y).backward()
        self.optimizer.step()

    def compile(self) -> tuple[int, int, float]:
        """Compile model and loss with empty caches: number of graphs, of kernels, and seconds of the first step."""
        counter = CompileCounterWithBackend("inductor")
        self.loss = torch.compile(self.loss, backend=counter, fullgraph=True)
        metrics.reset()
        with fresh_cache():
            start = perf_counter()
            self()
            seconds = perf_counter() - start
        return counter.frame_count, metrics.generated_kernel_count, seconds


def training(bench: Bench) -> str:
    """A step of two models, in eager and compiled, and what compiling it takes."""
    steps, compilations = [], []
    for model in bench.sizes.models:
        plain, mixed = Step(model, bench), Step(model, bench, MixUp())
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                torch.compiler.reset()
                without, with_mixup = plain.compile(), mixed.compile()
                bench.figures.append({"case": f"compile {model}", "plain": without, "MixUp": with_mixup})
                compilations.append([model, *(f"{a:.3g} -> {b:.3g}" for a, b in zip(without, with_mixup, strict=True))])
            case = f"step {model} {mode}"
            times = bench.race(case, {"plain": plain, "MixUp": mixed, "plain again": plain}, scale=5)
            cells = [bench.ratio(case, variant, times, "plain") for variant in ("MixUp", "plain again")]
            steps.append([f"{model} {tuple(plain.x.shape)}", mode, f"{ms(times['plain']):.1f}", *cells])
    title = "A training step (forward, loss, backward, AdamW): time over the step without MixUp"
    text = section(title, ["model", "mode", "plain, ms", "with MixUp", "plain again: the noise"], steps)
    header = ["model", "graphs", "kernels", "seconds to compile, caches empty"]
    return text + "\n" + section("Compiling that step: without -> with MixUp", header, compilations)


def growth(bench: Bench, out: Path) -> str:
    """Time against the batch and the number of classes; a slope is fitted to the larger half of the sizes."""
    torch.compiler.reset()
    mixers: dict[str, Mixer] = {"clone": torch.clone, "MixUp": MixUp()}
    mixers["MixUp, compiled"] = torch.compile(MixUp(), fullgraph=True, dynamic=True)
    losses = {name: call for name, call in loss_variants().items() if name in ("plain", "MixUpCriterion")}
    losses |= {f"{name}, compiled": torch.compile(losses[name], fullgraph=True, dynamic=True) for name in list(losses)}
    mixing, loss = {}, {}
    for batch in bench.sizes.batches:
        x = torch.rand(batch, 3, 64, 64, device=bench.device)
        mixing[batch] = bench.race(f"batch of {batch}", {name: partial(call, x) for name, call in mixers.items()}, 0.4)
    for classes in bench.sizes.classes:
        loss[classes] = bench.race(f"{classes} classes", loss_runs(losses, (64, classes), bench.device), 0.4)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    titles = ("Mixing images of 3 x 64 x 64", "Cross entropy of 64 samples, forward and backward")
    rows = []
    for axis, title, xlabel, times in zip(axes, titles, ("batch size", "classes"), (mixing, loss), strict=True):
        sizes = np.array(list(times), dtype=float)
        large = sizes[len(sizes) // 2 :]
        for name in next(iter(times.values())):
            medians = np.array([ms(variants[name]) for variants in times.values()])
            slope, offset = np.polyfit(np.log(large), np.log(medians[-len(large) :]), 1)
            dots = axis.loglog(sizes, medians, "o", markersize=5, label=f"{name}: slope {slope:.2f}")
            axis.loglog(large, np.exp(offset) * large**slope, color=dots[0].get_color())
            rows.append([title, name, f"{slope:.2f}"])
            figures = {"sizes": sizes.tolist(), "ms": medians.tolist()}
            bench.figures.append({"case": title, "variant": name, "slope": slope, **figures})
        axis.set(title=title, xlabel=xlabel, ylabel="milliseconds")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "benchmark.png", dpi=150)
    title = f"Growth: the exponent of time over size, in its larger half ({out / 'benchmark.png'})"
    return section(title, ["measure", "variant", "slope"], rows)


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")]
    cpu = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu}
    found |= {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    for name in ("torch", "einops", "mixup_nn", *PEERS):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Measure, print, and write the files that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    mpl.use("Agg")
    torch.manual_seed(0)
    device, sizes = torch.device(options.device), QUICK if options.quick else Sizes()
    races = sum(len(sizes.dtypes) * (len(sizes.formats) if len(shape) == 4 else 1) for shape in sizes.mixing)
    races += 2 * (len(sizes.losses) + len(sizes.models)) + len(sizes.batches) + len(sizes.classes)
    with tqdm(total=races, dynamic_ncols=True) as bar:
        bench = Bench(device, sizes, bar)
        bar.write("\n".join(f"{key}: {value}" for key, value in environment(device).items()))
        for measure in (mixing, loss, training, partial(growth, out=options.out)):
            bar.write(measure(bench))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(device), "figures": bench.figures}, indent=1))


if __name__ == "__main__":
    main()
