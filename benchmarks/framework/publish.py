"""`publish`: writes the tables, figures and claims of finished jobs; `redraw`: from published tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import Experiment
from benchmarks.framework.tables import read_table, write_table
from benchmarks.runner import Store, in_order
from benchmarks.runner.files import write_json

__all__ = ["claims_in", "publish", "redraw"]


def publish(experiment: Experiment, preset: str, store: Store, folder: Path) -> list[Path]:
    """Write an experiment's tables, figures and claims.

    The folder ``folder/PRESET/DATA/NAME`` gets ``TABLE.csv``, and ``TABLE.png`` and ``TABLE.svg`` as
    drawn from that file; ``claims.json``; and ``about.json`` with settings, machine, versions and time.

    Returns:
        The paths of the files.
    """
    target = folder / preset / experiment.data / experiment.name
    target.mkdir(parents=True, exist_ok=True)
    tables = {target / f"{name}.csv": rows for name, rows in experiment.tables(store).items()}
    for path, rows in tables.items():
        write_table(path, rows)
    drawn = redraw(experiment, target, tables)
    write_json(target / "about.json", _about(experiment, preset, store))
    return [*tables, *drawn, target / "about.json"]


def redraw(experiment: Experiment, target: Path, tables: Iterable[Path]) -> list[Path]:
    """Write the figures and claims of published tables.

    Args:
        experiment: the experiment, with the settings of the tables.
        target: the folder to write to.
        tables: the tables' files.

    Returns:
        The paths of the new files.
    """
    frames = {path: read_table(path) for path in tables}
    written = []
    for path, frame in frames.items():
        figure = experiment.draw(path.stem, frame)
        if figure is not None:
            written += _save(figure, target / path.name)
    claims = experiment.claims({path.stem: frame for path, frame in frames.items()})
    write_json(target / "claims.json", [asdict(claim) for claim in claims] if frames else [])
    return [*written, target / "claims.json"]


def claims_in(folder: Path) -> Sequence[Claim]:
    """Return the claims published in a folder."""
    path = folder / "claims.json"
    return [Claim(**claim) for claim in json.loads(path.read_text())] if path.exists() else []


def _save(figure: Any, path: Path) -> list[Path]:
    import matplotlib

    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=120)
    # Fixed ids and no date, so that the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _about(experiment: Experiment, preset: str, store: Store) -> dict[str, Any]:
    jobs = in_order(experiment.jobs())
    done = [store.about(job) for job in jobs if store.done(job)]

    def distinct(key: str) -> list[Any]:
        return sorted({about[key] for about in done if about[key] is not None})

    return {
        "experiment": experiment.name,
        "preset": preset,
        "settings": experiment.settings,
        "jobs": len(jobs),
        "done": len(done),
        "failed": sum(store.failure(job) is not None for job in jobs),
        "seconds": sum(about["seconds"] for about in done),
        **{key: distinct(key) for key in ("device", "threads", "torch", "revision")},
    }
