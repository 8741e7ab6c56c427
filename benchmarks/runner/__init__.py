"""Sweeps of jobs that can be killed at any moment and go on where they were.

A :class:`~benchmarks.runner.job.Job` is a frozen configuration with a ``run`` method; its id is a
hash of it. :func:`~benchmarks.runner.schedule.run_all` runs many on any
``concurrent.futures.Executor``, each in a folder of its own, which
:class:`~benchmarks.runner.store.Store` keeps. What a job found is read back from there by its
configuration, and by nothing else:

    store = Store(Path("runs"))
    run_all(jobs, store, Place())
    store.result(jobs[0])["sharpness"]
"""

from benchmarks.runner.execute import Work
from benchmarks.runner.job import Job, Place
from benchmarks.runner.schedule import run_all
from benchmarks.runner.store import Store

__all__ = ["Job", "Place", "Store", "Work", "run_all"]
