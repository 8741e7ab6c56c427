"""Readers of clipped updates, modes and options, which repeated steps on a quadratic do not test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import StabilityMonitor, UpdateRule, measure

SHAPES = ((4, 3), (4,))


def needs(package: str) -> Any:
    """Return the package, or skip the test."""
    return pytest.importorskip(package, reason=f"needs {package}")


def stepped(
    make: Callable[[Any], torch.optim.Optimizer], steps: int, *, size: float = 1.0
) -> tuple[torch.optim.Optimizer, Tensor, Tensor]:
    """Take ``steps`` with random gradients; return the last step, and its gradients."""
    torch.manual_seed(0)
    params = [nn.Parameter(size * torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    optimizer = make(params)
    for step in range(1, steps + 1):  # gradients that grow, which is clipped
        gradients = [step * torch.randn(p.shape, dtype=torch.float64) for p in params]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        before = torch.cat([p.detach().reshape(-1).clone() for p in params])
        optimizer.step()
    after = torch.cat([p.detach().reshape(-1) for p in params])
    decay = optimizer.param_groups[0].get("weight_decay", 0.0)
    lr = optimizer.param_groups[0]["lr"] or 0.0
    return (
        optimizer,
        after - (1 - lr * decay) * before,
        torch.cat([g.reshape(-1) for g in gradients]),
    )


CLIPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rms of the parameters": ("torch.optim", "Adafactor", {"lr": 0.05}),
    "large parameters, decay": ("torch.optim", "Adafactor", {"lr": 0.05, "weight_decay": 0.5}),
    "small threshold": ("torch.optim", "Adafactor", {"lr": 0.2, "d": 1.2, "foreach": False}),
    "1 over the root of t": ("torch.optim", "Adafactor", {"lr": 0.9}),
    "the default": ("transformers", "Adafactor", {}),
    "warm-up": ("transformers", "Adafactor", {"warmup_init": True}),
    "as Trainer": (
        "transformers",
        "Adafactor",
        {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "clip_threshold": 0.5},
    ),
    "Adadelta": ("torch.optim", "Adadelta", {"lr": 0.5, "rho": 0.7}),
}


@pytest.mark.parametrize(("lr", "decay"), [(1.0, 0.1), (1.0, 1.0), (10.0, 3.0)])
def test_adadelta_decays_the_parameter_before_the_step(lr: float, decay: float) -> None:
    """Catches decay of the parameter after the step, with which P is off by up to 0.16 % here."""
    torch.manual_seed(0)
    p, curvature = nn.Parameter(torch.randn(6).double()), torch.rand(6).double() * 3 + 0.5
    optimizer = torch.optim.Adadelta([p], lr=lr, weight_decay=decay)
    for _ in range(30):
        before = p.detach().clone()
        p.grad = curvature * before
        optimizer.step()
    gradient = (curvature + decay) * before
    (entries,) = UpdateRule.from_optimizer(optimizer).preconditioner.entries
    # Rounding of the difference of two parameters, over a small step.
    torch.testing.assert_close(entries, (before - p.detach()) / (lr * gradient), rtol=1e-11, atol=0)


def test_an_adafactor_step_as_large_as_the_parameters_is_unknown() -> None:
    """Catches a size before the step that is a guess: with rates of 1 or more it was off by 2.6."""
    for lr, known in ((0.9, True), (1.0, False), (2.0, False)):
        p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        optimizer = torch.optim.Adafactor([p], lr=lr)
        before = p.detach().clone()
        p.grad = before.clone()
        optimizer.step()
        rule = UpdateRule.from_optimizer(optimizer)
        assert (rule.unknown is None) is known
        if known:
            (entries,) = rule.preconditioner.entries
            torch.testing.assert_close(entries, (before - p.detach()) / (lr * p.grad))
        else:
            assert "a step as large as a parameter" in str(rule.unknown)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("case", CLIPPED)
def test_the_real_step_is_the_preconditioner_times_the_gradient(case: str, steps: int) -> None:
    """Catches a clipping or a scale that a repeated step near the minimum does not have, as both are 1
    there: Adafactor's depend on gradients and parameters, Adadelta's on its own last step.
    """
    package, kind, options = CLIPPED[case]
    optimizer_class = getattr(needs(package), kind)
    optimizer, step, gradient = stepped(
        lambda params: optimizer_class(params, **options), steps, size=3.0
    )
    rule = UpdateRule.from_optimizer(optimizer)
    assert rule.preconditioner is not None
    predicted = -rule.lr * (rule.preconditioner @ gradient)
    # The parameters before a step follow from those after it to rounding.
    assert float((step - predicted).norm() / step.norm()) < 1e-10


@pytest.mark.parametrize("package", ["torch.optim", "transformers"])
def test_adafactor_without_gradients_is_not_known(package: str) -> None:
    """Catches a clipping of 1 assumed where the gradient that decides is gone."""
    optimizer_class = needs(package).Adafactor
    optimizer, _, _ = stepped(lambda params: optimizer_class(params), 3)
    assert UpdateRule.from_optimizer(optimizer).unknown is None
    optimizer.zero_grad()
    assert "scales its update by the gradient" in str(UpdateRule.from_optimizer(optimizer).unknown)


def test_schedule_free_modes() -> None:
    """Catches margins of the averages x against the limit of y, and a limit where nothing moves."""
    schedulefree = needs("schedulefree")
    for kind in (
        schedulefree.SGDScheduleFree,
        schedulefree.AdamWScheduleFree,
        schedulefree.RAdamScheduleFree,
    ):
        params = [nn.Parameter(torch.ones(2))]
        optimizer = kind(params, lr=0.1)
        fresh = UpdateRule.from_optimizer(optimizer)
        assert fresh.lr == 0.1
        # Before the first step c is 1, and y moves as in plain descent.
        assert fresh.momentum == 0
        optimizer.train()
        for _ in range(3):
            params[0].grad = torch.ones(2)
            optimizer.step()
        trained_rule = UpdateRule.from_optimizer(optimizer)
        if kind is schedulefree.RAdamScheduleFree:
            assert "does not move the parameters" in str(trained_rule.unknown)
            continue
        assert trained_rule.momentum == pytest.approx(2 / 3)
        optimizer.eval()
        assert "call optimizer.train()" in str(UpdateRule.from_optimizer(optimizer).unknown)
        optimizer.train()
        assert UpdateRule.from_optimizer(optimizer).max_sharpness == trained_rule.max_sharpness


def test_schedule_free_limit_tends_to_that_of_the_gradients_share() -> None:
    """Catches the roles of x and z exchanged: the limit is 2 / ((1 - beta) gamma) for small c."""
    schedulefree = needs("schedulefree")
    optimizer = schedulefree.SGDScheduleFree([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    optimizer.train()
    optimizer.param_groups[0].update(
        k=10**9, weight_sum=0.1**2 * 10**9, lr_max=0.1, scheduled_lr=0.1
    )
    assert UpdateRule.from_optimizer(optimizer).max_sharpness == pytest.approx(200, rel=1e-6)


UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "AdEMAMix": ("AdEMAMix", {"cautious": True}, "cautious=True"),
    "Adan": ("Adan", {"use_gc": True}, "use_gc=True"),
    "SOAP": ("SOAP", {"normalize_gradient": True}, "normalize_gradient=True"),
    "SOAP, merged": ("SOAP", {"merge_dims": True}, "merge_dims=True"),
    "Prodigy": ("Prodigy", {"eps": None}, "eps=None"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_options_that_change_the_step_are_not_read(case: str) -> None:
    """Catches the default step's limit where options change the step."""
    kind, options, message = UNREAD[case]
    optimizer_class = getattr(needs("pytorch_optimizer"), kind)
    rule = UpdateRule.from_optimizer(optimizer_class([nn.Parameter(torch.ones(2, 2))], **options))
    assert message in str(rule.unknown)


def test_filters_of_groups_that_differ_have_no_limit() -> None:
    """Catches one group's filter, or the decay of its filtered step, taken for that of all."""
    adan = needs("pytorch_optimizer").Adan
    first_param, second_param = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def unknown(optimizer: torch.optim.Optimizer) -> str:
        for p in (first_param, second_param):
            p.grad = torch.ones(2)
        optimizer.step()
        return str(UpdateRule.from_optimizer(optimizer).unknown)

    def groups(**options: Any) -> list[dict[str, Any]]:
        return [{"params": [first_param]}, {"params": [second_param], **options}]

    assert "different filters of the gradients" in unknown(adan(groups(betas=(0.9, 0.9, 0.9))))
    apart = adan(groups(weight_decay=0.1), weight_decouple=True)
    assert "different decoupled weight decay" in unknown(apart)


def test_sophia_does_not_react_where_it_clips() -> None:
    """Catches curvature counted in directions that a small change of the gradient does not move."""
    sophia = needs("pytorch_optimizer").SophiaH
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = sophia([p], lr=0.1, p=0.5, betas=(0.0, 0.0))
    p.grad = torch.tensor([1.0, 0.1, 1.0], dtype=torch.float64)
    optimizer.step(hessian=[torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)])
    entries = UpdateRule.from_optimizer(optimizer).preconditioner @ torch.ones(3).double()  # type: ignore[operator]
    assert entries.tolist() == [0.0, 1.0, 0.25]


