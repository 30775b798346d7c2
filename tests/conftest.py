from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Iterator

# A process of the suite has a core of its own: threads would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Inductor compiles a trial for each instruction set that the CPU has, 12 seconds in every process: believe the CPU.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from hypothesis import settings

# No deadline: a first call may compile. Derandomised: a red run means changed code, never bad luck.
settings.register_profile("mixup_nn", max_examples=60, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=1000, deadline=None)

IN_NO_EXTRA = "composer", "fastai", "monai", "timm", "torchvision"  # they want another torch, or bring much else
MAY_BE_MISSING = {f"needs {what}" for what in ("a CUDA device", "Chromium", *IN_NO_EXTRA)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="nothing that an extra installs may be missing")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("mixup_nn")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError):  # one built for another torch raises the latter
        return False
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            if not imports(package):
                pytest.skip(f"needs {package}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip for want of a package is an error in a test that is not marked, and wherever an extra installs it."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        of_a_package = reason.startswith(("needs ", "could not import ")) and item.get_closest_marker("needs") is None
        if reason not in MAY_BE_MISSING and (of_a_package or item.config.getoption("--no-skips")):
            report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped: {reason}"
    return report
