"""A compiled step is the plain one: every estimator, several tasks, training; many losses in one process; and with generated code, on a GPU in half precision and as a CUDA graph.

`pytest -m gpu tests/test_meta_compiled.py` compiles a two-block transformer learner with theria's attention and with the math path."""
from functools import partial

import pytest
import torch

from theria.attention.contract import ContractError, rel_err
from theria.bench import captured
from theria.layers import MultiHeadAttention
from theria.meta import compiled as page
from theria.meta.adapt import over_tasks, parameters, spread, task_loss
from theria.meta.compiled import Compiled
from theria.meta.estimators import MIXED
from theria.meta.experiments import MODES, Step, measure_step
from theria.meta.gradients import FO, FULL, Protocol, meta_gradient, meta_train
from theria.meta.episodes import load_data
from theria.meta.learner import learner_for
from theria.meta.safety import SDPA

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, on the first use of its compiler
traced = partial(Compiled, backend="aot_eager")


def flat(grads): return torch.cat([g.detach().double().flatten().cpu() for g in grads.values()])


def small(attention="reference"):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LayerNorm(4), MultiHeadAttention(4, 2, backend=attention), torch.nn.Linear(4, 2)).double()


def averaged(net):
    loss = task_loss(net, lambda y, target: torch.nn.functional.cross_entropy(y.mean(-2), target))
    return loss, parameters(net)


def batch(*lead): return torch.randn(*lead, 6, 5, 4, dtype=torch.float64), (torch.arange(6) % 2).expand(*lead, 6)


@pytest.mark.parametrize("estimator", [MIXED, "anil"])
def test_several_tasks(estimator):
    loss, theta = averaged(small())
    data, options = (batch(3), batch(3)), {"head": "2."} if estimator == "anil" else {}
    run = lambda f: meta_gradient(estimator, f, spread(theta, 3), *data, lr=.3, steps=2, momentum=.4, **options)
    ours, true = run(traced(over_tasks(loss))), run(over_tasks(loss))
    assert ours.loss.shape == (3,) and rel_err(flat(ours.grads), flat(true.grads)) <= 1e-12 and rel_err(ours.adapted.losses, true.adapted.losses) <= 1e-12


def test_training_with_a_compiled_step_is_the_same_training(monkeypatch, tmp_path):
    monkeypatch.setattr(page, "Compiled", traced)
    data, model = load_data("digits", "train"), learner_for("digits", 5, d_model=8, n_layers=1, backend="reference").double()
    train = lambda **kw: meta_train(model, data, Protocol(lr=.2, steps=2, learn_lr=True), tasks=2, outer_steps=3, **kw)
    state = tmp_path/"run.state"
    ours, true = train(compiled=True, resume=state), train()
    assert max(abs(a["query_loss"] - b["query_loss"]) for a, b in zip(ours.history, true.history, strict=True)) <= 1e-10
    assert rel_err(flat(ours.params), flat(true.params)) <= 1e-10 and ours.rates.keys() == true.rates.keys()
    assert train(resume=state).history == true.history  # the state of a compiled run is not that of another: it started anew


def test_float32_weights_under_autocast():
    from theria.meta.experiments import _cast_loss, flat as flat_cpu
    step, cpu = Step(8, 2, 2, H=1, D=8, n_layers=1, dtype="float32", wide=1), torch.device("cpu")
    loss, theta, support, query = step.problem("reference", cpu, 0)
    run = lambda f: flat_cpu(meta_gradient(FULL, f, theta, support, query, lr=.1, steps=2).grads)
    half = _cast_loss(loss, cpu, torch.bfloat16)
    true, eager, ours = run(loss), run(half), run(traced(half))
    assert 1e-4 < rel_err(eager, true) < .05 and rel_err(ours, eager) < 1e-2*rel_err(eager, true)


