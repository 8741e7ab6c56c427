"""The script for a GPU: its parts on the simulated accelerator, its budget, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from gpu_parts import run_parts
from rank_processes import CONTEXT
from simulated_device import NEEDS_SIMULATED_DEVICE

from benchmarks import cli
from benchmarks.gpu import script
from benchmarks.gpu.plan import PARTS, Part
from benchmarks.gpu.setting import PartResult

IN_MINIATURE = ["measure", "ensemble", "graphs", "nccl", "table-2"]
"""The others run tests, and parts of ``perf`` that have tests of their own."""


@NEEDS_SIMULATED_DEVICE
def test_parts_in_miniature(tmp_path: Path) -> None:
    """Catches a part that leaves a tensor on the host and would fail on a GPU."""
    process = CONTEXT.Process(target=run_parts, args=(IN_MINIATURE, str(tmp_path)))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    results = json.loads((tmp_path / "said.json").read_text())
    assert list(results) == IN_MINIATURE
    for row in results["measure"][1]:
        assert row["difference"] < 1e-5  # the same operations in float32
        assert row["waits_a_product"] <= 1
    assert "no CUDA graphs" in results["graphs"][0]
    assert "2 of 2 minima as one" in results["table-2"][0]
    assert all(row["outcome"] == "reached" for row in results["table-2"][1])
    assert results["nccl"][1][0]["alone"] == results["nccl"][1][0]["one_rank"]


@NEEDS_SIMULATED_DEVICE
def test_command_line_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a child process called with wrong arguments, and reasons that are lost."""
    arguments = ["graphs", "--device", "simulated", "--out", str(tmp_path)]
    assert cli.main(["gpu", *arguments]) == 0
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (part["part"], part["outcome"]) == ("graphs", "cannot run")
    assert part["said"] == "device simulated has no CUDA graphs"
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# simulated\n")
    assert page.endswith("Not done: graphs.\n")
    assert cli.main(["gpu", "speed"]) == 2
    assert cli.main(["gpu", "--device", "cpu"]) == 2
    errors = capsys.readouterr().err
    assert "speed: expected some of measure, tests" in errors
    assert "--device cpu: expected cuda, cuda:N, or simulated" in errors
    if not torch.cuda.is_available():
        assert cli.main(["gpu"]) == 2
        assert "finds no GPU here; --device simulated" in capsys.readouterr().err


def _part(seconds: float) -> Part:
    def title(_: object) -> PartResult:
        """Do something."""
        raise AssertionError

    return Part(seconds, title)


PROGRAMS = {
    "good": "json.dump({'outcome': 'done', 'said': 'a|b'}, open('{out}/good.json', 'w'))",
    "bad": "print('1 | 2'); raise ValueError('why')",
    "slow": "print('began', flush=True); time.sleep(60)",
    "silent": "os._exit(3)",
    "late": "",
}


def test_a_part_that_fails_or_is_slow_does_not_stop_the_others(tmp_path: Path) -> None:
    """Catches a lost reason, a part that exceeds its limit, and one that begins with no time left."""

    def command(name: str) -> list[str]:
        program = PROGRAMS[name].replace("{out}", str(tmp_path))
        return [sys.executable, "-c", f"import json, os, time; {program}"]

    parts = {name: _part(0.7 if name == "slow" else 60) for name in PROGRAMS}
    lines: list[str] = []
    clock = iter([0.0, *([1.0] * 11), 55.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.time, "monotonic", lambda: next(clock, 55.0))
        results = script.run(
            "cpu", tmp_path, seconds=60, parts=parts, command=command, say=lines.append
        )
    by_name = {result.part: (result.outcome, result.said) for result in results}
    assert by_name["good"] == ("done", "a|b")
    assert by_name["bad"][0] == "failed"
    assert by_name["bad"][1].startswith("ValueError: why (exit code 1")
    assert by_name["slow"] == ("stopped", "not finished after 1 s; what it printed is in slow.log")
    assert (tmp_path / "slow.log").read_text() == "began\n"
    assert by_name["silent"][1].startswith("it printed nothing (exit code 3")
    assert by_name["late"] == ("no time", "5 s of the time budget were left")
    assert r"a\|b" in (tmp_path / "gpu.md").read_text()
    assert len(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == 5


def test_parts_fit_into_the_budget_in_order_of_value() -> None:
    """Catches a limit of one part that eats the time of the first six, and a part without a title."""
    assert sum(part.seconds for part in list(PARTS.values())[:6]) <= 8 * 60
    assert all(part.title.endswith(".") for part in PARTS.values())
