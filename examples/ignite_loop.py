"""Track a trainer of Ignite, and pass the margins to its metrics and loggers.

python examples/ignite_loop.py
"""

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt

torch.manual_seed(0)
x = torch.randn(240, 8)
y = torch.stack([x[:, :4].sum(1).sin(), x[:, 4:].sum(1).cos()], dim=1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
loss_fn = nn.MSELoss()
optimizer = stableopt.SGD(model.parameters(), lr=0.1)
monitor = optimizer.track(model, loss_fn, (x, y), every=10)

trainer = create_supervised_trainer(model, optimizer, loss_fn)


@trainer.on(Events.ITERATION_COMPLETED(every=10))
def show(engine: Engine) -> None:
    """Write the latest margins into Ignite's metrics, where its loggers read them."""
    margins = monitor.margins
    if margins is not None:
        engine.state.metrics |= {f"stability/{k}": v for k, v in margins.record().items()}
        ratio = engine.state.metrics["stability/sharpness_ratio"]
        print(f"step {engine.state.iteration}: {ratio:.0%} of the largest stable sharpness")


@trainer.on(Events.COMPLETED | Events.EXCEPTION_RAISED)
def detach(engine: Engine, error: Exception | None = None) -> None:
    """Detach the monitor, and raise the error if there was one."""
    monitor.close()
    if error is not None:
        raise error


trainer.run(DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), max_epochs=2)
margins = monitor.margins
assert margins is not None
assert margins.failure is None, margins.failure
