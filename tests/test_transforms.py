"""Every road of PyTorch to a first or second derivative, for the reference in float64 and for the fused kernels, against the closed formulas in float64.

`pytest -m gpu tests/test_transforms.py` walks the same roads on larger problems and in half precision, and captures a whole second-order step as a CUDA graph.
"""
import os
import re
import tempfile
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import multiprocessing
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from theria import audit, sdpa_custom
from theria.attention import autograd, ops, reference
from theria.attention.audit import RAISES, WRONG
from theria.attention.contract import ContractError, rel_err
from theria.layers import TransformerBlock

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
gpu = partial(pytest.param, marks=pytest.mark.gpu)
TINY, SMALL, LARGE = (1, 1, 1, 2, 3, 2, 2), (1, 2, 1, 3, 5, 6, 4), (2, 8, 2, 130, 257, 64, 48)  # B, Hq, Hkv, Lq, Lk, D, Dv
KINDS = [("reference", torch.float64, SMALL), ("triton_full_fused", torch.float32, SMALL), gpu("reference", torch.float64, LARGE), gpu("triton_full_fused", torch.float32, LARGE),
         gpu("triton_full_fused", torch.bfloat16, LARGE), gpu("triton_full_fused", torch.float16, LARGE)]
EPS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
kinds = pytest.mark.parametrize("backend, dtype, size", KINDS, ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)) if isinstance(x, tuple) else str(x).removeprefix("torch."))


# A problem with an additive mask, grouped heads and both outputs, and what the formulas say about it

class Point(NamedTuple):
    "Inputs, their tangents, cotangents of o and L, their tangents, cotangents of the tangents of o and L."
    x:tuple; t:tuple; y:tuple; ty:tuple; c:tuple


@cache
def point(dtype, size, seed=0):
    B, Hq, Hkv, Lq, Lk, D, Dv = size
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s, dtype=dtype: torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    x = lambda: (rand(B, Hq, Lq, D), rand(B, Hkv, Lk, D), rand(B, Hkv, Lk, Dv), rand(1, Hq, 1, Lk))
    y = lambda: (rand(B, Hq, Lq, Dv), rand(B, Hq, Lq, dtype=torch.promote_types(dtype, torch.float32)))
    return Point(x(), x(), y(), y(), y())


@cache
def formulas(dtype, size, seed=0):
    x, t, y, ty, c = ([z.double() for z in zs] for zs in point(dtype, size, seed))
    kw = dict(scale=size[5]**-.5)
    o, L = reference.forward(*x, **kw)
    second = reference.tangent_backward(*x, o, L, *y, *t, *ty, **kw)
    inputs, of_y, of_L = reference.double_backward(*x, o, L, *y, *t, **kw)
    here, there = reference.reverse_over_forward(*x, o, L, *t, *y, *c, **kw)
    only_q = reference.tangent_backward(*x, o, L, *y, t[0], **kw)
    return dict(vjp=second.grads, jvp=(second.to, second.tL), hvp=second.tgrads, double=(*inputs, of_y, of_L), rof=(*here, *there), hessian=(only_q.tgrads.q,))


def attention(backend, q, k, v, bias): return sdpa_custom(q, k, v, bias, enable_gqa=True, return_lse=True, backend=backend)
def leaves(*xs): return tuple(x.detach().requires_grad_() for x in xs)
def contract(a, b): return sum((x*y.to(x.dtype)).sum() for x, y in zip(a, b))


# The roads: (f, point) -> tensors, and the formula they have to agree with

def _backward(f, p):
    x = leaves(*p.x)
    torch.autograd.backward(f(*x), p.y)
    return tuple(z.grad for z in x)

def _first(f, p, run=lambda f, *x: f(*x)):
    x, y = leaves(*p.x), leaves(*p.y)
    return x, y, torch.autograd.grad(run(f, *x), x, y, create_graph=True)

def _double(f, p, **kw):
    x, y, g = _first(f, p, **kw)
    return torch.autograd.grad(g, (*x, *y), p.t)

def _double_backward(f, p):
    x, y, g = _first(f, p)
    contract(g, p.t).backward()
    return tuple(z.grad for z in (*x, *y))

def _dual(f, p):
    with forward_ad.dual_level(): return tuple(forward_ad.unpack_dual(o).tangent for o in f(*map(forward_ad.make_dual, p.x, p.t)))

