"""Runs one part in this process: ``python -m benchmarks.gpu PART DEVICE FOLDER [DATA_DIR]``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.setting import CannotRunError, Setting
from benchmarks.runner.files import write_json


def main(name: str, device: str, folder: str, data_dir: str | None = None) -> None:
    """Run a part and write ``PART.json``; an error ends the process with a traceback."""
    out = Path(folder)
    setting = Setting(device, out / name, Path(data_dir) if data_dir else None)
    try:
        setting.prepare()
        part_result = PARTS[name].run(setting)
    except CannotRunError as reason:
        result: dict[str, object] = {"outcome": "cannot run", "said": str(reason)}
    else:
        result = {"outcome": "done", "said": part_result.headline, "rows": part_result.rows}
    write_json(out / f"{name}.json", result)


if __name__ == "__main__":
    main(*sys.argv[1:])
