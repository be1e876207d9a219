"""Every optimizer class: against the spec to the bit, against torch's own, against the formulas of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optimizers import CLASSES, RULES, Calls, assert_same, make, parameter, set_grad, tensors
from tools import cpu_variants
from torch import Tensor, nn

import polybit
from polybit import optim
from polybit.backends import last_backend, resolve

Step = Callable[[Tensor, Tensor], None]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of 1000 elements are paged too."""
    monkeypatch.setattr(optim.paging, "PAGED_NUMEL", 1000)


def mixed_params() -> list[nn.Parameter]:
    """Large enough for 8 bits with a short last block, and small; of every dtype."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [parameter(70, 100, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)] + [parameter(33, seed=9)]


def three_steps(name: str, options: dict[str, Any]) -> list[Tensor]:
    params = mixed_params()
    optimizer = make(name, params, stochastic_rounding=True, **options)
    for step in range(3):
        for i, param in enumerate(params):
            set_grad(param, 10 * step + i, dtype=(torch.float32, param.dtype)[i % 2])
        optimizer.step()
    return tensors(optimizer)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("name", "rule"), CLASSES)
def test_every_class_agrees_with_the_spec_on_every_variant(name: str, rule: str) -> None:
    before = [param.detach().clone() for param in mixed_params()]
    with Calls(by_spec=True) as calls:
        wanted = three_steps(name, RULES[rule])
    eight = "8bit" in name
    assert set(calls.names) == ({"optimizer_8bit", "optimizer_32bit"} if eight else {"optimizer_32bit"})
    assert not any(torch.equal(old, new) for old in before for new in wanted if old.shape == new.shape)
    # And the source of the GPU kernels, which does not know whether a state is paged.
    emulators = [f"emulator:{width}" for width in (16, 32, 64)] if name in (rule, rule + "8bit") else []
    for backend in [*cpu_variants(), *emulators]:
        with polybit.backend(backend, fallback="error"):
            assert_same(three_steps(name, RULES[rule]), wanted)
            assert last_backend() == resolve(calls.names[-1]).owner


@pytest.mark.parametrize(("name", "rule"), CLASSES)
def test_the_name_says_width_and_paging(name: str, rule: str) -> None:
    optimizer = make(name, [parameter(64, 64)])
    assert optimizer.defaults["optim_bits"] == (8 if name.endswith("8bit") else 32)
    assert optimizer.defaults["is_paged"] == name.startswith("Paged")
    assert name in optim.__all__ and isinstance(optimizer, getattr(optim, rule))


@pytest.mark.parametrize("name", [name for name, rule in CLASSES if rule in ("Adam", "AdamW")])
def test_amsgrad_raises(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: amsgrad is not supported"):
        make(name, [parameter(3)], amsgrad=True)
    optimizer = make(name, [parameter(3)])
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.add_param_group({"params": [parameter(3)], "amsgrad": True})
    assert len(optimizer.param_groups) == 1


# --- against torch, and against the papers: 1,000 steps


STEPS, NUMEL = 1000, 400


def gradients() -> Iterator[Tensor]:
    """fp32, with a drift, noise, elements of very different sizes, and a run of exact zeros."""
    generator = torch.Generator().manual_seed(5)
    size = torch.logspace(-3, 0, NUMEL)
    for step in range(STEPS):
        noise = torch.randn(NUMEL, generator=generator)
        yield size * (noise + math.sin(step / 50)) * (400 <= step < 420 or step % 7 != 3)


def run(step: Step, dtype: torch.dtype) -> Tensor:
    param = parameter(NUMEL, seed=3).detach().to(dtype)
    start = param.clone()
    for grad in gradients():
        step(param, grad.to(dtype))
    assert (param != start).all() and param.abs().mean() > 0.02  # every element went somewhere, and none to nothing
    return param.double()


def by_optimizer(make_one: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Step:
    holder: list[tuple[nn.Parameter, torch.optim.Optimizer]] = []

    def step(param: Tensor, grad: Tensor) -> None:
        if not holder:
            leaf = nn.Parameter(param)
            holder.append((leaf, make_one([leaf])))
        leaf, optimizer = holder[0]
        leaf.grad = grad
        optimizer.step()

    return step


def assert_as_exact_as(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Ours and theirs are fp32 runs of one formula, exact the fp64 run: our error may be at most twice theirs."""
    for what, error in (("largest", lambda x: (x - exact).abs().max()), ("mean", lambda x: (x - exact).abs().mean())):
        got, bound = float(error(ours)), float(error(theirs))
        print(f"{what} error after {STEPS} steps: ours {got:.2e}, the other fp32 run's {bound:.2e}")
        assert got <= 2 * bound, f"{what} error {got:.2e}, the other fp32 run has {bound:.2e}"


