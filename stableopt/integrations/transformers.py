"""`StabilityCallback` for ``transformers.Trainer``: stability margins in its log.

Three examples::

    StabilityCallback(probe_set, every=50).attach(trainer)              # margins next to the losses
    StabilityCallback(probe_set, every=50, sinks=[JSONLinesSink(path)]).attach(trainer)
    Trainer(callbacks=[StabilityCallback(probe_set, every=50)], ...)    # only in state.log_history

A callback has no reference to its trainer, and the trainer's reporters run before it. So margins reach
TensorBoard, Weights & Biases and other reporters only after :meth:`StabilityCallback.attach`.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stableopt._support.arguments import shown
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
"""Samples of a data set in one batch, padded to the longest of them."""


class StabilityCallback(Tracked, _transformers.TrainerCallback):  # type: ignore[misc]
    """Measures the stability margins while a ``transformers.Trainer`` trains.

    Training with the callback is bit for bit the training without it. Every finite number of a record
    is logged as ``<prefix>/<name>`` at the step of its measurement. Each checkpoint folder gets the
    monitor's state as ``stability.pt`` (with another prefix ``stability-<prefix>.pt``), so a resumed run
    measures as an uninterrupted one. (The trainer's own mechanism, ``ExportableState``, is off by
    default and restores only what JSON can hold.) If nothing can be measured, there is an error
    before the first step; a measurement that fails later is recorded, and training continues.

    Args:
        data: the probe set, on which curvature is measured: a batch as the model takes it, a
            ``DataLoader``, a list of batches; or a ``Dataset`` of torch or Hugging Face, such as the
            trainer's training set, which is collated like it. In a distributed run, this rank's shard.
        batch_loss: ``batch_loss(model, batch)``, the mean loss of a batch. By default the loss that the
            model returns, as in ``Trainer``.
        prefix: prefix of the logged names, and part of the file name in the checkpoint.
        resume_from_checkpoint: the folder passed to ``trainer.train``, if it is outside the
            trainer's ``output_dir``.
        sinks: callables that take ``(step, record)``, in addition to the trainer's log.
        recorder: the folder for the reports of a :class:`~stableopt.FlightRecorder`, or ``None`` for no
            recorder.
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
        """Add this callback to ``trainer``, and log through it; return the callback.

        An error in ``trainer.train`` then also closes the recorder, which writes a last report if its
        rules give an alarm.
        """
        if not hasattr(trainer, "callback_handler"):
            raise TypeError(f"trainer={shown(trainer)}: expected a transformers.Trainer")
        callbacks = trainer.callback_handler.callbacks
        others = [c for c in callbacks if isinstance(c, StabilityCallback) and c is not self]
        if any(other._file == self._file for other in others):
            raise ValueError(
                f"prefix={self._prefix!r} is that of another callback of the trainer: pass another one"
            )
        if self not in callbacks:
            trainer.add_callback(self)
        if self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)  # weak, since the trainer holds the callback
            trainer.train = self._closing(trainer.train, self._trainer)
        return self

    def _closing(self, train: Callable[..., Any], trainer: Callable[[], Any]) -> Callable[..., Any]:
        """Return ``train`` wrapped so that an error closes the monitor; callbacks have no such event.

        Several trainers may hold the callback: it logs through the one that trains.
        """

        @functools.wraps(train)
        def closing(*args: Any, **kwargs: Any) -> Any:
            self._trainer = trainer
            try:
                return train(*args, **kwargs)
            except BaseException:
                self._close()
                raise

        return closing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the monitor, now that optimizer and checkpoint are ready."""
        self._close()
        self._records = []
        probe = self._probe_set(args, kwargs.get("train_dataloader"))
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._start(
            kwargs["optimizer"],
            kwargs["model"],
            self._loss_of(args),
            probe,
            lambda step, record: self._records.append(record),
            state.global_step,
            lambda monitor: self._load(monitor, args, state) if state.global_step else None,
            process_group=dist.group.WORLD if distributed else None,
        )
        if probe is not self._data:
            self._check_samples(probe)

    def _check_samples(self, probe: DataLoader[Any]) -> None:
        """Warn if the collator made fewer samples than rows, so that training counts other samples."""
        assert self.monitor is not None
        data: Any = probe.dataset
        if not hasattr(data, "__len__"):  # streamed
            return
        rows = min(len(data), self._options.get("max_samples") or sys.maxsize)
        samples = self.monitor.problem.own_samples
        if samples < rows and probe.batch_size == _PROBE_BATCH:
            _warn(
                f"the trainer's collator makes {samples} samples of {rows} rows, in batches of"
                f" {_PROBE_BATCH} rows: limits that depend on the batch size are not those of training."
                " Pass a DataLoader as data, with the batch size of a device"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the measurements of the step."""
        records, self._records = self._records, []
        for record in records:
            logs = self._metrics(record)
            trainer = self._trainer()
            if trainer is None:
                epoch = {} if state.epoch is None else {"epoch": state.epoch}
                state.log_history.append({**logs, **epoch, "step": state.global_step})
                continue
            # trainer.log resets should_log, by which the trainer logs the loss afterwards.
            should_log = control.should_log
            try:
                trainer.log(logs)
            except Exception as error:  # a logging error must not end the training
                _warn(f"logging margins failed: {type(error).__name__}: {error}")
            finally:
                control.should_log = trainer.control.should_log = should_log

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the monitor's state into the checkpoint just saved."""
        if self.monitor is None or args.save_only_model or not state.is_world_process_zero:
            return
        path = self._checkpoint_folder(args, state) / self._file
        try:
            # The rename is atomic: a killed process leaves no partial file of this name.
            torch.save(self._saved_state(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        except (OSError, RuntimeError) as error:
            _warn(f"the state of the margins was not saved to {path}: {error}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the monitor; its history remains."""
        self._close()

    def _load(self, monitor: StabilityMonitor, args: Any, state: Any) -> None:
        given = [self._resume_from, getattr(args, "resume_from_checkpoint", None)]
        folders = [Path(name) for name in given if isinstance(name, (str, Path))]
        folders.append(self._checkpoint_folder(args, state))
        paths = [folder / self._file for folder in folders]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            _warn(
                f"the run resumes at step {state.global_step} without a state of the margins: found"
                f" none of {', '.join(map(str, paths))}. Their history begins here"
            )
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self._restore(monitor, saved)
        except Exception as error:  # a broken file must not stop training
            _warn(f"{path} was not read ({type(error).__name__}: {error}): the history begins here")

    @property
    def _file(self) -> str:
        # No prefix gives the name of a file of the trainer, such as optimizer.pt.
        prefix = "".join(c if c.isalnum() or c in "-_" else "_" for c in self._prefix)
        return "stability.pt" if prefix == "stability" else f"stability-{prefix}.pt"

    @staticmethod
    def _checkpoint_folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _loss_of(self, args: Any) -> Callable[[Any, Any], Tensor]:
        if self._batch_loss is not None:
            return self._batch_loss
        trainer = self._trainer()
        base = _transformers.Trainer
        changes_loss = {
            "label_smoothing_factor": args.label_smoothing_factor,
            "compute_loss_func": getattr(trainer, "compute_loss_func", None),
            "compute_loss": trainer is not None
            and type(trainer).compute_loss is not base.compute_loss,
        }
        for name, changes in changes_loss.items():
            if changes:
                raise ValueError(
                    "batch_loss=None, and the trainer does not train the model's own loss, but has its"
                    f" {name}: expected batch_loss(model, batch)"
                )
        return _models_loss

    def _probe_set(self, args: Any, train_dataloader: Any) -> Any:
        """Return the data; a data set of rows becomes a loader that collates like the trainer's."""
        data = self._data
        training_sets = (
            getattr(train_dataloader, "dataset", None),
            getattr(self._trainer(), "train_dataset", None),
        )
        is_training_set = any(data is training_set for training_set in training_sets)
        # The rows are recognized by their methods: a Hugging Face data set is not a torch Dataset.
        has_rows = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        is_batches = isinstance(data, (IterableDataset, DataLoader, Mapping, Tensor, list, tuple))
        if is_training_set or (has_rows and not is_batches):
            collate = getattr(train_dataloader, "collate_fn", None)
            # A collator that joins a batch into one row makes one sample of it, in training too.
            joined = args.per_device_train_batch_size if _joins_rows(collate) else _PROBE_BATCH
            return DataLoader(data, batch_size=joined, collate_fn=collate)
        return data


def _joins_rows(collate: Any) -> bool:
    """Return whether a collator joins the rows of a batch into one, without padding."""
    collate = getattr(collate, "data_collator", collate)  # the trainer's, which drops columns
    flattening = getattr(_transformers, "DataCollatorWithFlattening", ())
    return isinstance(collate, flattening) or bool(getattr(collate, "padding_free", False))


def _models_loss(model: Any, batch: Any) -> Tensor:
    """Return the loss that the model computes from the labels in the batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"data: a batch is a {type(batch).__name__}, expected a dictionary of the model's arguments;"
            " pass batch_loss= for other batches"
        )
    outputs = model(**batch)
    if isinstance(outputs, Mapping):
        loss, returned = outputs.get("loss"), list(outputs)
    else:
        loss, returned = outputs[0], [type(output).__name__ for output in outputs]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model returned no loss for the probe set, but {returned}: its batches have"
            f" {list(batch)}, expected labels among them, or batch_loss="
        )
    return loss


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
