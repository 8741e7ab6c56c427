"""Tests of the wheel that would be published, in environments made for them.

Nothing here imports the working tree: the sdist is built, the wheel from the sdist, and the tests of
the sdist run against the installed wheel. A file that either lacks makes them fail.

    nox -s installed                       one environment, with the versions of constraints.txt
    nox -s tests                           every Python and torch that is promised
    nox -s "tests-3.10(torch='2.6.0')"     one of them
    nox -s installed -- tests/stability    some of the tests
"""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import nox

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6.0", "newest")
"""The oldest that pyproject.toml admits, and the newest in the index."""

nox.options.sessions = ["installed"]
nox.options.error_on_missing_interpreters = False


@nox.session
def installed(session: nox.Session) -> None:
    """Test the wheel with the versions of constraints.txt."""
    _test_the_wheel(session, "-c", str(Path("constraints.txt").resolve()))


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """Test the wheel with one Python and one torch."""
    _test_the_wheel(session, "torch" if torch == "newest" else f"torch=={torch}")


def _test_the_wheel(session: nox.Session, *requirements: str) -> None:
    folder = Path(session.create_tmp())
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), silent=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    session.install(*requirements, f"{wheel.resolve()}[dev]")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (root,) = (folder / "sdist").iterdir()
    shutil.rmtree(root / "stableopt")  # so that what is imported can only be what was installed
    session.chdir(root)
    session.run("python", "-c", "import stableopt; print(stableopt.__file__)")
    what = session.posargs or ["tests", "--pyargs", "stableopt"]
    session.run("python", "-m", "pytest", "-n", "auto", *what, env={"OMP_NUM_THREADS": "1"})
