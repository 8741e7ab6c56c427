"""`StabilityCallback` for Lightning: stability margins in the trainer's loggers.

Three examples::

    Trainer(callbacks=[StabilityCallback((x, y), every=50)])            # the loss of training_step
    Trainer(callbacks=[StabilityCallback(loader, Net.batch_loss)])      # a method of the module
    Trainer(callbacks=[StabilityCallback(loader, loss, optimizer=1)])   # of two optimizers, one

Works with ``lightning`` and with ``pytorch_lightning``.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.parameters import group_of
from stableopt.integrations._callback import Tracked
from stableopt.sinks.delivery import Sink
from stableopt.stability import StabilityMargins

__all__ = ["StabilityCallback"]


def _callback_class() -> Any:
    """Return ``Callback`` of the package in use, or else of the installed one."""
    packages = ["lightning.pytorch", "pytorch_lightning"]
    packages.sort(key=lambda package: package not in sys.modules)
    for package in packages:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package).Callback
    raise ImportError("StabilityCallback needs Lightning: pip install stableopt[lightning]")


class StabilityCallback(Tracked, _callback_class()):  # type: ignore[misc]
    """Measures the stability margins during ``trainer.fit`` and sends them to the loggers.

    The run is bit for bit the run without it. Every finite number of a record goes to all loggers as
    ``<prefix>/<name>``, at the trainer's step, and stays in ``trainer.callback_metrics`` until the
    next measurement, so that ``ModelCheckpoint`` can watch it. Checkpoints hold the monitor's state, and
    a resumed run measures as if it had not stopped. If nothing can be measured, there is an error before
    the first step; a measurement that fails later is recorded, and training continues.

    Samples of a step are those of the batches that Lightning passes to ``training_step``.

    Args:
        data: the probe set, on which curvature is measured: a batch as ``training_step`` gets it, a
            ``Dataset``, a ``DataLoader``, or a re-iterable of batches. Under DDP, this rank's shard.
        batch_loss: ``batch_loss(pl_module, batch)``, the mean loss of a batch, such as an unbound
            method of the module. By default what ``training_step`` returns, with ``log`` and
            ``log_dict`` muted; this needs automatic optimization, and a step that changes nothing
            outside of the module.
        optimizer: index of the optimizer, where ``configure_optimizers`` returns several for several
            models, as of a GAN. Then the parameters that count are those that it holds. By default all
            optimizers together, as Muon and AdamW.
        prefix: prefix of the names in the loggers; callbacks of one trainer need different ones.
        sinks: callables that take ``(step, record)``, in addition to the loggers.
        recorder: the folder for the reports of a :class:`~stableopt.FlightRecorder`, if any.
        **options: further options of :class:`~stableopt.StabilityMonitor`: ``every`` or
            ``max_overhead``, ``quantities``, ``update_rule``, ``params``, ``dataset_size``,
            ``chunk_size`` and the others.

    Attributes:
        monitor: the :class:`~stableopt.StabilityMonitor` of the latest ``fit``, or ``None``.
        recorder: the flight recorder of the latest run, or ``None``.

    Raises:
        TypeError: without a probe set, and as ``StabilityMonitor`` does when ``fit`` starts.
        ValueError: when ``fit`` starts: for an index out of range, for manual optimization without
            ``batch_loss``, and as ``StabilityMonitor`` does.

    >>> callback = StabilityCallback((torch.ones(4, 2), torch.zeros(4, 1)), every=10)
    >>> callback.state_key
    "StabilityCallback{'prefix': 'stability'}"
    """

    def __init__(
        self,
        data: Any,
        batch_loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        optimizer: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, batch_loss, **options)
        self._index = optimizer
        self._state: dict[str, Any] = {}
        self._shown: StabilityMargins | None = None
        self._begun = False

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints."""
        return str(self._generate_state_key(prefix=self._prefix))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the monitor of an earlier ``fit``; the first batch makes a new one."""
        self._begun = False

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor, now that optimizers, checkpoint and the module's own hooks are ready."""
        self._begun = True
        chosen = self._chosen(trainer.optimizers)
        state = self._state if trainer.global_step else {}
        defaults = {"process_group": group_of(trainer.strategy.model)}
        if len(chosen) < len(trainer.optimizers):
            defaults["params"] = _held(chosen[0], pl_module)
        self._start(
            chosen,
            pl_module,
            _in_precision(trainer, self._loss_of(pl_module)),
            self._data,
            self._to_loggers(trainer),
            # Lightning counts the steps of all optimizers together.
            trainer.global_step // len(trainer.optimizers),
            lambda monitor: self._restore(monitor, state) if state else None,
            **defaults,
        )
        self._shown = self.margins

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples of ``batch``, since the module's ``forward`` may never be called."""
        if not self._begun:
            self._begin(trainer, pl_module)
        if self.monitor is not None:
            self.monitor.count_samples(batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show new margins to callbacks that watch metrics, on every rank."""
        margins = self.margins
        if margins is not None and margins is not self._shown:
            self._shown = margins
            shown = self._named(margins.record())
            old = [name for name in trainer.callback_metrics if name.startswith(f"{self._prefix}/")]
            # A value that failed this time must not show its former value.
            values = {**dict.fromkeys(old, math.nan), **shown}
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of monitor and recorder, as plain numbers, lists, dicts and tensors."""
        return self._state if self.monitor is None else self._saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep ``state_dict`` for the monitor that the start of training makes."""
        self._state = dict(state_dict)

    def _close(self) -> None:
        super()._close()
        if self.monitor is not None:
            # A second fit of the trainer continues from here.
            self._state = self._saved()

    def _chosen(self, optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        index = self._index
        if not optimizers:
            raise ValueError(
                "configure_optimizers made no optimizer, so it takes no steps to measure"
            )
        if index is None:
            return optimizers
        try:
            return [optimizers[index]]
        except (IndexError, TypeError):
            raise ValueError(
                f"optimizer={index!r}: expected an index into {len(optimizers)} optimizers"
            ) from None

    def _loss_of(self, pl_module: Any) -> Callable[[Any, Any], Tensor]:
        if self._batch_loss is not None:
            return self._batch_loss
        if not pl_module.automatic_optimization:
            raise ValueError(
                "batch_loss=None with manual optimization, whose training_step takes steps: expected"
                " batch_loss(pl_module, batch), the mean loss of a batch"
            )
        return _training_loss

    def _to_loggers(self, trainer: Any) -> Sink:
        def to_loggers(step: int, record: dict[str, float]) -> None:
            # The step of Lightning's loggers: the steps of all optimizers in a batch count as one.
            after = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
            for logger in trainer.loggers:
                logger.log_metrics(self._named(record), step=after)

        return to_loggers


def _held(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[Tensor]:
    """Return the parameters of ``module`` that ``optimizer`` holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every: list[Tensor] = [p for p in module.parameters() if id(p) in held]
    return [p for p in every if p.requires_grad] or every  # a toggled optimizer's are frozen


def _in_precision(trainer: Any, batch_loss: Callable[[Any, Any], Tensor]) -> Any:
    """Return ``batch_loss`` of batches in the trainer's precision, as ``training_step`` gets them."""
    convert = trainer.precision_plugin.convert_input
    return lambda pl_module, batch: batch_loss(pl_module, convert(batch))


def _training_loss(pl_module: Any, batch: Any) -> Tensor:
    """Return the loss of ``training_step``, and log nothing."""
    step = pl_module.training_step
    arguments = inspect.signature(step).parameters.values()
    takes_index = len(arguments) > 1 or any(a.kind is a.VAR_POSITIONAL for a in arguments)
    with _mute(pl_module):
        output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step returned {type(output).__name__} for the probe set: expected a loss, or"
            " a dictionary with one as 'loss'; batch_loss= computes it another way"
        )
    return loss


@contextlib.contextmanager
def _mute(pl_module: nn.Module) -> Iterator[None]:
    """Mute the logging of all modules, since a measurement is not a step."""
    loud = [module for module in pl_module.modules() if hasattr(type(module), "log_dict")]
    names = ("log", "log_dict")
    own = [{name: vars(module)[name] for name in names if name in vars(module)} for module in loud]
    try:
        for module in loud:
            for name in names:
                vars(module)[name] = _ignore
        yield
    finally:
        for module, former in zip(loud, own, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(former)


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
