"""Copies and checkpoints of ``stableopt.LBFGS``, also to and from torch's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lbfgs_runs import DIRECTIONS, SEARCHES, closure_of, flat, network, train
from saved import through_file
from torch import Tensor
from torch.distributed import checkpoint
from torch.utils._pytree import tree_flatten, tree_map_only

import stableopt


def assert_same(actual: Any, expected: Any) -> None:
    """Check that nested values have the same structure and are equal, tensors bit for bit."""
    (leaves, shape), (others, other) = tree_flatten(actual), tree_flatten(expected)
    assert shape == other
    for leaf, other_leaf in zip(leaves, others, strict=True):
        assert torch.equal(leaf, other_leaf) if isinstance(leaf, Tensor) else leaf == other_leaf


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
@pytest.mark.parametrize("history_size", [3, 100])
def test_resumed_run_is_the_same_run(
    direction: str, line_search_fn: str | None, history_size: int
) -> None:
    """Catches state missing from the state dict, and a checkpoint that further training changes."""
    options = {
        "direction": direction,
        "line_search_fn": line_search_fn,
        "history_size": history_size,
        "max_iter": 7,
        "lr": 0.5,
    }
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), **options)
    closure = closure_of(model, optimizer)
    for _ in range(2):
        optimizer.step(closure)
    kept = optimizer.state_dict(), copy.deepcopy(model)
    saved = through_file(kept[0], weights_only=True)
    for _ in range(3):
        optimizer.step(closure)
    for state in (saved, kept[0]):
        twin = copy.deepcopy(kept[1])
        resumed = stableopt.LBFGS(twin.parameters())
        resumed.load_state_dict(state)
        for _ in range(3):
            resumed.step(closure_of(twin, resumed))
        assert torch.equal(flat(twin), flat(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_copies_go_on(way: str, direction: str) -> None:
    """Catches what torch's own LBFGS loses: ``_params``, and with it every copy."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), direction=direction, max_iter=6, lr=0.5)
    optimizer.step(closure_of(model, optimizer))
    pair = (model, optimizer)
    if way == "deepcopy":
        twin, copied = copy.deepcopy(pair)
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps(pair))
    else:
        twin, copied = through_file(pair, weights_only=False)
    assert type(copied) is stableopt.LBFGS
    for m, o in (pair, (twin, copied)):
        for _ in range(2):
            o.step(closure_of(m, o))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("way", ["load", "deepcopy", "pickle"])
def test_copies_have_the_same_keys(way: str) -> None:
    """Catches an option that only copies have, such as torch's `differentiable`, which LBFGS lacks."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    optimizer.step(closure_of(model, optimizer))
    state = optimizer.state_dict()
    if way == "load":
        copied = stableopt.LBFGS(network().parameters(), max_iter=3)
        older = copy.deepcopy(state)
        older["param_groups"][0]["differentiable"] = False  # as checkpoints of 0.1 have it
        for loaded in (older, state):
            copied.load_state_dict(loaded)
            assert_same(copied.state_dict(), state)
    else:
        copied = (
            copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
        assert_same(copied.state_dict(), state)
    assert "differentiable" not in copied.defaults
    copied.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    first, second = copied.param_groups
    assert first.keys() == second.keys()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_resumes_the_run(tmp_path: Path) -> None:
    """Catches a key of the loading optimizer that the checkpoint lacks."""
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), lr=0.5, max_iter=3)
    optimizer.step(closure_of(model, optimizer))
    saved = optimizer.state_dict()
    checkpoint.save(_with_names(saved), checkpoint_id=tmp_path)
    # Another state of the same shapes, which loading must overwrite.
    empty = stableopt.LBFGS(network().parameters(), lr=0.25, max_iter=3)
    empty.load_state_dict(tree_map_only(Tensor, torch.zeros_like, saved))
    filled = _with_names(empty.state_dict())
    checkpoint.load(filled, checkpoint_id=tmp_path)
    assert_same(filled, _with_names(saved))
    twin = copy.deepcopy(model)
    resumed = stableopt.LBFGS(twin.parameters())
    resumed.load_state_dict({**filled, "state": {0: filled["state"]["0"]}})
    for m, o in ((model, optimizer), (twin, resumed)):
        o.step(closure_of(m, o))
    assert torch.equal(flat(model), flat(twin))


def _with_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict whose keys are strings, as a distributed checkpoint makes them."""
    return {**state, "state": {str(key): value for key, value in state["state"].items()}}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line_search_fn", SEARCHES)
