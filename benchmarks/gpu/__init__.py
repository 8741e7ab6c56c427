"""Checks and timings for a GPU, in order of value: ``python -m benchmarks gpu --out DIR``.

Each part runs in its own process with a time limit, and its result is written when it ends. A part that
fails, takes too long or cannot run on this machine does not stop the others.

- :mod:`~benchmarks.gpu.plan` lists the parts;
- :mod:`~benchmarks.gpu.script` runs them and writes their results;
- :mod:`~benchmarks.gpu.checks` and :mod:`~benchmarks.gpu.timings` are the parts themselves.
"""
