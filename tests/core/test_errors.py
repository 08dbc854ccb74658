"""The one error for users, and what importing costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokenthrift
from tokenthrift.core.errors import ThriftError, did_you_mean

SRC = Path(tokenthrift.__file__).parent.parent


def test_a_thrift_error_is_one_line_and_a_value_error():
    error = ThriftError("first\n  second")
    assert str(error) == "first second"
    assert isinstance(error, ValueError)


def test_did_you_mean():
    assert did_you_mean("snapkw", ["h2o", "snapkv"]) == "did you mean 'snapkv'?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", iter(("b", "a"))) == "known: a, b"
    assert did_you_mean("zzz", []) == "none are known"


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``code``."""
    out = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(out.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import tokenthrift; tokenthrift.__version__; dir(tokenthrift)",
        "import tokenthrift.core.errors",
        "import tokenthrift.core.plan; tokenthrift.core.plan.Plan.parse('')",
        "from tokenthrift import Plan, ThriftError, method, View",
    ],
)
def test_words_cost_no_heavy_import(code):
    loaded = imported_by(code)
    assert "tokenthrift" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "yaml", "typer", "rich"}


def test_the_core_knows_no_model():
    core = [
        f"tokenthrift.core.{path.stem}" for path in (SRC / "tokenthrift" / "core").glob("*.py") if path.stem[0] != "_"
    ]
    loaded = imported_by("import " + ", ".join(core))
    assert "tokenthrift.core.tokenmap" in loaded
    assert "transformers" not in loaded
    assert not any(name.startswith("tokenthrift.") and not name.startswith("tokenthrift.core") for name in loaded)


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="module 'tokenthrift' has no attribute 'nothing'"):
        tokenthrift.nothing  # noqa: B018
    assert {"Plan", "TokenMap", "apply", "__version__"} <= set(dir(tokenthrift))
    assert tokenthrift.Plan.parse("none") == tokenthrift.Plan()
