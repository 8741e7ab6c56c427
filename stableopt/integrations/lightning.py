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
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.tensors import as_tensor
from stableopt.curvature.problem.parameters import group_of
from stableopt.integrations._callback import Tracked
from stableopt.sinks.delivery import Sink
from stableopt.stability import StabilityMargins

__all__ = ["StabilityCallback"]


def _callback_class() -> Any:
    """Return ``Callback`` of the imported package, or else of the installed one."""
    packages = ["lightning.pytorch", "pytorch_lightning"]
    packages.sort(key=lambda package: package not in sys.modules)
    for package in packages:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package).Callback
    raise ImportError("StabilityCallback needs Lightning: pip install stableopt[lightning]")


class StabilityCallback(Tracked, _callback_class()):  # type: ignore[misc]
    """Measures the stability margins during ``trainer.fit`` and sends them to the loggers.

    Training with the callback is bit for bit the training without it. Every finite number of a record
    goes to all loggers as ``<prefix>/<name>``, at the trainer's step, and stays in
    ``trainer.callback_metrics`` until the next measurement, so that ``ModelCheckpoint`` can watch it.
    Checkpoints hold the monitor's state, so a resumed run measures as an uninterrupted one. If nothing
    can be measured, there is an error before the first step; a measurement that fails later is
    recorded, and training continues.

    The batch size of a step counts the samples that Lightning passes to ``training_step``.

    Args:
        data: the probe set, on which curvature is measured: a batch as ``training_step`` gets it, a
            ``Dataset``, a ``DataLoader``, or a re-iterable of batches. Under DDP, this rank's shard.
        batch_loss: ``batch_loss(pl_module, batch)``, the mean loss of a batch, such as an unbound
            method of the module. By default the loss that ``training_step`` returns, with ``log`` and
            ``log_dict`` muted; this needs automatic optimization, and a step that changes nothing
            outside of the module.
        optimizer: the index of one optimizer, if ``configure_optimizers`` returns several for several
            models, as for a GAN; only its parameters count. By default all optimizers are measured
            together, as for Muon with AdamW.
        prefix: prefix of the names in the loggers; callbacks of one trainer need different ones.
        sinks: callables that take ``(step, record)``, in addition to the loggers.
        recorder: the folder for the reports of a :class:`~stableopt.FlightRecorder`, or ``None`` for no
            recorder.
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
        self._has_loaded = False
        self._trainer: Callable[[], Any] = _no_trainer  # the trainer of the last training
        self._published: StabilityMargins | None = None
        self._has_started = False

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints."""
        return str(self._generate_state_key(prefix=self._prefix))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the first batch create a new monitor."""
        self._has_started = False

    def _create_monitor(self, trainer: Any, pl_module: Any) -> None:
        """Create the monitor, now that optimizers, checkpoint and the module's own hooks are ready."""
        self._has_started = True
        measured = self._measured_optimizers(trainer.optimizers)
        # Without a state in the checkpoint, that of another training is not continued.
        continues = self._has_loaded or self._trainer() is trainer
        state = self._state if trainer.global_step and continues else {}
        self._has_loaded, self._trainer = False, weakref.ref(trainer)
        defaults = {"process_group": group_of(trainer.strategy.model)}
        if len(measured) < len(trainer.optimizers):
            defaults["params"] = _params_of(measured[0], pl_module)
        self._start(
            measured,
            pl_module,
            _in_precision(trainer, self._loss_of(pl_module)),
            self._data,
            self._to_loggers(trainer),
            # Lightning counts the steps of all optimizers together.
            trainer.global_step // len(trainer.optimizers),
            lambda monitor: self._restore(monitor, state) if state else None,
            **defaults,
        )
        self._published = self.margins

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples of ``batch``: ``training_step`` may bypass the module's ``forward``."""
        if not self._has_started:
            self._create_monitor(trainer, pl_module)
        if self.monitor is not None:
            self.monitor.count_samples(batch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Publish new margins as ``callback_metrics``, on every rank."""
        margins = self.margins
        if margins is None or margins is self._published:
            return
        self._published = margins
        metrics = trainer.callback_metrics
        # A metric that is missing this time becomes NaN instead of keeping its former value.
        former = [name for name in metrics if name.startswith(f"{self._prefix}/")]
        values = {**dict.fromkeys(former, math.nan), **self._metrics(margins.record())}
        metrics.update({name: as_tensor(value) for name, value in values.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of monitor and recorder, as plain numbers, lists, dicts and tensors."""
        return self._state if self.monitor is None else self._saved_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep ``state_dict`` for the monitor that the next training creates."""
        self._state, self._has_loaded = dict(state_dict), True

    def _close(self) -> None:
        super()._close()
        if self.monitor is not None:
            # A second fit of the trainer continues from here.
            self._state = self._saved_state()

    def _measured_optimizers(
        self, optimizers: list[torch.optim.Optimizer]
    ) -> list[torch.optim.Optimizer]:
        index = self._index
        if not optimizers:
            raise ValueError(
                "configure_optimizers made no optimizer: expected one, whose steps are measured"
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
                "batch_loss=None with manual optimization, where training_step changes the weights:"
                " expected batch_loss(pl_module, batch), the mean loss of a batch"
            )
        return _training_loss

    def _to_loggers(self, trainer: Any) -> Sink:
        def to_loggers(step: int, record: dict[str, float]) -> None:
            # Lightning's loggers count the steps of all optimizers in a batch as one.
            logger_step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics(record), step=logger_step)

        return to_loggers


def _params_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[Tensor]:
    """Return the parameters of ``module`` that ``optimizer`` holds, without frozen ones.

    If all are frozen, as by ``toggle_optimizer`` for another optimizer, return all.
    """
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params: list[Tensor] = [p for p in module.parameters() if id(p) in ids]
    return [p for p in params if p.requires_grad] or params


def _in_precision(trainer: Any, batch_loss: Callable[[Any, Any], Tensor]) -> Any:
    """Return ``batch_loss`` with batches converted to the trainer's precision, as in training."""
    convert = trainer.precision_plugin.convert_input
    return lambda pl_module, batch: batch_loss(pl_module, convert(batch))


def _training_loss(pl_module: Any, batch: Any) -> Tensor:
    """Return the loss of ``training_step`` without logging."""
    step = pl_module.training_step
    arguments = inspect.signature(step).parameters.values()
    takes_index = len(arguments) > 1 or any(a.kind is a.VAR_POSITIONAL for a in arguments)
    with _mute(pl_module):
        output = step(batch, 0) if takes_index else step(batch)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"training_step returned {type(output).__name__} for the probe set: expected a loss, or"
            " a dictionary with the loss as 'loss'; batch_loss= computes it another way"
        )
    return loss


@contextlib.contextmanager
def _mute(pl_module: nn.Module) -> Iterator[None]:
    """Mute ``log`` and ``log_dict`` of all modules, since a measurement is not a step."""
    modules = [module for module in pl_module.modules() if hasattr(type(module), "log_dict")]
    names = ("log", "log_dict")
    former = [{name: vars(m)[name] for name in names if name in vars(m)} for m in modules]
    try:
        for module in modules:
            vars(module).update(dict.fromkeys(names, _ignore))
        yield
    finally:
        for module, attributes in zip(modules, former, strict=True):
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(attributes)


def _no_trainer() -> None:
    return None


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass
