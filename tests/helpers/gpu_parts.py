"""Runs of the parts of the GPU script in miniature, for a process of their own."""

from __future__ import annotations

import json
from pathlib import Path


def run_parts(names: list[str], folder: str) -> None:
    """Run parts on the simulated accelerator; write what they say."""
    from benchmarks.gpu.plan import PARTS
    from benchmarks.gpu.setting import SIMULATED, CannotRunError, Setting

    said = {}
    for name in names:
        setting = Setting(SIMULATED, Path(folder) / name)
        setting.prepare()
        try:
            found = PARTS[name].run(setting)
            said[name] = [found.headline, found.rows]
        except CannotRunError as reason:
            said[name] = [str(reason), []]
    Path(folder, "said.json").write_text(json.dumps(said))
