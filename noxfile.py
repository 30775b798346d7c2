"""The library on other versions of Python and torch: ``nox`` runs the pairs that CI runs."""

from __future__ import annotations

import nox

nox.options.sessions = [
    "tests-3.10(torch='2.8.0')",
    "tests-3.11(torch='2.13.0')",
    "tests-3.12(torch='newest')",
    "tests-3.13(torch='newest')",
]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["2.8.0", "2.13.0", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """Semantics, draws, properties and compiled code; the rest of the suite needs the torch of its figures."""
    session.install("-e", ".[test-any-torch]", "torch" if torch == "newest" else f"torch=={torch}")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    files = ("programs", "numerics", "life", "modules", "draws", "errors", "costs", "devices", "compile")
    session.run("pytest", "mixup_nn", *(f"tests/test_{file}.py" for file in files), *session.posargs)