def _dual_over_grad(f, p):
    with forward_ad.dual_level():
        x, y = (tuple(map(forward_ad.make_dual, leaves(*a), b)) for a, b in ((p.x, p.t), (p.y, p.ty)))
        return tuple(forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(f(*x), x, y))

def gradients(f, *xy): return vjp(f, *xy[:4])[1](xy[4:])
def _hvp(f, p): return jvp(partial(gradients, f), (*p.x, *p.y), (*p.t, *p.ty))[1]
def _vjp_of_vjp(f, p): return vjp(partial(gradients, f), *p.x, *p.y)[1](p.t)

def _vjp_of_jvp(f, p):
    return vjp(lambda *a: jvp(f, a[:4], a[4:]), *p.x, *p.t)[1]((p.y, p.c))

def _grad_of_grad(f, p):
    inner = lambda *xy: contract(grad(lambda *x: contract(f(*x), xy[4:]), (0, 1, 2, 3))(*xy[:4]), p.t)
    return grad(inner, tuple(range(6)))(*p.x, *p.y)

def _jacobian(way, f, p): # contracted with the cotangents, or with the tangents
    J = way(f, (0, 1, 2, 3))(*p.x)
    if way is jacrev: return tuple(sum(torch.tensordot(y.to(J[n][i].dtype), J[n][i], y.dim()) for n, y in enumerate(p.y)) for i in range(4))
    return tuple(sum(torch.tensordot(J[n][i], t.to(J[n][i].dtype), t.dim()) for i, t in enumerate(p.t)) for n in range(2))

def _hessian(way, f, p): return (torch.tensordot(way(lambda q: contract(f(q, *p.x[1:]), p.y))(p.x[0]), p.t[0], 4),)

FIRST = {"autograd.grad": ("vjp", lambda f, p: torch.autograd.grad(f(*(x := leaves(*p.x))), x, p.y)), "backward": ("vjp", _backward), "func.vjp": ("vjp", lambda f, p: gradients(f, *p.x, *p.y)),
         "func.grad": ("vjp", lambda f, p: grad(lambda *x: contract(f(*x), p.y), (0, 1, 2, 3))(*p.x)), "func.jvp": ("jvp", lambda f, p: jvp(f, p.x, p.t)[1]), "dual": ("jvp", _dual)}
SECOND = {"create_graph": ("double", _double), "create_graph, backward": ("double", _double_backward), "vjp of vjp": ("double", _vjp_of_vjp), "grad of grad": ("double", _grad_of_grad),
          "jvp of vjp": ("hvp", _hvp), "dual over grad": ("hvp", _dual_over_grad), "vjp of jvp": ("rof", _vjp_of_jvp)}
WHOLE = {"jacrev": ("vjp", partial(_jacobian, jacrev)), "jacfwd": ("jvp", partial(_jacobian, jacfwd)), "hessian": ("hessian", partial(_hessian, hessian)),
         "jacrev of jacrev": ("hessian", partial(_hessian, lambda f: jacrev(jacrev(f)))), "jacrev of jacfwd": ("hessian", partial(_hessian, lambda f: jacrev(jacfwd(f))))}
ROADS = FIRST | SECOND


def near(got, want, eps):
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and rel_err(a, b) <= eps, f"output {n}: {rel_err(a, b):.1e}"


@kinds
@pytest.mark.parametrize("road", ROADS)
def test_roads(road, backend, dtype, size):
    what, walk = ROADS[road]
    near(walk(partial(attention, backend), point(dtype, size)), formulas(dtype, size)[what], EPS[dtype])


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), ("triton_full_fused", torch.float32)])
@pytest.mark.parametrize("road", WHOLE)
def test_whole_matrices(road, backend, dtype):
    what, walk = WHOLE[road]
    near(walk(partial(attention, backend), point(dtype, TINY)), formulas(dtype, TINY)[what], EPS[dtype])


@kinds
@pytest.mark.parametrize("road", ["func.vjp", "func.jvp", "grad of grad", "jvp of vjp", "vjp of jvp"])
def test_vmap(road, backend, dtype, size):
    what, walk = ROADS[road]
    points = [point(dtype, size, seed) for seed in (0, 1)]
    stacked = Point(*(tuple(torch.stack(z) for z in zip(*zs)) for zs in zip(*points)))
    found = vmap(lambda p: walk(partial(attention, backend), p))(stacked)
    for n in (0, 1): near([z[n] for z in found], formulas(dtype, size, n)[what], EPS[dtype])