def test_checkpoints_interchange_with_torch(direction: str, line_search_fn: str | None) -> None:
    """Catches a key that one side lacks, and Gram matrices of pairs that torch has replaced."""
    options = {"line_search_fn": line_search_fn, "max_iter": 4, "lr": 0.5, "history_size": 5}

    def run(kinds: list[Any]) -> Tensor:
        model, state = network(), None
        for kind in kinds:
            extra = {"direction": direction} if kind is stableopt.LBFGS else {}
            optimizer = kind(model.parameters(), **options, **extra)
            if state is not None:
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(state)
                if extra:
                    assert optimizer.param_groups[0]["weight_decay"] == 0
                    optimizer.param_groups[0]["direction"] = direction
                assert groups[0].keys() <= optimizer.param_groups[0].keys()
            optimizer.step(closure_of(model, optimizer))
            state = through_file(optimizer.state_dict(), weights_only=True)
        return flat(model)

    expected = run([torch.optim.LBFGS] * 6)
    for kinds in (
        [torch.optim.LBFGS, torch.optim.LBFGS, stableopt.LBFGS, stableopt.LBFGS] * 2,
        [stableopt.LBFGS, torch.optim.LBFGS] * 3,
    ):
        end = run(kinds[:6])
        if direction == "two_loop":
            assert torch.equal(end, expected)
        else:
            # Twenty-four iterations; see test_compact_is_two_loop_to_rounding.
            torch.testing.assert_close(end, expected, rtol=1e-7, atol=1e-7)


def test_options_may_change_under_way() -> None:
    """Catches a memory that is lost, or of the wrong kind, after its options are changed."""
    options = {"max_iter": 6, "lr": 0.5}
    expected, _, _ = train(stableopt.LBFGS, steps=2, direction="two_loop", **options)
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), **options)
    closure = closure_of(model, optimizer)
    optimizer.step(closure)
    optimizer.param_groups[0]["direction"] = "two_loop"
    optimizer.param_groups[0]["history_size"] = 50
    optimizer.step(closure)
    torch.testing.assert_close(flat(model), expected, rtol=1e-11, atol=1e-11)  # as above
    optimizer.param_groups[0]["history_size"] = 3
    optimizer.step(closure)
    (state,) = optimizer.state_dict()["state"].values()
    assert len(state["old_dirs"]) == 3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("way", ["all", "pairs", "replaced"])
def test_state_that_others_write_counts(direction: str, way: str) -> None:
    """Catches pairs kept outside of ``optimizer.state``, which tools may replace."""
    options = {"direction": direction, "max_iter": 6, "lr": 0.5}
    _, _, other = train(stableopt.LBFGS, steps=1, **options)
    (foreign,) = other.state_dict()["state"].values()
    expected_model, model = network(), network()
    expected = stableopt.LBFGS(expected_model.parameters(), **options)
    actual = stableopt.LBFGS(model.parameters(), **options)
    for m, o in ((expected_model, expected), (model, actual)):
        o.step(closure_of(m, o))
        o.step(closure_of(m, o))
    (replaced,) = expected.state_dict()["state"].values()
    names = ("old_dirs", "old_stps", "ro", "H_diag") if way == "pairs" else tuple(foreign)
    merged = {**replaced, **{name: foreign[name] for name in names if name in foreign}}
    if way == "pairs":
        merged.pop("compact", None)
    expected.load_state_dict({**expected.state_dict(), "state": {0: merged}})
    (first,) = actual.state
    if way == "replaced":
        actual.state[first] = copy.deepcopy(foreign)
    else:
        actual.state[first].update({name: copy.deepcopy(foreign[name]) for name in names})
    for m, o in ((expected_model, expected), (model, actual)):
        o.step(closure_of(m, o))
    assert torch.equal(flat(expected_model), flat(model))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cleared_state_is_a_new_start(direction: str) -> None:
    """Catches pairs that outlive ``optimizer.state.clear()``."""
    options = {"direction": direction, "max_iter": 6, "lr": 0.5}
    model = network()
    optimizer = stableopt.LBFGS(model.parameters(), **options)
    optimizer.step(closure_of(model, optimizer))
    twin = copy.deepcopy(model)
    new = stableopt.LBFGS(twin.parameters(), **options)
    optimizer.state.clear()
    for m, o in ((model, optimizer), (twin, new)):
        o.step(closure_of(m, o))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_state_cast_with_the_model_goes_on(direction: str) -> None:
    """Catches pairs left in the old dtype where a tool casts or moves all tensors of the state."""
    model = network(torch.float32)
    optimizer = stableopt.LBFGS(model.parameters(), direction=direction, max_iter=6, lr=0.5)
    before = optimizer.step(closure_of(model, optimizer))
    model.double()
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.double()
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.step(closure_of(model, optimizer)) < before
    (state,) = optimizer.state_dict()["state"].values()
    assert {pair.dtype for pair in state["old_dirs"]} == {torch.float64}
    assert len(state["old_dirs"]) > 6  # those of the first step are kept
