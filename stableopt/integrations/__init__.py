"""Integrations: stability margins in Lightning, transformers, Accelerate and Ignite.

Three examples::

    from stableopt.integrations.lightning import StabilityCallback
    Trainer(callbacks=[StabilityCallback(probe_set, every=50)])           # Lightning

    from stableopt.integrations.transformers import StabilityCallback
    StabilityCallback(probe_set, every=50).attach(trainer)                # transformers.Trainer

    optimizer, model = accelerator.prepare(optimizer, model)              # Accelerate, Ignite
    StabilityMonitor(optimizer, model, loss_fn, probe_set, every=50)

Each module imports its framework, and no other module of the library imports it.
"""
