"""The library on other versions of Python and torch: ``nox`` runs the pairs that CI runs."""

from __future__ import annotations

from pathlib import Path

import nox

LEFT_OUT = "coming_from", "distributed", "examples", "other_programs", "package", "pages", "recipes", "site", "trainers"
nox.options.sessions = [
    "tests-3.10(torch='2.8.0')",
    "tests-3.11(torch='2.13.0')",
    "tests-3.12(torch='newest')",
    "tests-3.13(torch='newest')",
]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["2.8.0", "2.13.0", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """Semantics, draws, properties and compiled code: all that needs no more than the extra ``test-any-torch``."""
    session.install("-e", ".[test-any-torch]", "torch" if torch == "newest" else f"torch=={torch}")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    files = {str(file) for file in Path("tests").glob("test_*.py")} - {f"tests/test_{name}.py" for name in LEFT_OUT}
    session.run("pytest", "mixup_nn", *sorted(files), *session.posargs)
