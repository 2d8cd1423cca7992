"""What the contract cannot say: dropout masks, single promises of an op, and witnesses for the oracle itself."""

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor

from sap_fast.dual import pullback, pushforward
from sap_fast.ops import (
    LoRATarget,
    attention,
    lora_linear,
    probe_rms_norm,
)
from sap_fast.ops.lora_linear import dropout_mask

f64 = torch.float64
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rng(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


# Dropout


def test_dropout_mask_is_a_function_of_seed_and_salt(device: str) -> None:
    def mask(seed: int, salt: int) -> Tensor:
        return dropout_mask(torch.tensor(seed, device=device), salt, 40, 50, 0.5)

    assert torch.equal(mask(7, 3), mask(7, 3))
    for other in (mask(8, 3), mask(7, 4), mask(7 + 2**31, 3), mask(7, 3 + 2**31)):
        # Independent masks agree in half of their 2000 elements, give or take 22.
        assert 0.4 < float((other == mask(7, 3)).double().mean()) < 0.6


def test_dropout_mask_does_not_depend_on_its_extent(device: str) -> None:
    """Rows are told apart by number alone, whatever batch or chunk they are part of."""
    seed = torch.tensor(7, device=device)
    mask = dropout_mask(seed, 3, 40, 50, 0.5)
    assert torch.equal(dropout_mask(seed, 3, 11, 13, 0.5), mask[:11, :13])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_mask_keeps_the_right_share(p: float, device: str) -> None:
    mask = dropout_mask(torch.tensor(2**40 + 1, device=device), 1, 600, 500, p).double()
    kept = mask != 0
    for share, n in ((kept.double().mean(), 300_000), (kept[0].double().mean(), 500)):
        assert abs(float(share) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    # Neither rows nor columns may stand out: the shares of each scatter as independent draws do.
    for dim, n in ((0, 600), (1, 500)):
        spread = kept.double().mean(dim).std() / (p * (1 - p) / n) ** 0.5
        assert 0.85 < float(spread) < 1.15
    assert torch.equal(mask[kept], torch.full_like(mask[kept], float(torch.tensor(1 / (1 - p)))))
    assert abs(float(mask.mean()) - 1) < 4 * (p / (1 - p) / 300_000) ** 0.5


def test_both_halves_share_the_dropout_mask(device: str) -> None:
    """With W = 0, B A = 1 and the same x in both halves, y_dot can only equal y."""
    n = 16
    x = torch.randn(9, n, device=device)
    one, zero = torch.eye(n, device=device), torch.zeros(n, n, device=device)
    target = LoRATarget(zero, None, one, one, zero, zero, dropout=0.5, salt=2)
    seed = torch.tensor(5, device=device)
    ((y, y_dot),) = lora_linear(x, x, [target], seed=seed)
    assert y_dot is not None and torch.equal(y, y_dot)
    assert torch.equal(y, x * dropout_mask(seed, 2, 9, n, 0.5))


# What an op says beyond its pairs


def test_probe_rms_norm_returns_rstd_without_gradient(device: str) -> None:
    x = torch.randn(5, 8, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.ones(8, dtype=torch.float64, device=device)
    h, _, _, _, rstd = probe_rms_norm(x, None, x, None, None, weight, eps=1e-5)
    assert not rstd.requires_grad
    assert_agrees({"rstd": rstd}, {"rstd": (h.detach().square().mean(-1) + 1e-5).rsqrt()})


def test_probe_gradients_are_summed_before_they_are_rounded(device: str) -> None:
    """Many rows of equal cotangents, each of which bfloat16 would round the same way."""
    rows, d = 400, 4
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device=device)
    x_dot = torch.zeros_like(x)
    weight = torch.full((d,), 1.0 + 2**-7, dtype=torch.bfloat16, device=device)
    probe = torch.zeros(2, d, device=device).requires_grad_()
    *_, y, y_dot, _ = probe_rms_norm(x, x_dot, x, x_dot, probe, weight, eps=1.0)
    dy = torch.full_like(x, 1.0 + 2**-7)
    torch.autograd.backward([y, y_dot], [dy, dy])
    # At x = 0 with eps = 1 the norm is a product with weight: each row adds (1 + 2^-7)^2.
    assert torch.equal(probe.grad, torch.full_like(probe, rows * (1.0 + 2**-7) ** 2))


def test_attention_leaves_rows_outside_of_sequences_alone(device: str) -> None:
    """Whatever they hold, NaN too, they give zero and disturb nobody."""
    lengths = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    used = torch.tensor([3, 3], dtype=torch.int32, device=device)
    inside = torch.tensor([0, 1, 2, 5, 6, 7], device=device)
    clean = [torch.randn(2, 10, 2, 4, device=device) for _ in range(3)]
    dirty = [torch.full_like(x, torch.nan).index_copy(1, inside, x[:, inside]) for x in clean]
    results = []
    for q, k, v in (clean, dirty):
        leaves = [half.detach().requires_grad_() for x in (q, k, v) for half in x]
        o, o_dot = attention(*leaves, lengths, max_seqlen=5, scale=0.5, seqused=used)
        outside = o.detach().clone().index_fill(0, inside, 0)
        assert torch.equal(outside, torch.zeros_like(outside))
        grads = torch.autograd.grad([o, o_dot], leaves, [torch.ones_like(o), torch.ones_like(o)])
        results.append([x[inside] for x in (o, o_dot, *grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# Witnesses for the oracle


def test_oracle_against_finite_differences() -> None:
    """What ``dual.py`` says of the two cotangents, taken literally.

    That of the tangent half is the gradient of L = <f(x), c> and that of the primal half the change
    of this gradient along (x_dot, c_dot), with the cotangents (c_dot, c) of (y, y_dot). Both by
    differences of values of f alone.
    """

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ((x.sin() * w).cumsum(0), x.exp().sum() * w)

    generator = rng("cpu")
    shapes = [(3, 4), (3, 4)]
    xs = [torch.randn(2, *s, generator=generator, dtype=f64) for s in shapes]
    dys = [torch.randn(2, *s, generator=generator, dtype=f64) for s in shapes]
    probes = [torch.randn(s, generator=generator, dtype=f64) for s in shapes]

    def moved(step: float, along: float = 0.0) -> list[Tensor]:
        return [x[0] + step * x[1] + along * r for x, r in zip(xs, probes, strict=True)]

    # The error of central differences is of order h^2; that of rounding 1e-16 / h, and 1e-16 / h^2 for the mixed
    # difference. With h = 1e-5 both are about 1e-10 or less, with h = 1e-4 about 1e-8: a hundredfold is allowed.
    h = 1e-5
    for y, plus, minus in zip(pushforward(f, *xs), f(*moved(h)), f(*moved(-h)), strict=True):
        torch.testing.assert_close(y[1], (plus - minus) / (2 * h), rtol=1e-8, atol=1e-8)

    def scalar(step: float, along: float) -> float:
        cotangents = [dy[1] + step * dy[0] for dy in dys]
        pairs = zip(f(*moved(step, along)), cotangents, strict=True)
        return float(sum((y * c).sum() for y, c in pairs))

    dxs = pullback(f, tuple(xs), tuple(dys))
    gradient = sum(float((dx[1] * r).sum()) for dx, r in zip(dxs, probes, strict=True))
    assert (scalar(0, h) - scalar(0, -h)) / (2 * h) == pytest.approx(gradient, rel=1e-8)
    change = sum(float((dx[0] * r).sum()) for dx, r in zip(dxs, probes, strict=True))
    h = 1e-4
    mixed = scalar(h, h) - scalar(h, -h) - scalar(-h, h) + scalar(-h, -h)
    assert mixed / (4 * h * h) == pytest.approx(change, rel=1e-6)


def test_rms_norm_against_formulas_by_hand() -> None:
    """The formulas have rho = (mean x^2 + eps)^(-1/2) and rho_dot its tangent."""
    x, x_dot, dy, dy_dot = torch.randn(4, 7, 12, dtype=f64)
    weight, eps = torch.randn(12, dtype=f64), 1e-5

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    rho = (mean(x * x) + eps).rsqrt()
    rho_dot = -(rho**3) * mean(x * x_dot)
    g, g_dot = weight * dy, weight * dy_dot
    y_dot = weight * (x_dot * rho + x * rho_dot)
    dx_dot = rho * g_dot - rho**3 * x * mean(x * g_dot)
    dx = (
        rho * g
        - rho**3 * x * mean(x * g)
        + rho_dot * g_dot
        - rho**3 * (x_dot * mean(x * g_dot) + x * mean(x_dot * g_dot))
        - 3 * rho**2 * rho_dot * x * mean(x * g_dot)
    )

    raw = torch.ops.sap_fast
    xs = torch.stack((x, x_dot))
    y, rstd = raw.rms_norm(xs, weight, eps, 0.0)
    dxs = raw.rms_norm_backward(torch.stack((dy, dy_dot)), xs, rstd, weight, eps, 0.0)
    actual = {"y": y[0], "y_dot": y[1], "rstd": rstd, "dx": dxs[0], "dx_dot": dxs[1]}
    by_hand = {"y": weight * x * rho, "y_dot": y_dot, "dx": dx, "dx_dot": dx_dot}
    by_hand["rstd"] = torch.stack((rho, rho_dot))[..., 0]
    assert_agrees(actual, by_hand)


def test_attention_against_formulas_by_hand() -> None:
    """One sequence, one head; P = softmax(c Q K'), mu = rowsum(P S_dot)."""
    rows, d = 9, 6
    Q, Q_dot, K, K_dot, V, V_dot, dO, dO_dot = torch.randn(8, rows, d, dtype=f64)
    c, mask = d**-0.5, torch.full((rows, rows), -torch.inf, dtype=f64).triu(1)

    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    scores = c * Q @ K.T + mask
    P, S_dot = scores.softmax(-1), c * (Q_dot @ K.T + Q @ K_dot.T)
    mu = total(P * S_dot)
    P_dot = P * (S_dot - mu)
    O, O_dot = P @ V, P @ V_dot + P_dot @ V  # noqa: E741
    dP_dot, dP = dO_dot @ V.T, dO @ V.T + dO_dot @ V_dot.T
    delta_dot, delta = total(dO_dot * O), total(dO * O + dO_dot * O_dot)
    dS_dot = P * (dP_dot - delta_dot)
    dS = P_dot * (dP_dot - delta_dot) + P * (dP - delta)
    by_hand = {
        "o": O,
        "o_dot": O_dot,
        "lse": scores.logsumexp(-1),
        "mu": mu[:, 0],
        "dq": c * (dS @ K + dS_dot @ K_dot),
        "dq_dot": c * dS_dot @ K,
        "dk": c * (dS.T @ Q + dS_dot.T @ Q_dot),
        "dk_dot": c * dS_dot.T @ Q,
        "dv": P.T @ dO + P_dot.T @ dO_dot,
        "dv_dot": P.T @ dO_dot,
    }

    raw = torch.ops.sap_fast
    qkv = [torch.stack(pair)[:, :, None] for pair in ((Q, Q_dot), (K, K_dot), (V, V_dot))]
    constants = torch.tensor([0, rows], dtype=torch.int32), None, None, rows, rows, c, 0
    o, lse = raw.attention(*qkv, *constants)
    do = torch.stack((dO, dO_dot))[:, :, None]
    grads = raw.attention_backward(do, *qkv, o, lse, *constants)
    actual = {"o": o[0, :, 0], "o_dot": o[1, :, 0], "lse": lse[0, :, 0], "mu": lse[1, :, 0]}
    for name, grad in zip("qkv", grads, strict=True):
        actual |= {f"d{name}": grad[0, :, 0], f"d{name}_dot": grad[1, :, 0]}
    assert_agrees(actual, by_hand)
