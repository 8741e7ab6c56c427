"""Job ids: results on disk stay valid only while the ids of their jobs do not change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.experiment import PRESETS
from benchmarks.runner import in_order

GOLDEN = json.loads(Path(__file__).with_name("job_ids.json").read_text())
"""By experiment, preset and data: how many jobs there are, and a hash of their sorted ids."""


@pytest.mark.parametrize("name", NAMES)
def test_job_ids_do_not_change(name: str) -> None:
    """Catches a renamed field, a changed default or a changed ``kind``.

    Any of them changes job ids, so all published results would be computed again.
    """
    digests = {}
    for preset in PRESETS:
        for data in experiment(name).datasets:
            ids = sorted(job.id for job in in_order(experiment(name).preset(preset, data).jobs()))
            digest = hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12]
            digests[f"{name} {preset} {data}"] = f"{len(ids)} {digest}"
    assert digests == {key: value for key, value in GOLDEN.items() if key.startswith(f"{name} ")}
