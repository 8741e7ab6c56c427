"""Sweeps of jobs that can be killed at any moment and resume from their checkpoints.

A :class:`~benchmarks.runner.job.Job` is a frozen configuration with a ``run`` method; its id is a
hash of it. :func:`~benchmarks.runner.schedule.run_all` runs jobs on any
``concurrent.futures.Executor``, each in its own folder of a
:class:`~benchmarks.runner.store.Store`. Results are read back by configuration:

    store = Store(Path("runs"))
    run_all(jobs, store, Place())
    store.result(jobs[0])
"""

from benchmarks.runner.context import Work
from benchmarks.runner.job import Job, in_order
from benchmarks.runner.place import Place
from benchmarks.runner.schedule import run_all
from benchmarks.runner.store import Store

__all__ = ["Job", "Place", "Store", "Work", "in_order", "run_all"]