def test_half_precision_with_float32_statistics():
    "As on a GPU: the forward-mode derivative of such a layer norm comes back in float32."
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).bfloat16()
    net[1].float()
    loss, theta = averaged(net)
    (x, y), f = batch(), traced(loss)
    x = x.bfloat16()
    for estimator in (MIXED, FULL):
        ours, true = (meta_gradient(estimator, g, theta, (x, y), (x, y), lr=.1, steps=1).grads for g in (f, loss))
        assert rel_err(flat(ours), flat(true)) <= .03


def test_many_losses_in_one_process():
    "The compiler remembers by code and refuses after eight different losses for the same; these have code of their own."
    for i in range(12):
        f = traced(lambda params, x, i=i: (params["t"]**2*x).sum()*(i + 1))
        m = meta_gradient(FULL, f, {"t": torch.ones(3, dtype=torch.float64)}, torch.ones(3), torch.ones(3), lr=.01, steps=1)
        shrunk = 1 - .02*(i + 1)
        assert rel_err(m.grads["t"], torch.full((3,), 2*(i + 1)*shrunk**2, dtype=torch.float64)) <= 1e-12


def test_a_compiled_loss_is_differentiated_once_from_outside():
    loss, theta = averaged(small())
    f = traced(loss)
    g = torch.autograd.grad(f(theta, batch()), list(theta.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"): torch.autograd.grad(sum((x**2).sum() for x in g), list(theta.values()))
    with pytest.raises(ContractError, match="losses of the parameters alone"): traced(lambda p, b: loss(p, b)*theta["0.weight"].sum()).reached({n: p for n, p in theta.items() if n != "0.weight"} | {"0.weight": torch.ones(4, dtype=torch.float64)}, batch())


def test_generated_code():
    "The compiler that writes code, for one small function, since a C++ compiler works on every kernel here."
    torch.manual_seed(0)
    loss = lambda p, x: ((torch.softmax(x*p["q"] @ x.mT, -1) @ x)**2).mean()
    theta, x = {"q": torch.randn(4, dtype=torch.float64)}, torch.randn(5, 4, dtype=torch.float64)
    ours, true = (meta_gradient(FULL, f, theta, x, x, lr=.1, steps=3) for f in (Compiled(loss), loss))
    assert rel_err(flat(ours.grads), flat(true.grads)) <= 1e-12


@pytest.mark.filterwarnings("ignore:Error detected in")  # in which call of the forward pass
def test_a_kernel_without_double_backward_raises():
    loss, theta = averaged(small(SDPA["sdpa-flash"]))
    with pytest.raises(Exception, match="scaled_dot_product_flash_attention"): meta_gradient(FULL, traced(loss), theta, batch(), batch(), lr=.1, steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,limit", [("float32", 1e-4), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("attention", ["triton_full_fused", "math"])
def test_gpu_compiled_and_recorded(attention, dtype, limit):
    step, gpu = Step(128, 3, 4, H=2, wide=1, dtype=dtype), torch.device("cuda")
    attention = SDPA["sdpa-math"] if attention == "math" else attention
    plain = measure_step(step, FULL, attention, gpu, ms=1.)
    for mode in MODES:
        row = measure_step(step, FULL, attention, gpu, ms=1., mode=mode)
        assert row["failure"] is None and row["error"] <= max(limit, 2*plain["error"]), (mode, row)
        if mode == "compiled": assert row["launches"] < .7*plain["launches"] # how many are fused away is up to Inductor


@pytest.mark.gpu
@pytest.mark.parametrize("estimator", [MIXED, FO])
def test_gpu_other_estimators_recorded(estimator):
    step, gpu = Step(128, 3, 4, H=2, wide=1, dtype="float32"), torch.device("cuda")
    true = flat(step.run(estimator, "triton_full_fused", gpu, 0)().grads)
    replay, m = captured(lambda: step.run(estimator, "triton_full_fused", gpu, 0, compiled=True))
    replay()
    assert rel_err(flat(m.grads), true) <= 1e-4