@kinds
@pytest.mark.parametrize("road", ["func.vjp", "func.jvp", "vjp of vjp", "jvp of vjp", "vjp of jvp"])
def test_compiled_as_one_graph(road, backend, dtype, size):
    what, walk = ROADS[road]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor" if dtype == torch.bfloat16 else "aot_eager")
    run = torch.compile(lambda p: walk(partial(attention, backend), p), fullgraph=True, backend=counter)
    near(run(point(dtype, size)), formulas(dtype, size)[what], EPS[dtype])
    assert counter.frame_count == 1


# Around the call

@kinds
@pytest.mark.parametrize("what", ["checkpoint", "checkpoint, func"])
def test_recomputed_forward(what, backend, dtype, size):
    around = lambda f, *x: checkpoint(f, *x, use_reentrant=False)
    f, p = partial(attention, backend), point(dtype, size)
    if what == "checkpoint": near(_double(f, p, run=around), formulas(dtype, size)["double"], EPS[dtype])
    else:
        with pytest.raises(RuntimeError, match="saved tensor hooks"): gradients(partial(around, f), *p.x, *p.y)  # PyTorch's own limit, and loud


@pytest.mark.parametrize("backend, half", [("reference", torch.bfloat16), ("triton_full_fused", torch.float16), gpu("triton_full_fused", torch.bfloat16)])
def test_autocast(backend, half):
    p, f = point(torch.float32, SMALL), partial(attention, backend)
    lower = p._replace(y=(p.y[0].to(half), p.y[1]))
    with torch.autocast(DEVICE, dtype=half):
        assert f(*p.x)[0].dtype == half
        for road in ("create_graph", "vjp of vjp", "vjp of jvp"):
            what, walk = ROADS[road]
            found = walk(f, lower._replace(c=(p.c[0].to(half), p.c[1])))
            near([a.to(b.dtype) for a, b in zip(found, found)], formulas(torch.float32, SMALL)[what], 4e-2)
            assert {a.dtype for a in found[:4]} == {torch.float32}


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for backend in ("reference", "triton_full_fused"): torch.save(_by_ddp(backend, rank), f"{folder}/{backend}-{rank}")
    torch.distributed.barrier()  # when all are done, and no model is left that uses the group
    torch.distributed.destroy_process_group()

def _by_ddp(backend, rank):
    model = DistributedDataParallel(_block(backend))
    _penalty(model, _data(rank)).backward()
    return [p.grad for p in model.module.parameters()]

def _block(backend):
    torch.manual_seed(0)
    return TransformerBlock(8, 2, 8, backend=backend)

def _data(rank): return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(rank))

def _penalty(model, x): # a loss whose gradient needs the double backward
    x = x.requires_grad_()
    g, = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    return g.pow(2).sum()


@pytest.mark.skipif(CUDA, reason="the processes of this test compute on CPUs, through the interpreter")
def test_gradient_penalty_under_ddp():
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (folder,), nprocs=2)
        for backend in ("reference", "triton_full_fused"):
            ranks = [torch.load(f"{folder}/{backend}-{r}") for r in (0, 1)]
            alone = _block(backend)
            (sum(_penalty(alone, _data(r)) for r in (0, 1))/2).backward()
            for a, b, p in zip(*ranks, alone.parameters(), strict=True): assert torch.equal(a, b) and rel_err(a, p.grad) < 1e-5 and p.grad.norm() >= 0
            assert ranks[0][0].norm() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_graph_of_a_whole_second_order_step(dtype):
    f, (B, Hq, Hkv, Lq, Lk, D, Dv) = partial(attention, "triton_full_fused"), LARGE
    static = Point(*(tuple(z.clone() for z in zs) for zs in point(dtype, LARGE)))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3): _double(f, static), _hvp(f, static), _vjp_of_jvp(f, static)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream): out = dict(double=_double(f, static), hvp=_hvp(f, static), rof=_vjp_of_jvp(f, static))
    for seed in (1, 2):
        for zs, fresh in zip(static, point(dtype, LARGE, seed)):
            for z, y in zip(zs, fresh): z.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for what, found in out.items(): near(found, formulas(dtype, LARGE, seed)[what], EPS[dtype])


# PyTorch's own checkers

