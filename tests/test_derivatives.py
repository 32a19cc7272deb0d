"The derivatives without a graph, on every problem of the common list, against the reference's formulas in float64; and what they refuse."
import pytest
import torch

import theria
from theria import sdpa_custom, sdpa_double_backward, sdpa_hvp, sdpa_jvp, sdpa_vjp
from theria.attention import reference
from theria.attention.contract import ContractError
from theria.attention.samples import CASES, for_reference, sample, up

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, *(pytest.param(d, marks=pytest.mark.gpu) for d in (torch.float16, torch.bfloat16))]
EPS = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def problem(name, dtype=torch.float32, **sizes):
    "A problem, its call, its exact arguments; the seed is what the call will draw."
    small = {} if CUDA else dict(B=1, Lq=33, Lk=20)  # where the problem does not say otherwise; the interpreter is slow
    s = sample(**{"dtype": dtype, **small, **CASES[name], **sizes}, seed=1)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE) if s.options["dropout_p"] else None
    s = s._replace(args=(*s.args[:4], seed))
    call = dict(zip(("q", "k", "v", "attn_mask"), s.args), enable_gqa=True, backend="triton_full_fused", **s.options)
    return s, call, *for_reference(s)


def called(f, call, **more):
    torch.manual_seed(5)
    return f(**call, **more)


def near(got, want, eps):
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), n
        if a is None: continue
        assert a.shape == b.shape and not a.requires_grad
        assert (a.double() - b).norm() <= eps*max(b.norm(), 1e-2*b.numel()**.5), f"output {n}: {(a.double() - b).norm()/b.norm():.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_problem_of_the_list(name, dtype):
    s, call, x, kw = problem(name, dtype)
    o, L = reference.forward(*x, **kw)
    y, ty, t = dict(do=s.do, dlse=s.dL), dict(tdo=s.tdo, tdlse=s.tdL), dict(zip(("tq", "tk", "tv", "tmask"), s.t))
    wide = [up(z) for z in (*y.values(), *s.t, *ty.values())]
    want = reference.tangent_backward(*x, o, L, *wide, **kw)
    eps = EPS[call["q"].dtype]
    tangents = called(sdpa_hvp, call, mask_grad=True, **y, **ty, **t)
    near(tangents, (*want.tgrads, want.to, want.tL), eps)
    near(called(sdpa_vjp, call, mask_grad=True, **y), want.grads, eps)
    assert all(map(torch.equal, called(sdpa_jvp, call, **t), tangents[4:]))  # made by the same kernel


@pytest.mark.parametrize("name", ["tall", "grouped", "padding", "dead", "dropped", "no_keys", "odd"])
def test_double_backward(name):
    s, call, x, kw = problem(name)
    o, L = reference.forward(*x, **kw)
    grads, gdo, gdL = reference.double_backward(*x, o, L, up(s.do), up(s.dL), *map(up, s.t), **kw)
    u = dict(zip(("ddq", "ddk", "ddv", "ddmask"), s.t))
    near(called(sdpa_double_backward, call, do=s.do, dlse=s.dL, mask_grad=True, **u), (*grads, gdo, gdL), EPS[call["q"].dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "causal", "grouped", "padding"])
def test_gpu_long_problems(name):
    s, call, x, kw = problem(name, torch.bfloat16, Lq=1000, Lk=1000 if name == "causal" else 777, D=64, Dv=64, scale=.125)
    o, L = reference.forward(*x, **kw)
    want = reference.tangent_backward(*x, o, L, up(s.do), None, *map(up, s.t), **kw)
    near(called(sdpa_hvp, call, mask_grad=True, do=s.do, **dict(zip(("tq", "tk", "tv", "tmask"), s.t))), (*want.tgrads, want.to, want.tL), 2e-2)