def test_prodigy_reads_the_distance(data: tuple[Tensor, Tensor], network: nn.Module) -> None:
    """Catches the initial estimate of the distance in a limit that is inversely proportional to it."""
    prodigy = needs("pytorch_optimizer").Prodigy
    optimizer = prodigy(network.parameters(), d0=1e-4)
    for _ in range(20):
        optimizer.zero_grad()
        nn.MSELoss()(network(data[0]), data[1]).backward()
        optimizer.step()
    rule = UpdateRule.from_optimizer(optimizer)
    assert rule.lr == optimizer.param_groups[0]["d"] > 1e-3
    assert rule.max_sharpness == pytest.approx(38 / rule.lr)


def test_a_monitor_follows_filters_and_schedule_free_optimizers(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a reader that works on a state alone, and not in the hook of a real run."""
    schedule_free, adan = needs("schedulefree").AdamWScheduleFree, needs("pytorch_optimizer").Adan
    for optimizer in (
        schedule_free(network.parameters(), lr=1e-3),
        adan(network.parameters(), lr=1e-3),
    ):
        if isinstance(optimizer, schedule_free):
            optimizer.train()
        with StabilityMonitor(optimizer, network, nn.MSELoss(), data, every=2) as monitor:
            for _ in range(4):
                optimizer.zero_grad()
                nn.MSELoss()(network(data[0]), data[1]).backward()
                optimizer.step()
        assert [m.step for m in monitor.history] == [2, 4]
        for margins in monitor.history:
            assert margins.failure is None
            assert margins.preconditioned_sharpness_ratio is not None


@pytest.mark.filterwarnings("ignore")  # both packages warn where an accelerator is missing
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW", "PagedAdamW8bit"])
@pytest.mark.parametrize("shape", [(8, 3), (64, 64)])
def test_bitsandbytes_of_8_bits(kind: str, shape: tuple[int, int]) -> None:
    """Catches codes taken for second moments, or scales of the wrong block, by steps in float32."""
    bits = needs("bitsandbytes")
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = [
        getattr(bits.optim, kind)([ps[0]], lr=0.1, weight_decay=0.5),
        torch.optim.AdamW([ps[1]], lr=0.1, weight_decay=0.5),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for p, optimizer in zip(ps, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    eight_bits, exact = (UpdateRule.from_optimizer(optimizer) for optimizer in optimizers)
    assert eight_bits.max_sharpness == pytest.approx(exact.max_sharpness)
    _agree(eight_bits, exact, shape, rounded="8bit" in kind and shape[0] == 64)


def _agree(
    eight_bits: UpdateRule, exact: UpdateRule, shape: tuple[int, int], *, rounded: bool
) -> None:
    assert eight_bits.preconditioner is not None
    assert exact.preconditioner is not None
    ones = torch.ones(shape[0] * shape[1])
    error = ((eight_bits.preconditioner @ ones) / (exact.preconditioner @ ones) - 1).abs()
    # Eight bits resolve a second moment to about 2 %, the smallest less well.
    assert float(error.median()) < (2e-2 if rounded else 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AdamW8bit", "Adam8bit"])
@pytest.mark.parametrize("shape", [(8, 3), (64, 64)])
def test_torchao_of_8_bits(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the decay of Adam8bit decoupled, or that of AdamW8bit coupled, and codes for moments."""
    kinds = needs("torchao.optim")
    # No compiler is needed.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    twin = torch.optim.AdamW if kind == "AdamW8bit" else torch.optim.Adam
    optimizers = [
        getattr(kinds, kind)([ps[0]], lr=0.1, weight_decay=0.5),
        twin([ps[1]], lr=0.1, weight_decay=0.5),
    ]
    for _ in range(5):
        gradient = torch.randn(shape)
        for p, optimizer in zip(ps, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    eight_bits, exact = (UpdateRule.from_optimizer(optimizer) for optimizer in optimizers)
    assert eight_bits.max_sharpness == pytest.approx(exact.max_sharpness)
    assert eight_bits.weight_decay == exact.weight_decay
    _agree(eight_bits, exact, shape, rounded=shape[0] == 64)


def test_classes_are_known_by_name_without_their_package() -> None:
    """Catches a reader that imports what it reads."""

    class Adan(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.zeros(1)], {"lr": 0.1})

    Adan.__module__, Adan.__qualname__ = "pytorch_optimizer.optimizer.adan", "Adan"
    kind, reader = UpdateRule.reader_of(Adan)
    assert kind is Adan
    assert reader is not None
    assert importlib.import_module(reader.__module__).__name__.endswith("readers.pytorch_optimizer")


def test_measures_with_a_muon_beside_it_are_not_refused(data: tuple[Tensor, Tensor]) -> None:
    """Catches a TypeError for a sign method: its margins are the sharpness, without a limit."""
    lion = needs("pytorch_optimizer").Lion
    model = nn.Linear(3, 2).double()
    with pytest.warns(RuntimeWarning, match="generalised_sharpness"):
        margins = measure(
            model,
            nn.MSELoss(),
            (data[0], torch.zeros(7, 2).double()),
            optimizer=lion(model.parameters()),
        )
    assert margins.sharpness is not None
    assert margins.edge_ratio is None


@pytest.mark.parametrize("kind", ["RAdam", "Adamax", "Adadelta", "ASGD"])
def test_complex_parameters_are_read_as_their_real_view(kind: str) -> None:
    """Catches the root of a complex number where torch takes that of each part."""
    torch.manual_seed(0)
    complex_param = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    real_param = nn.Parameter(torch.view_as_real(complex_param.detach()).clone())
    optimizers = [getattr(torch.optim, kind)([p]) for p in (complex_param, real_param)]
    for _ in range(8):
        complex_param.grad = torch.randn(3, 2, dtype=torch.complex128)
        real_param.grad = torch.view_as_real(complex_param.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    rules = [UpdateRule.from_optimizer(optimizer) for optimizer in optimizers]
    entries = [rule.preconditioner.entries[0] for rule in rules]  # type: ignore[union-attr]
    assert torch.equal(*entries)


@pytest.mark.parametrize("name", ["Lion", "AdaBelief", "Lamb"])
def test_ascent_that_the_optimizer_says_once_is_read(name: str) -> None:
    """Catches the Hessian of the loss for that of its negative, where no group has ``maximize``."""
    kind = getattr(needs("pytorch_optimizer"), name)
    params = [nn.Parameter(torch.ones(2))]
    assert UpdateRule.from_optimizer(kind(params, lr=0.1, maximize=True)).maximize
    assert not UpdateRule.from_optimizer(kind(params, lr=0.1)).maximize


@pytest.mark.parametrize("option", ["cautious", "use_gc"])
def test_options_that_make_lion_another_step_are_named(option: str) -> None:
    """Catches the norm of sign descent for steps that are not signs."""
    lion = needs("pytorch_optimizer").Lion(
        [nn.Parameter(torch.ones(2, 2))], lr=0.1, **{option: True}
    )
    rule = UpdateRule.from_optimizer(lion)
    assert rule.norm is None
    assert rule.unknown is not None
    assert f"{option}=True" in rule.unknown