@pytest.mark.filterwarnings("ignore:Input #")  # the type is single precision on purpose
def test_gradcheck_of_the_fused_kernels():
    x = leaves(*point(torch.float32, TINY).x[:3])
    f = lambda *x: sdpa_custom(*x, backend="triton_full_fused")
    loose = dict(eps=2e-2, atol=1e-2, rtol=1e-2, fast_mode=True)  # single precision; exactness is compared above
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, **loose)
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True, **loose)


class Recorder(TorchDispatchMode):
    "Keeps the arguments of every operator of theria that is called."
    def __init__(self): super().__init__(); self.calls = {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "theria": self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def test_opcheck_of_every_operator_as_it_is_called():
    f, p = partial(attention, "triton_full_fused"), point(torch.float32, TINY)
    with Recorder() as seen:
        for walk in (_double, _hvp, _vjp_of_jvp): walk(f, p)
    assert {op._schema.name.partition("::")[2] for op in seen.calls} == {name for name, f in ops.IMPLEMENTATIONS.items() if f.__module__ == ops.__name__}  # other pages add theirs
    for op, args in seen.calls.items():
        plain = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        assert set(torch.library.opcheck(op, plain).values()) == {"SUCCESS"}, op


# Where it ends

def _thirds(backend):
    q, *rest = (z.detach() for z in point(torch.float32, SMALL).x)
    f = lambda q: attention(backend, q, *rest)[0].pow(2).sum() + q.pow(4).sum()  # with a path around attention
    return {"reverse": lambda: grad(lambda q: grad(lambda q: grad(f)(q).pow(2).sum())(q).pow(2).sum())(q),
            "forward over reverse over reverse": lambda: jvp(grad(lambda q: grad(f)(q).pow(2).sum()), (q,), (q,))[1],
            "reverse over forward over reverse": lambda: grad(lambda q: jvp(grad(f), (q,), (q,))[1].sum())(q),
            "forward over forward over reverse": lambda: jvp(lambda q: jvp(grad(f), (q,), (q,))[1], (q,), (q,))[1]}


@pytest.mark.parametrize("road", _thirds("reference"))
def test_third_order_is_the_references(road):
    assert _thirds("reference")[road]().isfinite().all()
    with pytest.raises(NotImplementedError) as e: _thirds("triton_full_fused")[road]()
    assert re.fullmatch(r"got a request for [^\n]*: use backend='reference'[^\n]*\.", str(e.value))


# Silent failures planted in the chain itself, one at a time: the audit has to see each

def _spoiled(change):
    def run(name, *args): return change(name, args, original(name, *args))
    original = autograd.run
    return run

def _raw_backward(m): m.setattr(autograd, "Backward", SimpleNamespace(apply=lambda *a: autograd.run("backward", *a[:len(torch.ops.theria.backward.default._schema.arguments)])))
def _once(m): m.setattr(autograd.Forward, "backward", staticmethod(once_differentiable(autograd.Forward.backward)))
def _no_tangent(m): m.setattr(autograd.Forward, "jvp", staticmethod(lambda ctx, *t: tuple(torch.zeros_like(z) for z in ctx.saved_tensors[-2:])))
def _frozen_tangent(m):
    frozen = lambda name, args, out: out if name != "jvp" else (out[0] + out[1][..., None].to(out[0].dtype)*args[5], out[1])  # @eq-frozen
    m.setattr(autograd, "run", _spoiled(frozen))
def _detached_output(m): m.setattr(autograd, "attend", lambda *a: tuple(z.detach() for z in autograd.Forward.apply(*a)))
def _lost(n):
    second = {"tangent_backward", "double_backward"}
    zero = lambda name, args, out: out if name not in second else tuple(torch.zeros_like(z) if i == n else z for i, z in enumerate(out))
    return lambda m: m.setattr(autograd, "run", _spoiled(zero))

PLANTS = {"raw kernel in backward": (_raw_backward, "grad of grad", "autograd.grad"), "once_differentiable": (_once, "grad of grad", "autograd.grad"),
          "zero tangent": (_no_tangent, "jvp", "torch.func"), "frozen statistics": (_frozen_tangent, "jvp", "torch.func"), "detached output": (_detached_output, "grad", "autograd.grad"),
          **{f"second gradient of {x} lost": (_lost(n), "grad of grad", "autograd.grad") for n, x in enumerate("qkv")}}


@pytest.mark.parametrize("name", [None, *PLANTS])
def test_the_audit_sees_what_is_planted(name, monkeypatch):
    plant, derivative, way = PLANTS.get(name, (lambda m: None, "grad of grad", "autograd.grad"))
    plant(monkeypatch)
    found = audit(partial(sdpa_custom, backend="triton_full_fused"), dtype=torch.float32, device=DEVICE, B=1, H=1, Lq=2, Lk=3, ways=[way], derivatives=[derivative])
    assert found.verdict == ("safe" if name is None else "unsafe"), found
    assert name is None or WRONG in [r.outcome for r in found.rows[1:]]


def test_once_differentiable_is_loud_on_the_other_road(monkeypatch):
    _once(monkeypatch)
    found = audit(partial(sdpa_custom, backend="triton_full_fused"), dtype=torch.float32, device=DEVICE, B=1, H=1, Lq=2, Lk=3, ways=["backward"], derivatives=["grad of grad"])
    assert RAISES in [r.outcome for r in found.rows]


# Who watches the operators, and who cannot run them

@pytest.mark.parametrize("place", ["query", "key", "value", "mask", "all"])
def test_a_tensor_of_another_kind_is_seen_in_every_place(place):
    from torch.testing._internal.two_tensor import TwoTensor
    x = dict(query=torch.randn(1, 1, 3, 4, device=DEVICE), key=torch.randn(1, 1, 3, 4, device=DEVICE), value=torch.randn(1, 1, 3, 4, device=DEVICE), mask=torch.randn(3, 3, device=DEVICE))
    def attend(x): return sdpa_custom(x["query"], x["key"], x["value"], x["mask"], backend="triton_full_fused")
    o = attend({n: TwoTensor(y, y) if place in (n, "all") else y for n, y in x.items()})
    assert isinstance(o, TwoTensor) and torch.equal(o.a, attend(x)) and torch.equal(o.b, o.a)


def test_tensors_without_data_are_refused():
    x = torch.empty(1, 1, 3, 4, device="meta")
    with pytest.raises(ContractError, match="tensors on meta"): sdpa_custom(x, x, x, backend="triton_full_fused")


@pytest.mark.parametrize("road", [
    lambda f, q, t: grad(lambda q: jvp(f, (q,), (t,))[1])(q),
    lambda f, q, t: jvp(grad(f), (q,), (t,))[1],
    lambda f, q, t: vjp(grad(f), q)[1](t)[0],
    lambda f, q, t: torch.autograd.grad(jvp(f, ((leaf := q.clone().requires_grad_()),), (t,))[1], leaf)[0],
    lambda f, q, t: vmap(lambda t: grad(lambda q: jvp(f, (q,), (t,))[1])(q))(torch.stack([t, 2*t])),
], ids=["reverse over forward", "forward over reverse", "reverse over reverse", "autograd.grad over forward", "mapped"])
def test_zeros_without_memory(road):
    "The derivative of a constant factor is a tensor that has no data."
    q, k, v, w, t = (torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(5))
    ours, theirs = (road(lambda q, b=b: (sdpa_custom(q, k, v, backend=b)*w).sum(), q, t) for b in ("triton_full_fused", "reference"))
    assert rel_err(ours, theirs) < 1e-5


@pytest.mark.parametrize("place", range(3))
def test_views_with_a_minus_sign(place):
    x = [torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(3)]
    turned = [torch._neg_view(y) if n == place else y for n, y in enumerate(x)]
    assert rel_err(sdpa_custom(*turned, backend="triton_full_fused"), sdpa_custom(*(y.resolve_neg() for y in turned), backend="reference")) < 1e-6


@pytest.mark.parametrize("road", [lambda f, q: grad(f)(q), lambda f, q: grad(lambda q: jvp(f, (q,), (q,))[1])(q), lambda f, q: vmap(grad(f))(torch.stack([q, 2*q]))], ids=["grad", "reverse over forward", "mapped"])
def test_a_compiled_function_inside_a_transform(road):
    q, k, v = (torch.randn(1, 2, 3, 4, device=DEVICE) for _ in range(3))
    f = lambda q, b: sdpa_custom(q, k, v, backend=b).pow(2).sum()
    compiled = torch.compile(partial(f, b="triton_full_fused"), backend="aot_eager")
    assert rel_err(road(compiled, q), road(partial(f, b="reference"), q)) < 1e-5