@pytest.mark.gpu
def test_gpu_memory_is_linear_and_freed():
    q, k, v, do, t = (torch.randn(1, 8, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(5))
    sdpa_hvp(q, k, v, do, t, t, t)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sdpa_hvp(q, k, v, do, t, t, t)
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() - before < 12*q.nbytes


def test_they_are_offered_at_the_top():
    for name in ("sdpa_vjp", "sdpa_jvp", "sdpa_hvp", "sdpa_double_backward"): assert getattr(theria, name).__module__ == "theria.attention.derivatives" and name in theria.__all__


@pytest.mark.parametrize("backend", ["reference", "triton_full_fused"])
def test_the_same_as_autograd_and_no_graph(backend):
    x = [torch.randn(1, 2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(4)]
    u = [torch.randn_like(y) for y in x[:3]]
    o, lse = sdpa_custom(*x[:3], backend=backend, return_lse=True)
    first = torch.autograd.grad(o, x[:3], x[3], create_graph=True)
    second = torch.autograd.grad(first, x, u)
    near(sdpa_vjp(*x, backend=backend), (*(y.detach() for y in first), None), 1e-6)
    got = sdpa_double_backward(*x, *u, backend=backend, o=o, lse=lse)
    near((*got[:3], got.gdo), second, 1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton_full_fused"])
def test_no_transform_gets_a_silent_zero(backend):
    q, k, v, do, t = torch.randn(5, 1, 1, 3, 16, device=DEVICE)
    functions = [lambda q: sdpa_vjp(q, k, v, do, backend=backend).dq, lambda q: sdpa_jvp(q, k, v, t, backend=backend).to, lambda q: sdpa_hvp(q, k, v, do, t, backend=backend).tdq,
                 lambda q: sdpa_double_backward(q, k, v, do, t, backend=backend).gq, lambda do: sdpa_vjp(q, k, v, do, backend=backend).dq]
    for f in functions:
        roads = [lambda: torch.func.grad(lambda x: f(x).sum())(q), lambda: torch.func.jvp(f, (q,), (t,)), lambda: torch.func.vmap(torch.func.jacrev(f))(q[None]),
                 lambda: torch.compile(torch.func.grad(lambda x: f(x).sum()), backend="aot_eager")(q)]
        for road in roads[:4 if f is functions[0] else 3]:
            with pytest.raises(Exception, match="differentiate sdpa_custom instead"): road()


@pytest.mark.parametrize("backend", ["auto", "reference", "triton_full_fused", "triton_ref", "triton_fast", "triton_fused", "sdpa"])
def test_backends_that_have_them(backend):
    q, k, v, do = torch.randn(4, 1, 1, 3, 16, device=DEVICE)
    for f in (lambda: sdpa_vjp(q, k, v, do, backend=backend), lambda: sdpa_jvp(q, k, v, q, backend=backend), lambda: sdpa_hvp(q, k, v, do, q, backend=backend),
              lambda: sdpa_double_backward(q, k, v, do, q, backend=backend)):
        if backend in ("auto", "reference", "triton_full_fused"): assert f()[0].isfinite().all()
        else:
            with pytest.raises(ContractError, match=rf"^got backend='{backend}'; accepted are auto, reference and triton_full_fused for .*: choose one of them\.$"): f()


@pytest.mark.parametrize("arguments, says", [
    (dict(tq=torch.zeros(1, 1, 4, 16)), "got tq of shape"), (dict(tk=torch.zeros(1, 1, 3, 16).half()), "got tk of shape"), (dict(tv=1.), "got tv of type float"),
    (dict(tmask=torch.zeros(3, 3)), "got tmask without"), (dict(tdo=torch.zeros(1, 1, 3, 8)), "got tdo of shape"), (dict(tdlse=torch.zeros(1, 3)), "got tdlse of shape"),
    (dict(dlse=torch.zeros(1, 1, 3).double()), "got dlse of shape"), (dict(o=torch.zeros(1, 1, 3, 16)), "got o alone"), (dict(lse=torch.zeros(1, 1, 3)), "got lse alone"),
    (dict(is_causal=1), "got is_causal=1"), (dict(backend="fast"), "got backend='fast'")], ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_are_one_sentence(arguments, says):
    q, k, v, do = torch.randn(4, 1, 1, 3, 16)
    with pytest.raises(ContractError) as e: sdpa_hvp(q, k, v, do, **arguments)
    assert str(e.value).startswith(says) and "\n" not in str(e.value) and str(e.value).endswith(".")
