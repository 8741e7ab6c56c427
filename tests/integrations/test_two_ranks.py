"""The callbacks where two processes train."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_script

LIGHTNING = """
import os, warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import stableopt

warnings.simplefilter("ignore")
import lightning.pytorch as pl
from stableopt.integrations.lightning import StabilityCallback

torch.manual_seed(0)
x, y = torch.randn(32, 4), torch.randn(32, 2)

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

shard = slice(int(os.environ["RANK"]), None, 2)
callback = StabilityCallback((x[shard], y[shard]), every=2)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[callback], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
net = Net()
trainer.fit(net, DataLoader(TensorDataset(x, y), batch_size=4))
assert "stability/sharpness" in trainer.callback_metrics
whole = stableopt.measure(net.net, nn.MSELoss(), (x, y), quantities=("sharpness",)).sharpness
margins = callback.margins
"""

TRAINER = """
import os, warnings
import torch
import stableopt

warnings.simplefilter("ignore")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from stableopt.integrations.transformers import StabilityCallback

torch.manual_seed(0)
words = torch.randint(16, (32, 8))
config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
arguments = TrainingArguments(
    os.path.dirname(__file__), max_steps=4, report_to="none", disable_tqdm=True, use_cpu=True,
    per_device_train_batch_size=4, ddp_backend="gloo", save_strategy="no",
)
rows = [{"input_ids": row, "labels": row} for row in words]
trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows)
shard = words[int(os.environ["RANK"]) :: 2]
callback = StabilityCallback({"input_ids": shard, "labels": shard}, every=2).attach(trainer)
trainer.train()
problem = stableopt.Problem.from_batch_loss(
    trainer.model, lambda model, batch: model(**batch).loss, {"input_ids": words, "labels": words}
)
whole = stableopt.measure(problem, quantities=("sharpness",)).sharpness
margins = callback.margins
"""

REPORT = """
assert margins.failure is None, margins.failure
assert [m.step for m in callback.history] == [2, 4]
# The monitor's tolerance is 3 % of residual, and its value's error of second order in that.
assert abs(margins.sharpness - whole) < 0.01 * whole, (margins.sharpness, whole)
print("report", margins.batch_size, margins.dataset_size, margins.sharpness)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("script", [LIGHTNING, TRAINER], ids=["lightning", "transformers"])
def test_two_ranks_measure_together(script: str, tmp_path: Path) -> None:
    """Catches ranks that measure their shard as the whole data, or count one rank's batches only."""
    path = tmp_path / "script.py"
    path.write_text(script + REPORT)
    reports = [
        [line for line in out.splitlines() if line.startswith("report")]
        for out in run_script(path, 2, tmp_path)
    ]
    assert reports[0] == reports[1]
    (line,) = reports[0]
    assert line.split()[1:3] == ["8", "32"]
