"FULL is the true derivative of adaptation, FO is not, and their difference is exactly the curvature that attention and the rest contribute."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.contract import ContractError, rel_err
from theria.meta.adapt import adapt, gradient, parameters, task_loss
from theria.meta.gradients import FO, FO_STRICT, FULL, meta_gradient, rel_diff_full_vs_fo, second_order_path
from theria.meta.learner import PatchTransformer
from theria.meta.variants import VARIANTS

SIZES = dict(image=4, patch=2, d_model=4, n_heads=2, n_layers=1)


def make_loss(attention): return task_loss(PatchTransformer(2, **SIZES, backend=attention).double())
def flat(grads): return torch.cat([g.flatten() for g in grads.values()])


@pytest.fixture
def problem():
    gen = torch.Generator().manual_seed(1)
    batch = lambda: (torch.randn(6, 4, 4, generator=gen, dtype=torch.float64), torch.arange(6) % 2)
    theta = {n: torch.randn(p.shape, generator=gen, dtype=torch.float64)/2 for n, p in PatchTransformer(2, **SIZES).named_parameters()}
    return theta, batch(), batch()


def run(problem, attention="reference", estimators=(FULL, FO, FO_STRICT), **options):
    theta, S, Q = problem
    return [flat(meta_gradient(name, make_loss(attention), theta, S, Q, **{"lr": .1, "steps": 3} | options).grads) for name in estimators]


@pytest.mark.parametrize("steps,lr", [(1, .5), (3, .1), (8, .1)])
def test_full_is_the_derivative_of_adaptation(problem, steps, lr):
    theta, S, Q = problem
    loss_fn, u = make_loss("reference"), {n: torch.randn_like(p) for n, p in theta.items()}
    def J(h): return loss_fn(adapt(loss_fn, {n: p + h*u[n] for n, p in theta.items()}, S, lr=lr, steps=steps).params, Q).item()
    h = 1e-3  # fourth-order central difference: truncation and rounding are both near 1e-11
    slope = (8*(J(h) - J(-h)) - (J(2*h) - J(-2*h)))/(12*h)
    full, fo, _ = run(problem, lr=lr, steps=steps)
    assert abs(full @ flat(u) - slope) < 1e-7*abs(slope)
    assert abs(fo @ flat(u) - slope) > 1e-3*abs(slope)


def test_one_step_differs_by_one_hessian_vector_product(problem):
    theta, S, Q = problem
    loss_fn, leaf = make_loss("reference"), {n: p.clone().requires_grad_() for n, p in theta.items()}
    full, fo, strict = run(problem, steps=1, lr=.3)
    g = flat(gradient(loss_fn(leaf, S), leaf, create_graph=True))
    Hg = flat(gradient(g @ fo, leaf))
    assert rel_err(full - fo, -.3*Hg) < 1e-10
    assert strict.equal(fo)


def test_without_steps_or_rate_they_agree(problem):
    for options in (dict(steps=0), dict(lr=0.)):
        full, fo, strict = run(problem, **options)
        assert rel_err(full, fo) < 1e-14 and strict.equal(fo)


def test_difference_vanishes_in_proportion_to_the_rate(problem):
    d = [torch.sub(*run(problem, estimators=(FULL, FO), lr=lr)).norm().item() for lr in (1e-4, 1e-5)]
    assert d[0]/d[1] == pytest.approx(10, rel=.02)


@settings(max_examples=25)
@given(st.lists(st.floats(-.9, .9), min_size=1, max_size=4), st.integers(0, 12), st.floats(0., 1.))
def test_quadratic_closed_form(eigenvalues, steps, lr):
    lam, ones = torch.tensor(eigenvalues, dtype=torch.float64), torch.ones(len(eigenvalues), dtype=torch.float64)
    loss_fn = lambda p, batch: .5*(lam*p["t"]**2).sum() + (p["t"]*batch).sum()
    full, fo = (meta_gradient(name, loss_fn, {"t": ones}, ones, 2*ones, lr=lr, steps=steps).grads["t"] for name in (FULL, FO))
    torch.testing.assert_close(full, (1 - lr*lam)**steps*fo, rtol=1e-12, atol=1e-12)


def test_learnable_rate_under_vectorized_tasks(problem):
    theta, S, Q = problem
    rate = torch.tensor(.1, dtype=torch.float64, requires_grad=True)
    m = meta_gradient(FULL, make_loss("reference"), theta, S, Q, lr=rate, steps=2, also={"rate": rate})
    loss_fn = make_loss("reference")
    J = lambda a: loss_fn(adapt(loss_fn, theta, S, lr=a, steps=2).params, Q).item()
    assert m.grads["rate"].item() == pytest.approx((J(.1 + 1e-5) - J(.1 - 1e-5))/2e-5, rel=1e-6)
    with pytest.raises(ContractError, match="learnable lr"):
        meta_gradient(FO_STRICT, make_loss("reference"), theta, S, Q, lr=rate, steps=2)


@pytest.mark.parametrize("name,status", [("detach_attention_output", "none"), ("no_grad_attention", "none"), ("raw_kernel", "none"),
                                         ("once_differentiable_sim", "none"), ("logits_detach", "partial"), ("stats_detach", "partial")])
def test_broken_attention_is_found_in_the_whole_model(problem, name, status):
    theta, S, _ = problem
    p = second_order_path(make_loss, theta, S, VARIANTS[name])
    assert p.status == status and p.error > 1e-4 and (abs(p.share) < 1e-12) == (status == "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_attention_passes_in_both_precisions(problem, dtype):
    theta, (x, y), _ = problem
    make = lambda attention: task_loss(PatchTransformer(2, **SIZES, backend=attention).to(dtype))
    p = second_order_path(make, {n: t.to(dtype) for n, t in theta.items()}, (x.to(dtype), y), lambda q, k, v: torch.softmax(q @ k.mT/q.shape[-1]**.5, -1) @ v)
    assert p.status == "exact" and p.unreached == () and p.share == pytest.approx(1, abs=1e-3)


def test_silent_failures_have_a_wrong_full_and_the_right_fo(problem):
    true, fo, _ = run(problem, lr=.3)
    for name in ("raw_kernel", "once_differentiable_sim", "stats_detach"):
        full, first, _ = run(problem, VARIANTS[name], lr=.3)
        assert rel_err(first, fo) < 1e-12 and rel_err(full, true) > 1e-3, name


def test_cut_off_weights_are_named_or_reported(problem):
    theta, S, Q = problem
    loss_fn = make_loss(VARIANTS["detach_attention_output"])
    for name in (FULL, FO, FO_STRICT):
        with pytest.raises(ContractError, match=r"no gradient for blocks\.0\.attention\.q_proj\.weight"):
            meta_gradient(name, loss_fn, theta, S, Q, lr=.1, steps=2)
        m = meta_gradient(name, loss_fn, theta, S, Q, lr=.1, steps=2, unused="keep")
        assert "blocks.0.attention.v_proj.bias" in m.adapted.unused and m.grads["blocks.0.attention.v_proj.bias"].abs().max() == 0


def test_neither_scale_is_monotone_in_depth():
    lam = torch.tensor([.01, 1.], dtype=torch.float64)
    loss_fn, theta = (lambda p, _: .5*(lam*p["t"]**2).sum()), {"t": torch.ones(2, dtype=torch.float64)}
    d = [rel_diff_full_vs_fo(*(meta_gradient(n, loss_fn, theta, None, None, lr=.9, steps=k).grads for n in (FULL, FO))) for k in (1, 4, 40)]
    for i in (0, 1): assert d[0][i] > 4*d[1][i] and d[2][i] > 4*d[1][i]
