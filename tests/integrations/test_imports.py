"""When frameworks are imported, and the error where one is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "ignite",
    "wandb",
    "mlflow",
    "tensorboard",
    "matplotlib",
    "sklearn",
    "scipy",
    "stableopt.integrations.lightning",
    "stableopt.integrations.transformers",
)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_package_imports_no_framework() -> None:
    """Catches an import at the top of a module that every user pays for."""
    out = run(
        "import sys, stableopt, stableopt.integrations\n"
        "import stableopt.steering, stableopt.optim.lbfgs.optimizer\n"
        "import stableopt.sinks.wandb, stableopt.plot\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert out == "[]\n"


def test_steering_and_lbfgs_are_there_when_they_are_asked_for() -> None:
    """Catches a lazily imported name that is missing, or that is imported with the package."""
    out = run(
        "import sys, stableopt\n"
        "print('stableopt.steering' in sys.modules, 'stableopt.optim.lbfgs.optimizer' in sys.modules)\n"
        "print(stableopt.steering.StabilityLR is stableopt.StabilityLR, stableopt.LBFGS.__name__)\n"
        "names = {}\n"
        "exec('from stableopt import *', names)\n"
        "print(set(stableopt.__all__) <= names.keys() & set(dir(stableopt)))\n"
        "print(hasattr(stableopt, 'LBFGSS'), hasattr(stableopt.optim, 'LBFGSS'))"
    )
    assert out == "False False\nTrue LBFGS\nTrue\nFalse False\n"


@pytest.mark.parametrize("extra", ["lightning", "transformers"])
def test_an_absent_framework_is_named_with_its_extra(extra: str) -> None:
    """Catches a ModuleNotFoundError that does not say what to install."""
    out = run(
        "import sys\n"
        "for name in ('lightning', 'lightning.pytorch', 'pytorch_lightning', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "try:\n"
        f"    import stableopt.integrations.{extra}\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, error)"
    )
    assert out.startswith("ImportError ")
    assert f"pip install stableopt[{extra}]" in out


def test_the_former_name_of_steering_still_works_and_warns() -> None:
    """Catches an alias that lacks a name, is another class, or does not say that it is deprecated."""
    out = run(
        "import warnings, stableopt, stableopt.steering as steering\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    adapt = stableopt.adapt\n"
        "print(all(getattr(adapt, name) is getattr(steering, name) for name in steering.__all__))\n"
        "print(*{(w.category.__name__, 'use stableopt.steering' in str(w.message)) for w in caught})"
    )
    assert out == "True\n('DeprecationWarning', True)\n"
