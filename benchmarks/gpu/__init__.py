"""What to run when a GPU is there: ``python -m benchmarks gpu --out DIR``, in order of value.

Each part is a process of its own with a time limit. Its result is written as soon as it ends, and a
part that fails, takes too long or cannot run here does not stop the others.

- :mod:`~benchmarks.gpu.plan` lists the parts;
- :mod:`~benchmarks.gpu.script` runs them and writes what came out;
- :mod:`~benchmarks.gpu.checks` and :mod:`~benchmarks.gpu.timings` are the parts themselves.
"""
