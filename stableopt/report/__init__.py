"""HTML pages of a run: the file of ``python -m stableopt report``, and the element of a notebook.

Three examples::

    python -m stableopt report runs/demo               # runs/demo/report.html
    write_page("runs/demo", "demo.html")               # the same, from Python
    notebook(Run.of_history("demo", monitor.history))  # the element of a monitor in a notebook
"""

from stableopt.report.reading import read_run
from stableopt.report.run import Run
from stableopt.report.writer import notebook, page, write_page

__all__ = ["Run", "notebook", "page", "read_run", "write_page"]
