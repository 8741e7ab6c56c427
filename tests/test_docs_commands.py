"""Every command that README, CONTRIBUTING and docs show is tested in a cheap form.

A command begins with the name of a tool: a line of a non-Python block, or inline code of more than one
word. The first entry of ``CHECKS`` that matches tests it; a command without a match fails.
``NOT_RUN`` lists the commands that are not run, with the reason.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from small_runs import run_in_this_process

import stableopt
from benchmarks import cli as benchmarks_cli
from stableopt.__main__ import main as stableopt_cli
from stableopt.stability import StabilityMargins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

TOOLS = (
    r"python3?|make|pip|nox|tensorboard|torchrun|perf|accelerate|sbatch|srun|mpirun|dask|apt-get|git"
    r"|tar|unzip|twine"
)

NOT_RUN = {
    r"python -m build|tar .+|unzip .+": "needs the archives of a release",
    r"twine .+": "uploads a release",
}
"""Patterns of commands that are not run here, each with the reason."""


def commands_of(text: str) -> list[str]:
    """Return the commands in ``text``, a page, without comments, prompts and ``.venv/bin``."""
    found: list[str] = []
    fences = re.compile(r"^ *```(\S*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for language, block in fences.findall(text):
        if language not in ("python", "diff", "{eval-rst}"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.strip().removeprefix("$ ") for line in lines]
    found += [code for code in re.findall(r"`([^`]+)`", fences.sub("", text)) if " " in code]
    plain = [" ".join(re.sub(r"\s#\s.*", "", one).split()) for one in found]
    plain = [one.removeprefix(".venv/bin/") for one in plain]
    return list(dict.fromkeys(one for one in plain if re.match(rf"({TOOLS})\s", one)))


COMMANDS = list(dict.fromkeys(one for page in PAGES for one in commands_of(page.read_text())))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results, for the commands that read them."""
    folder = tmp_path_factory.mktemp("ran")
    arguments = ["run", "toy", "--preset", "smoke", "--out", str(folder / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        run_in_this_process(patch)
        assert benchmarks_cli.main(arguments) == 0
    return folder


class Here:
    """The place where a command is tested: an empty folder, and the fixtures that it may use."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request
        self.patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        self.folder: Path = request.getfixturevalue("tmp_path")
        self.patch.chdir(self.folder)


def make(words: list[str], here: Here) -> None:
    """Check that the target and its dependencies exist."""
    subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def install(words: list[str], here: Here) -> None:
    """Check that the requirements parse, and that ``pyproject.toml`` has their extras and packages.

    Installing would need a network.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [Requirement(one) for listed in extras.values() for one in listed]
    every += map(Requirement, project["dependencies"])
    for word in words[2:]:
        wanted = Requirement(re.sub(r"^\.(?=\[|$)", "stableopt", word))  # the clone
        assert wanted.name in {"stableopt", *(one.name for one in every)}
        assert wanted.extras <= set(extras)


def benchmarks_run(words: list[str], here: Here) -> None:
    """Check that its jobs can be created and listed."""
    names = {"NAME": "toy", "…": "toy"}
    arguments = [names.get(word, word) for word in words[3:]]
    assert benchmarks_cli.main([*arguments, "--dry-run"]) == 0


def benchmarks_perf(words: list[str], here: Here) -> None:
    """Check that its parts exist and accept the settings, without timing anything."""
    configured = []
    for path in benchmarks_cli.PARTS.values():
        here.patch.setattr(f"{path}.run", configured.append)
    arguments = words[1:] if words[0] == "perf" else words[4:]
    assert benchmarks_cli.main(["perf", *arguments]) == 0
    assert configured


def benchmarks_gpu(words: list[str], here: Here) -> None:
    """Check that its options exist, without starting a part."""
    from benchmarks.gpu import script

    here.patch.setattr("torch.cuda.is_available", lambda: True)
    here.patch.setattr(script, "run", lambda *_, **__: [])
    assert benchmarks_cli.main(words[3:]) == 0


def benchmarks_after(words: list[str], here: Here) -> None:
    """Run it on the results of the smoke preset."""
    ran = here.request.getfixturevalue("ran")
    here.patch.chdir(ran)
    if words[3] == "report":
        words = [*words, "--to", str(here.folder / "REPORT.md")]
    if words[3] == "redraw":
        words = [*words, "--results", str(ran / "runs")]
    assert benchmarks_cli.main(words[3:]) == 0


def doctor(words: list[str], here: Here) -> None:
    """Run it on a model with the shown name, or on the optimizer class."""
    for target in words[4:]:
        if "--optimizer" in words:
            break
        module, name = target.split(":")
        path = here.folder.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True)
        path.write_text(f"from torch import nn\n\ndef {name}():\n    return nn.Linear(2, 1)\n")
        here.patch.syspath_prepend(here.folder)
    assert stableopt_cli(words[3:]) == 0


def report(words: list[str], here: Here) -> None:
    """Run it on a folder of the shown name with one measurement."""
    sink = stableopt.JSONLinesSink(here.folder / words[4] / "margins.jsonl")
    sink(50, StabilityMargins(step=50, sharpness=1.0, sharpness_limit=2.0).record())
    assert stableopt_cli(words[3:]) == 0


def script(words: list[str], here: Here) -> None:
    """Check that it exists and prints its help; running it takes minutes, or a browser."""
    command = [sys.executable, str(ROOT / words[1]), *words[2:], "--help"]
    subprocess.run(command, check=True, capture_output=True)


def tensorboard(words: list[str], here: Here) -> None:
    """Check that its options exist, without starting a server."""
    from tensorboard import default, program

    program.TensorBoard(default.get_plugins()).configure(words)


def torchrun(words: list[str], here: Here) -> None:
    """Check that its options exist; ``examples/test_two_ranks.py`` runs the examples."""
    from torch.distributed.run import get_args_parser

    scripts = [word for word in words if word.endswith(".py")]
    assert all((ROOT / one).exists() for one in scripts)
    get_args_parser().parse_args([*words[1:], *([] if scripts else ["examples/ddp.py"])])


CHECKS: dict[str, Callable[[list[str], Here], None]] = {
    r"make [\w -]+": make,
    r"(python -m )?pip install .+": install,
    r"python -m benchmarks (run|paper) .+": benchmarks_run,
    r"(python -m benchmarks )?perf .+": benchmarks_perf,
    r"python -m benchmarks gpu.*": benchmarks_gpu,
    r"python -m benchmarks (list|status|figures|redraw|report)\b.*": benchmarks_after,
    r"python -m benchmarks perf": benchmarks_perf,
    r"python -m stableopt doctor.*": doctor,
    r"python -m stableopt report .+": report,
    r"python (docs|examples)/\w+\.py.*": script,
    r"tensorboard .+": tensorboard,
    r"torchrun .+": torchrun,
}


def check_of(command: str) -> Callable[[list[str], Here], None] | None:
    """Return the check for ``command``, or ``None``."""
    return next((do for pattern, do in CHECKS.items() if re.fullmatch(pattern, command)), None)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    """Catches a command with outdated options, target or script, and one without a check."""
    for pattern, reason in NOT_RUN.items():
        if re.fullmatch(pattern, command):
            pytest.skip(reason)
    check = check_of(command)
    assert check, (
        "no check in CHECKS matches: add one, or add the command to NOT_RUN with the reason"
    )
    check(shlex.split(command), Here(request))


def test_commands_are_found() -> None:
    """Catches a search that misses a prompt, a comment, a continued line, a fence's language, or
    wrapped inline code; and one that mistakes output or a bare name for a command.
    """
    page = (
        "Use `make` or `.venv/bin/python -m\nbenchmarks list`.\n\n"
        "```console\n$ make test   # here\nmade 3\n```\n"
        "```\npip install a \\\n    b\npython was here\n```\n"
        '```python\npython = "make it"\n```\n'
    )
    assert commands_of(page) == [
        "make test",
        "pip install a b",
        "python was here",
        "python -m benchmarks list",
    ]
    assert check_of("python was here") is None
