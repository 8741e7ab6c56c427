"""The page of a run: what ``python -m stableopt report`` writes, and what a notebook shows.

Three examples::

    python -m stableopt report runs/demo               # runs/demo/report.html
    write_page("runs/demo", "demo.html")               # the same, from Python
    notebook(Run.of_history("demo", monitor.history))  # what a notebook shows for the monitor
"""

from stableopt.report.run import Run, read_run
from stableopt.report.writer import notebook, page, write_page

__all__ = ["Run", "notebook", "page", "read_run", "write_page"]
