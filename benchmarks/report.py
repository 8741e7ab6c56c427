"""`report`: REPORT.md, with what the paper prints, what came out here, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.agenda import BEYOND, Rates
from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import PRESETS
from benchmarks.framework.publish import claims_in
from benchmarks.runner.estimate import readable

__all__ = ["report"]

HEAD = """# The paper's tables and figures, printed and reproduced

Written by `python -m benchmarks report` from the results in `{results}`; each number is in a CSV
file there, next to the picture that was drawn from it. The numbers printed are those of Wu, Ma and
E, "How SGD Selects the Global Minima in Over-parameterized Learning", NeurIPS 2018. CIFAR-10 means
a subset of it whose images were once JPEG-compressed.
"""


def report(results: Path, shown: str) -> str:
    """Return the report on what was published in a folder.

    Args:
        results: the folder.
        shown: what to call it.
    """
    parts = (_opening(results), _summary(results), _parts(results))
    return "\n".join([HEAD.format(results=shown), *chain.from_iterable(parts)]) + "\n"


def _opening(results: Path) -> Iterator[str]:
    """Yield the lines of each table and figure of the paper, on the paper's data."""
    yield _line("of the paper", "", "printed", "here", "reproduced")
    yield "| --- | --- | --- | --- | --- |"
    for name in NAMES:
        shows = experiment(name).shows
        if shows == BEYOND:
            continue
        # The larger preset of each data set; digits are not the paper's.
        found = {data: folder for _, data, folder in _published(results, name) if data != "digits"}
        for data, folder in found.items():
            first = f"[{shows}](#{name}), {data}"
            for claim in claims_in(folder):
                if claim.printed:
                    yield _line(first, claim.what, claim.printed, claim.ours, _verdict(claim))
                    first = ""
    yield ""
    yield (
        "All experiments, presets and data sets. What was not run has the time that one core would take,"
        " by the speed of what was: an order of magnitude."
    )
    yield ""


def _published(results: Path, name: str) -> Iterator[tuple[str, str, Path]]:
    for preset in PRESETS[1:]:  # a smoke run proves only that it runs
        for data in experiment(name).datasets:
            folder = results / preset / data / name
            if (folder / "about.json").exists():
                yield preset, data, folder


def _summary(results: Path) -> Iterator[str]:
    rates = Rates(results)
    yield "| experiment | shows | preset, data | reproduced |"
    yield "| --- | --- | --- | --- |"
    for name in NAMES:
        runs = list(_published(results, name))
        for preset, data, folder in runs:
            claims = claims_in(folder)
            kept = sum(claim.reproduced for claim in claims)
            share = f"{kept} of {len(claims)}" if claims else "no claims"
            link = f"[{name}](#{name})"
            yield f"| {link} | {experiment(name).shows} | {preset}, {data} | {share} |"
        run = {(preset, data) for preset, data, _ in runs}
        left = [
            f"{preset}, {data}{_expected(rates.seconds(name, preset, data))}"
            for preset in PRESETS[1:]
            for data in experiment(name).datasets
            if (preset, data) not in run
        ]
        if left:
            yield f"| {name} | {experiment(name).shows} | {'; '.join(left)} | not run |"
    yield ""


def _expected(seconds: float | None) -> str:
    return "" if seconds is None else f" (about {readable(seconds)})"


def _parts(results: Path) -> Iterator[str]:
    for name in NAMES:
        runs = list(_published(results, name))
        if not runs:
            continue
        yield f"## {name}"
        yield ""
        yield f"{experiment(name).shows}. {experiment(name).about()[1]}"
        yield ""
        for preset, data, folder in runs:
            about = json.loads((folder / "about.json").read_text())
            yield f"### {preset}, {data}"
            yield ""
            yield _run(about)
            yield ""
            yield from _table(claims_in(folder))
            for picture in sorted(folder.glob("*.png")):
                at = picture.relative_to(results.parent).as_posix()
                yield f"![{picture.stem}]({at})"
                yield ""


def _run(about: dict[str, Any]) -> str:
    machine = f"{' and '.join(map(str, about['device']))}, torch {' and '.join(about['torch'])}"
    left = about["jobs"] - about["done"] - about["failed"]
    lost = "".join(
        f"; **{count} {word}**"
        for count, word in ((about["failed"], "failed"), (left, "not run"))
        if count
    )
    seeds = ", ".join(map(str, about["settings"]["seeds"]))
    return (
        f"{about['done']} of {about['jobs']} jobs{lost}; {readable(about['seconds'])} of one worker"
        f" in all, {machine}. Seeds {seeds}."
    )


def _table(claims: list[Claim] | Any) -> Iterator[str]:
    if not claims:
        return
    yield "| | printed | theory | here | tolerance | reproduced | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for claim in claims:
        texts = (claim.what, claim.printed, claim.theory, claim.ours, claim.tolerance)
        yield _line(*texts, _verdict(claim), claim.why)
    yield ""


def _verdict(claim: Claim) -> str:
    return "yes" if claim.reproduced else "**no**"


def _line(*cells: str) -> str:
    plain = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(plain) + " |"
