"""Parameters under ``fully_shard``: their mesh, their local shards, resharding."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["in_half", "local", "mesh_of", "reshard"]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, or an ordinary tensor itself.

    >>> import torch
    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    sharded: Any = tensor
    return sharded.to_local() if _is_sharded(tensor) else tensor


def mesh_of(model: nn.Module) -> Any:
    """Return the device mesh on which ``fully_shard`` put the trainable parameters of ``model``.

    ``None`` for ordinary parameters. Parameters that a forward pass has gathered are freed.

    Raises:
        TypeError: for parameters that are sharded differently, or only in part.
    """
    reshard(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "model is wrapped by FullyShardedDataParallel: expected"
            " torch.distributed.fsdp.fully_shard, whose parameters keep their names and shapes"
        )
    sharded = [(name, p) for name, p in trainable if _is_sharded(p)]
    if not sharded:
        return None
    owned = {id(p) for unit in _units(model) for p in unit.parameters()}
    first: Any = sharded[0][1]
    for name, p in trainable:
        dtensor: Any = p
        if not _is_sharded(p):
            raise TypeError(
                f"parameter {name!r} is whole on every rank, but {sharded[0][0]!r} is sharded: expected"
                " all trainable parameters under fully_shard; freeze it, or shard the root module too"
            )
        mesh, placements = dtensor.device_mesh, tuple(dtensor.placements)
        if id(p) not in owned or mesh.ndim != 1 or not placements[0].is_shard():
            raise TypeError(
                f"parameter {name!r} is a DTensor with placements {placements} on a mesh of"
                f" dimensions {mesh.mesh_dim_names or mesh.ndim}: expected fully_shard on a mesh of one"
                " dimension. Tensor-parallel parameters and replicated shards cannot be measured;"
                " measure a copy of the model that has neither"
            )
        if mesh != first.device_mesh:
            raise TypeError(
                f"parameter {name!r} is on another device mesh than {sharded[0][0]!r}: expected one"
            )
    return first.device_mesh


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters that FSDP's root keeps after a forward pass without a backward pass.

    Otherwise a later pass would use them instead of values written to the shards.
    """
    for module in _units(model):
        module.reshard()


def in_half(model: nn.Module) -> bool:
    """Return whether FSDP runs a part of ``model`` in half precision."""
    # The only access to a unit's policy; an unknown policy counts as full precision.
    states = [getattr(unit, "_get_fsdp_state", lambda: None)() for unit in _units(model)]
    policies = [getattr(state, "_mp_policy", None) for state in states]
    half = (torch.bfloat16, torch.float16)
    return any(getattr(policy, "param_dtype", None) in half for policy in policies)


def _is_sharded(tensor: Tensor) -> bool:
    # No import, which takes a second: if the module is not loaded, no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _units(model: nn.Module) -> Iterator[Any]:
    """Yield the modules under ``fully_shard``."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            yield module