TORCH: list[tuple[str, dict[str, Any]]] = [
    ("Adam", {"lr": 3e-3}),
    ("Adam", {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}),
    ("Adam", {"lr": 3e-3, "maximize": True}),
    ("AdamW", {"lr": 3e-3}),
    ("AdamW", {"lr": 3e-3, "weight_decay": 0.3}),
    ("SGD", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 1e-3}),
    ("RMSprop", {"lr": 1e-3, "alpha": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 1e-3, "centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.5}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 1e-1}),
    ("Adagrad", {"lr": 1e-1, "lr_decay": 1e-3, "weight_decay": 0.1, "initial_accumulator_value": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), TORCH, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_32_bits_agree_with_torch(name: str, options: dict[str, Any]) -> None:
    theirs = getattr(torch.optim, name)
    assert_as_exact_as(
        run(by_optimizer(lambda params: getattr(optim, name + "32bit")(params, **options)), torch.float32),
        run(by_optimizer(lambda params: theirs(params, foreach=False, **options)), torch.float32),
        run(by_optimizer(lambda params: theirs(params, foreach=False, **options)), torch.float64),
    )


class AdEMAMixPaper:
    """Pagliardini, Ablin and Grangier (2024), algorithm 1 and section 3 (its schedulers)."""

    lr, b1, b2, b3, alpha, eps, decay, until = 3e-3, 0.9, 0.999, 0.9999, 5.0, 1e-8, 0.1, 600

    def __init__(self) -> None:
        self.t, self.m1, self.m2, self.v = 0, 0.0, 0.0, 0.0

    def __call__(self, p: Tensor, g: Tensor) -> None:
        self.t += 1
        part = min(self.t / self.until, 1.0)
        alpha = part * self.alpha
        log1, log3 = math.log(self.b1), math.log(self.b3)
        b3 = min(math.exp(log1 * log3 / ((1 - part) * log3 + part * log1)), self.b3)
        self.m1 = self.b1 * self.m1 + (1 - self.b1) * g
        self.m2 = b3 * self.m2 + (1 - b3) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m1, v = self.m1 / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        p *= 1 - self.lr * self.decay  # as torch's AdamW takes p - lr decay p, which fp32 rounds otherwise
        p -= self.lr * (m1 + alpha * self.m2) / (v**0.5 + self.eps)


class LAMBPaper:
    """You et al. (2020), algorithm 2, phi the identity."""

    lr, b1, b2, eps, decay = 1e-3, 0.9, 0.999, 1e-6, 0.1

    def __init__(self) -> None:
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, p: Tensor, g: Tensor) -> None:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        step = m / (v**0.5 + self.eps) + self.decay * p
        p -= self.lr * p.norm() / step.norm() * step


class LARSPaper:
    """You, Gitman and Ginsburg (2017), algorithm 1: eta is the trust coefficient; the ratio is 1 where a norm is 0."""

    lr, momentum, eta, decay = 0.02, 0.9, 0.01, 0.1

    def __init__(self) -> None:
        self.v = 0.0

    def __call__(self, p: Tensor, g: Tensor) -> None:
        of_param, of_grad = p.norm(), g.norm()
        ratio = self.eta * of_param / (of_grad + self.decay * of_param) if of_param > 0 and of_grad > 0 else 1.0
        self.v = self.momentum * self.v + self.lr * ratio * (g + self.decay * p)
        p -= self.v


class LionPaper:
    """Chen et al. (2023), program 1."""

    lr, b1, b2, decay = 1e-3, 0.9, 0.99, 0.1

    def __init__(self) -> None:
        self.m: Any = 0.0

    def __call__(self, p: Tensor, g: Tensor) -> None:
        update = torch.sign(self.b1 * self.m + (1 - self.b1) * g)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        p *= 1 - self.lr * self.decay
        p -= self.lr * update


PAPERS: list[tuple[str, Callable[[], Step], dict[str, Any]]] = [
    ("AdEMAMix", AdEMAMixPaper, {"lr": 3e-3, "weight_decay": 0.1, "t_alpha": 600, "t_beta3": 600}),
    ("LAMB", LAMBPaper, {"lr": 1e-3, "weight_decay": 0.1}),
    ("LARS", LARSPaper, {"lr": 0.02, "weight_decay": 0.1, "trust_coefficient": 0.01}),
    ("Lion", LionPaper, {"lr": 1e-3, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "paper", "options"), PAPERS, ids=[name for name, *_ in PAPERS])
def test_32_bits_agree_with_the_paper(name: str, paper: Callable[[], Step], options: dict[str, Any]) -> None:
    ours = run(by_optimizer(lambda params: make(name, params, **options)), torch.float32)
    theirs, exact = run(paper(), torch.float32), run(paper(), torch.float64)
    if name == "Lion":  # a sign may flip where its argument is rounding error; the element then is 2 lr away
        sure = ((ours - exact).abs() < options["lr"]) & ((theirs - exact).abs() < options["lr"])
        assert sure.sum() >= 0.98 * NUMEL
        ours, theirs, exact = ours[sure], theirs[sure], exact[sure]
    assert_as_exact_as(ours, theirs, exact)


def test_lamb_without_bias_correction() -> None:
    def step(p: Tensor, g: Tensor) -> None:
        direction = (0.1 * g) / ((0.001 * g**2) ** 0.5 + 1e-6)
        p -= 1e-3 * p.norm() / direction.norm() * direction

    param = parameter(50)
    wanted = param.detach().double()
    set_grad(param, 1)
    assert param.grad is not None
    step(wanted, param.grad.double())
    optim.LAMB([param], bias_correction=False).step()
    torch.testing.assert_close(param.detach().double(), wanted, rtol=0, atol=1e-6)


def test_options_switched_on_later_find_their_moments() -> None:
    """What a moment was it stays, whatever is switched on or off beside it; what is new starts at zero."""
    param = parameter(64, 80)
    optimizer = optim.RMSprop([param])
    state = optimizer.state[param]
    for k, changes in enumerate(({}, {"momentum": 0.5}, {"centered": True}, {"momentum": 0.0}, {"momentum": 0.5})):
        optimizer.param_groups[0].update(changes)
        before = {key: x.clone() for key, x in state.items() if torch.is_tensor(x)}
        set_grad(param, k, 0.0 if k > 1 else 1.0)  # with gradients of zero every moment only decays
        optimizer.step()
        state = optimizer.state[param]
        assert state["step"] == k + 1
        if k > 1:
            assert torch.equal(state["state1"], before["state1"] * 0.99) and not state["state3"].any()
        if k in (2, 4):
            assert torch.equal(state["state2"], before["state2"] * 0.5) and state["state2"].any()
    sgd = optim.SGD([param])
    for momentum in (0.0, 0.9):
        sgd.param_groups[0]["momentum"] = momentum
        set_grad(param, 1)
        sgd.step()
    assert param.grad is not None and torch.equal(sgd.state[param]["state1"], param.grad)


def test_a_moment_that_is_added_has_the_width_of_the_others() -> None:
    for first, then in ((8, 32), (32, 8)):
        param = parameter(64, 80)
        optimizer = optim.RMSprop([param], optim_bits=first)
        for changes in ({}, {"centered": True, "optim_bits": then}):
            optimizer.param_groups[0].update(changes)
            set_grad(param, 1)
            optimizer.step()
        dtypes = {x.dtype for key, x in optimizer.state[param].items() if key.startswith("state")}
        assert dtypes == {torch.uint8 if first == 8 else torch.float32}
