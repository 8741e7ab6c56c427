"""`report`: REPORT.md, with the paper's numbers, ours, and the runs that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
    """Return the report on the published results.

    Args:
        results: their folder.
        shown: the folder's name in the report.
    """
    parts = (_opening(results), _summary(results), _parts(results))
    return "\n".join([HEAD.format(results=shown), *chain.from_iterable(parts)]) + "\n"


def _opening(results: Path) -> Iterator[str]:
    """Yield the claims on each table and figure of the paper, on the paper's data sets."""
    yield _line("of the paper", "", "printed", "here", "reproduced")
    yield "| --- | --- | --- | --- | --- |"
    for name in NAMES:
        shows = experiment(name).shows
        if shows == BEYOND:
            continue
        # The dict keeps the largest preset with claims of each data set. Digits are not in the paper.
        folders = {
            data: folder
            for _, data, folder in _published(results, name)
            if data != "digits" and claims_in(folder)
        }
        for data, folder in folders.items():
            first = f"[{shows}](#{name}), {data}"
            for claim in claims_in(folder):
                if claim.printed:
                    yield _line(first, claim.what, claim.printed, claim.ours, _verdict(claim))
                    first = ""
    yield ""
    yield (
        "All experiments, presets and data sets. For those not run, the estimated time on one core is"
        " given, to an order of magnitude, from the speed of the published runs."
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
            reproduced = sum(claim.reproduced for claim in claims)
            share = f"{reproduced} of {len(claims)}" if claims else "no claims"
            link = f"[{name}](#{name})"
            yield f"| {link} | {experiment(name).shows} | {preset}, {data} | {share} |"
        published = {(preset, data) for preset, data, _ in runs}
        unpublished = [
            f"{preset}, {data}{_expected(rates.seconds(name, preset, data))}"
            for preset in PRESETS[1:]
            for data in experiment(name).datasets
            if (preset, data) not in published
        ]
        if unpublished:
            yield f"| {name} | {experiment(name).shows} | {'; '.join(unpublished)} | not run |"
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
            yield _run_details(about)
            yield ""
            yield from _table(claims_in(folder))
            for picture in sorted(folder.glob("*.png")):
                link = picture.relative_to(results.parent).as_posix()
                yield f"![{picture.stem}]({link})"
                yield ""


def _run_details(about: dict[str, Any]) -> str:
    machine = f"{' and '.join(map(str, about['device']))}, torch {' and '.join(about['torch'])}"
    not_run = about["jobs"] - about["done"] - about["failed"]
    missing = f"; **{about['failed']} failed**" if about["failed"] else ""
    missing += f"; **{not_run} not run**" if not_run else ""
    seeds = ", ".join(map(str, about["settings"]["seeds"]))
    return (
        f"{about['done']} of {about['jobs']} jobs{missing}; {readable(about['seconds'])} of one worker"
        f" in all, {machine}. Seeds {seeds}."
    )


def _table(claims: Sequence[Claim]) -> Iterator[str]:
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
    escaped = [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
    return "| " + " | ".join(escaped) + " |"
