"""`StabilityCallback` for ``transformers.Trainer``: stability margins in its log.

Three examples::

    StabilityCallback(probe_set, every=50).attach(trainer)              # margins next to the losses
    StabilityCallback(probe_set, every=50, sinks=[JSONLinesSink(path)]).attach(trainer)
    Trainer(callbacks=[StabilityCallback(probe_set, every=50)], ...)    # in state.log_history alone

A callback does not know its trainer, and the trainer's reporters run before it. Margins reach
TensorBoard, Weights & Biases and other reporters only through :meth:`StabilityCallback.attach`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stableopt.integrations._callback import Tracked
from stableopt.monitor.monitor import StabilityMonitor

try:
    _transformers: Any = importlib.import_module("transformers")
except ModuleNotFoundError as error:
    raise ImportError(
        "StabilityCallback needs transformers: pip install stableopt[transformers]"
    ) from error

__all__ = ["StabilityCallback"]

_PROBE_BATCH = 32
"""Samples of a data set collated into one batch, each padded to the longest."""


class StabilityCallback(Tracked, _transformers.TrainerCallback):  # type: ignore[misc]
    """Measures the stability margins while a ``transformers.Trainer`` trains.

    The run is bit for bit the run without it. Every finite number of a record is logged as
    ``<prefix>/<name>`` at the step of its measurement. Each checkpoint folder gets the monitor's
    state as ``stability.pt`` (with another prefix ``stability-<prefix>.pt``), and a resumed run
    measures as if it had not stopped. (The trainer's own mechanism, ``ExportableState``, rebuilds a
    callback from what JSON can hold, and is off by default.) If nothing can be measured, there is an
    error before the first step; a measurement that fails later is recorded, and training continues.

    Args:
        data: the probe set, on which curvature is measured: a batch as the model takes it, a
            ``DataLoader``, a list of batches; or a ``Dataset`` of torch or Hugging Face, such as the
            trainer's training set, collated as that is. Where several processes train, this one's shard.
        batch_loss: ``batch_loss(model, batch)``, the mean loss of a batch. By default the model's own,
            as ``Trainer`` takes it.
        prefix: prefix of the logged names, and part of the file name in the checkpoint.
        resume_from_checkpoint: the folder passed to ``trainer.train``, where it is not in the
            trainer's own ``output_dir``.
        sinks: callables that take ``(step, record)``, in addition to the trainer's log.
        recorder: the folder for the reports of a :class:`~stableopt.FlightRecorder`, if any.
        **options: further options of :class:`~stableopt.StabilityMonitor`: ``every`` or
            ``max_overhead``, ``quantities``, ``update_rule``, ``params``, ``dataset_size``,
            ``chunk_size`` and the others.

    Attributes:
        monitor: the :class:`~stableopt.StabilityMonitor` of the latest ``train``, or ``None``.
        recorder: the flight recorder of the latest run, or ``None``.

    Raises:
        TypeError: without a probe set, and as ``StabilityMonitor`` does when training starts.
        ValueError: when training starts: without ``batch_loss`` where the trainer has a loss of its own
            (only an attached callback sees ``compute_loss`` and ``compute_loss_func``), and as
            ``StabilityMonitor`` does.

    >>> StabilityCallback({"input_ids": torch.zeros(4, 2)}, every=10).margins is None
    True
    """

    def __init__(
        self,
        data: Any,
        batch_loss: Callable[[Any, Any], Tensor] | None = None,
        *,
        resume_from_checkpoint: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, batch_loss, **options)
        self._resume_from = resume_from_checkpoint
        self._records: list[dict[str, float]] = []
        self._trainer: Callable[[], Any] = lambda: None

    def attach(self, trainer: Any) -> StabilityCallback:
        """Join the callbacks of ``trainer``, and log through it; return the callback.

        An error in ``trainer.train`` then also closes the recorder, which reports what it has seen.
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"trainer={trainer!r}: expected a transformers.Trainer")
        there = trainer.callback_handler.callbacks
        others = [c for c in there if isinstance(c, StabilityCallback) and c is not self]
        if any(c._file == self._file for c in others):
            raise ValueError(f"prefix={self._prefix!r} is that of another callback of the trainer")
        if self not in there:
            trainer.add_callback(self)
        if self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)  # which holds the callback
            trainer.train = self._closing(trainer.train)
        return self

    def _closing(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``train``, which has no event for an error, with one: the recorder looks once more."""

        @functools.wraps(train)
        def closing(*args: Any, **kwargs: Any) -> Any:
            try:
                return train(*args, **kwargs)
            except BaseException:
                self._close()
                raise

        return closing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor, now that optimizer and checkpoint are ready."""
        self._close()
        self._records = []
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._start(
            kwargs["optimizer"],
            kwargs["model"],
            self._loss_of(args),
            self._probe(kwargs.get("train_dataloader")),
            lambda step, record: self._records.append(record),
            state.global_step,
            lambda monitor: self._load(monitor, args, state) if state.global_step else None,
            process_group=dist.group.WORLD if several else None,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was measured in the step."""
        records, self._records = self._records, []
        for record in records:
            logs = self._named(record)
            trainer = self._trainer()
            if trainer is None:
                epoch = {} if state.epoch is None else {"epoch": state.epoch}
                state.log_history.append({**logs, **epoch, "step": state.global_step})
                continue
            # Logging resets the request to log, and the loss still needs it.
            asked = control.should_log
            try:
                trainer.log(logs)
            except Exception as error:  # showing a measurement must not end the training
                _warn(f"logging margins failed: {type(error).__name__}: {error}")
            finally:
                control.should_log = trainer.control.should_log = asked

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the monitor's state into the checkpoint just saved."""
        if self.monitor is None or args.save_only_model or not state.is_world_process_zero:
            return
        path = self._own_folder(args, state) / self._file
        try:
            # Atomically: a resumed run could not read half a file.
            torch.save(self._saved(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        except (OSError, RuntimeError) as error:
            _warn(f"the state of the margins was not saved to {path}: {error}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def _load(self, monitor: StabilityMonitor, args: Any, state: Any) -> None:
        named = [self._resume_from, getattr(args, "resume_from_checkpoint", None)]
        folders = [Path(name) for name in named if isinstance(name, (str, Path))]
        folders.append(self._own_folder(args, state))
        paths = [folder / self._file for folder in folders]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            _warn(
                f"the run resumes at step {state.global_step} without a state of the margins: found"
                f" none of {', '.join(map(str, paths))}. Their history begins here"
            )
            return
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            self._restore(monitor, kept)
        except Exception as error:  # a broken file must not stop training
            _warn(f"{path} was not read ({type(error).__name__}: {error}): the history begins here")

    @property
    def _file(self) -> str:
        # With any prefix another name than the trainer's own files, such as optimizer.pt.
        own = "".join(c if c.isalnum() or c in "-_" else "_" for c in self._prefix)
        return "stability.pt" if own == "stability" else f"stability-{own}.pt"

    @staticmethod
    def _own_folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _loss_of(self, args: Any) -> Callable[[Any, Any], Tensor]:
        if self._batch_loss is not None:
            return self._batch_loss
        trainer = self._trainer()
        others = {
            "label_smoothing_factor": args.label_smoothing_factor,
            "compute_loss_func": getattr(trainer, "compute_loss_func", None),
            "compute_loss": trainer is not None
            and type(trainer).compute_loss is not _transformers.Trainer.compute_loss,
        }
        found = [name for name, other in others.items() if other]
        if found:
            raise ValueError(
                "batch_loss=None, and the trainer does not train the model's own loss, but has its"
                f" {found[0]}: expected batch_loss(model, batch)"
            )
        return _models_loss

    def _probe(self, train_dataloader: Any) -> Any:
        data = self._data
        collate = getattr(train_dataloader, "collate_fn", None)
        batches = (IterableDataset, DataLoader, Mapping, Tensor, list, tuple)
        own = (
            getattr(train_dataloader, "dataset", None),
            getattr(self._trainer(), "train_dataset", None),
        )
        # A data set of Hugging Face is not a torch Dataset.
        by_row = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        if any(data is each for each in own) or (by_row and not isinstance(data, batches)):
            return DataLoader(data, batch_size=_PROBE_BATCH, collate_fn=collate)
        return data


def _models_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that the model computes from the labels in the batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"data: a batch is a {type(batch).__name__}, expected a dictionary of what the model"
            " takes; batch_loss= computes the loss from others"
        )
    outputs = model(**batch)
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
        found = list(outputs)
    else:
        loss, found = outputs[0], [type(output).__name__ for output in outputs]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model returned no loss for the probe set, but {found}: its batches have"
            f" {list(batch)}, expected labels among them, or batch_loss="
        )
    return loss


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
