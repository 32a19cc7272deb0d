"""Random problems over the whole argument surface: value, gradients, forward mode and double backward against the reference in float64.

On a CPU a few tiny problems run through Triton's interpreter. `pytest -m gpu tests/test_surface.py` runs 2,000 (THERIA_SURFACE for another number, THERIA_SURFACE_SEED
for other problems) in one process per core, because most of the time goes into compiling.
"""
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from theria import sdpa_custom
from theria.attention import reference, unfused  # registers the operators
from theria.attention.backward import arrangement
from theria.attention.contract import TOLERANCE, check, rel_err
from theria.attention.custom import _draw

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.float16) + CUDA*(torch.bfloat16,)  # the interpreter's bf16 is not the hardware's
FORMS = ((None, None), ("once", None), ("two", None), ("two", (2, 3)), ("atomic", None))  # how the fused backward arranges its work
FEATURES = ((1, 7), (16, 16), (20, 100), (33, 8), (64, 64), (100, 20), (128, 128), (256, 40))
STRETCHES = (1., 1.23, 1.49, 1.81)  # a single number may be lucky when it is rounded; it is not four times over
LONGEST, MANY = (300, 3) if CUDA else (24, 2)


# What is drawn: a variant is what kernels are compiled for, so many problems share one

@dataclass(frozen=True)
class Variant:
    dtype:torch.dtype; features:tuple; rank:int; groups:int; mask:str|None; mask_dtype:torch.dtype; mask_varies:tuple; dead:bool; dropout_p:float
    layouts:tuple; lengths:tuple; wants_L:bool; form:tuple; B:int; Hkv:int


@dataclass(frozen=True)
class Problem:
    Lq:int; Lk:int; scale:float|None; seed:int


def variant(r):
    rank, dtype = r.choice((4, 4, 4, 2, 3, 5)), r.choice(DTYPES)
    layouts = tuple(r.choice(("contiguous", "contiguous", "heads inside", "columns", "sliced", "expanded")) for _ in range(4))
    lengths = tuple(r.choice(("odd", "odd", "odd", "odd", "even", "even", "one", "none")) for _ in range(2))
    return Variant(dtype, r.choice(FEATURES), rank, 1 if rank == 2 else r.choice((1, 1, 2, 3)), r.choice((None, "causal", "bool", "additive")),
                   r.choice((dtype, torch.float32)), tuple(r.random() < 0.5 for _ in range(rank)), r.random() < 0.5, r.choice((0., 0., 0.3)), layouts, lengths, r.random() < 0.5, r.choice(FORMS),
                   r.randint(1, MANY), 1 if rank == 2 else r.randint(1, MANY))


def problem(r, c):
    def length(kind):
        n = 16*r.randint(1, LONGEST//16) # kernels are compiled anew for strides that 16 divides
        return dict(none=0, one=1, even=n, odd=n + r.randrange(-13, 16, 2))[kind]
    return Problem(*map(length, c.lengths), r.choice((None, None, 0., 0.3, 1.7)), r.randrange(2**31))


# Tensors of a problem

def shapes(c, p): # q, k, v, o; the batch dimensions of rank 5 broadcast
    D, Dv = c.features
    lead = {2: lambda H, n: (), 3: lambda H, n: (H,), 4: lambda H, n: (c.B, H), 5: lambda H, n: ((2, 1), (1, c.B), (2, c.B), (2, c.B))[n] + (H,)}[c.rank]
    Hq = c.Hkv*c.groups
    return (*lead(Hq, 0), p.Lq, D), (*lead(c.Hkv, 1), p.Lk, D), (*lead(c.Hkv, 2), p.Lk, Dv), (*lead(Hq, 3), p.Lq, Dv)


def laid_out(x, how):
    if how == "heads inside" and x.dim() > 2: return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if how == "columns": return x.mT.contiguous().mT
    if how == "sliced": return F.pad(x, (0, 3))[..., :x.shape[-1]]
    if how == "expanded" and x.shape[-2]: return x[..., :1, :].expand_as(x)
    return x


def mask_of(c, p, full, rand): # additive, boolean or none; now and then rows that see nothing
    if c.mask in (None, "causal"): return None
    shape = [n if varies else 1 for n, varies in zip(full, c.mask_varies)]
    hidden = rand(shape) > 0.8
    if c.dead and hidden.numel(): hidden[..., :1, :] = True
    if c.mask == "bool": return ~hidden
    return rand(shape).to(c.mask_dtype).masked_fill(hidden, -math.inf)


@dataclass
class Case:
    "Inputs, cotangents, tangents and cotangents of gradients, and the call."
    x:list; do:torch.Tensor; dL:torch.Tensor|None; t:list; u:list; mask:torch.Tensor|None; kw:dict; seed:int

    def to(self, dtype):
        cast = lambda x: x if x is None or x.dtype == torch.bool else x.to(dtype)
        return Case(*([*map(cast, v)] if isinstance(v, list) else cast(v) for v in (self.x, self.do, self.dL, self.t, self.u, self.mask)), self.kw, self.seed)


def case_of(c, p):
    g = torch.Generator().manual_seed(p.seed)
    rand = lambda s: torch.randn(s, generator=g).to(DEVICE)
    *qkv, out = shapes(c, p)
    x, do = [laid_out(rand(s).to(c.dtype), how) for s, how in zip(qkv, c.layouts)], laid_out(rand(out).to(c.dtype), c.layouts[3])
    mask = mask_of(c, p, (*out[:-1], p.Lk), rand)
    if mask is not None and mask.dtype != torch.bool: x.append(mask)
    like = lambda: [rand(y.shape).to(y.dtype) for y in x]
    kw = dict(scale=p.scale, is_causal=c.mask == "causal", dropout_p=c.dropout_p, enable_gqa=c.groups > 1)
    return Case(x, do, rand(out[:-1]) if c.wants_L else None, like(), like(), mask, kw, p.seed)


# The callables: ours, and the reference in a given precision, whole or with its statistics frozen

def ours(backend, case, q, k, v, bias=None):
    torch.manual_seed(case.seed)
    return sdpa_custom(q, k, v, case.mask if bias is None else bias, return_lse=True, backend=backend, **case.kw)


def zeros_and_ones(backend, p, seed): # the dropout matrix that a backend will use
    if not p.dropout_p: return None
    torch.manual_seed(seed)
    if backend in ("triton_ref", "triton_fast"): return _draw(p)
    return torch.ops.theria.dropout_mask(torch.randint(2**63 - 1, (1,), device=p.device), p.B, p.Hq, p.Lq, p.Lk, p.dropout_p)


def formula(backend, inside, frozen, case, q, k, v, bias=None): # o, L with the dtype of q outside and `inside` inside
    p, q, k, v, mask = check(q, k, v, case.mask if bias is None else bias, return_lse=True, backend="reference", **case.kw)
    up = lambda x: x if x is None or x.dtype == torch.bool else x.to(inside)
    q, k, v, mask, drop = map(up, (q, k, v, mask, zeros_and_ones(backend, p, case.seed)))
    if frozen:
        s = reference.scores(q, k, mask, scale=p.scale, is_causal=p.is_causal)
        w = reference.probabilities(s, reference.logsumexp(s).detach())
        o, L = reference.weigh(w, drop) @ reference.repeat_heads(v, p.Hq), w.sum(-1)
    else: o, L = reference.forward(q, k, v, mask, scale=p.scale, is_causal=p.is_causal, drop=drop)
    return o.to(p.dtype).reshape(*p.lead, p.Lq, p.Dv), L.reshape(*p.lead, p.Lq)


def names(case):
    x = ["q", "k", "v", "bias"][:len(case.x)]
    return ["o", "L", *(f"d{n}" for n in x), *(f"g{n}" for n in x), "gdo", *["gdL"]*(case.dL is not None), "to", "tL"]


def derivatives(f, case):
    "Everything up to second order, by name."
    f = partial(f, case)
    x = [y.detach().requires_grad_() for y in case.x]
    cot = [y.detach().requires_grad_() for y in (case.do, case.dL) if y is not None]
    outs = f(*x)
    first = torch.autograd.grad(outs[:len(cot)], x, cot, create_graph=True)
    second = torch.autograd.grad(first, [*x, *cot], case.u, materialize_grads=True)
    apart = tuple(y.contiguous() if 0 in y.stride() else y for y in case.x)  # dual numbers may not share memory
    tangents = torch.func.jvp(f, apart, tuple(case.t))[1]
    return {n: y.detach() for n, y in zip(names(case), [*outs, *first, *second, *tangents])}


# The judgment: an error is relative to the true derivative, or where that vanishes by cancellation (a single key, say) to half of what the derivative would be
# if the row statistics stood still, which is the same sum before the cancellation: up to four of its operands are rounded to the type of the inputs. Where entries of a mask share one
# gradient, that size is taken before or after their sum, whichever is larger; for the sums gdL and tL it is the sum of the absolute values. The limit is twice the error of the formula
# with PyTorch's precision, fp32 inside and rounded at the ends; or twice what the exact formulas lose when output, lse and factors of matrix products are rounded as kernels save and
# multiply them (the tangent of the output is saved, too) and scores are summed in fp32, feature by feature, the worst of four ways to round; and not less than the tolerance of the type. On top comes one unit in the last place of the largest lse, a relative error of every probability.

def unshared(c, p, case): # the same case, whose mask has an entry for each score
    if len(case.x) == 3: return case
    full = (*shapes(c, p)[3][:-1], p.Lk)
    wide = lambda y: y.expand(full).clone()
    return replace(case, x=[*case.x[:3], wide(case.x[3])], t=[*case.t[:3], wide(case.t[3])], u=[*case.u[:3], wide(case.u[3])], mask=wide(case.mask))


def folded(backend, case): # inputs, tangents and cotangents of rank 4 for the functions of `reference`
    leaves = [y.detach().requires_grad_() for y in case.x]
    def fold(q, k, v, bias=None): return check(q, k, v, case.mask if bias is None else bias, return_lse=True, backend="reference", **case.kw)
    p, *x = fold(*leaves)
    t, u = ((*y[:3], y[3] if len(leaves) > 3 else None) for y in (fold(*case.t)[1:], fold(*case.u)[1:]))
    drop = zeros_and_ones(backend, p, case.seed)
    return leaves, x, t, u, dict(scale=p.scale, is_causal=p.is_causal, drop=drop if drop is None else drop.double())


def scores_as_kernels(scores, q, k, bias=None, *, scale, is_causal=False): # summed in fp32, feature by feature
    s, (a, b) = scores(q, k, bias, scale=scale, is_causal=is_causal), (q.detach().float(), reference.repeat_heads(k.detach().float(), q.shape[1]))
    total = a.new_zeros(s.shape)
    for n in range(q.shape[-1]): total.addcmul_(a[..., n, None], b[..., None, :, n])
    return s + scale*(total.double() - (q @ b.double().mT).detach())


def as_kernels(backend, case, dtype, stretch=1.): # by name, in float64; dtype None rounds nothing; a number is rounded `stretch` times as large
    leaves, x, t, u, kw = folded(backend, case)
    o, L = reference.forward(*x, **kw)
    rounded = (lambda y: y) if dtype is None else lambda y: (stretch*y).to(dtype).double()/stretch
    if dtype is not None: o, L = rounded(o), L.float().double()
    patches = {n: (lambda f: lambda y, *a: f(rounded(y), *a))(getattr(reference, n)) for n in ("to_o", "to_q", "to_k", "to_v")}
    jvp = reference.jvp
    def saved(*a, **kw):
        to, r = jvp(*a, **kw)
        return rounded(to), r
    patches["jvp"] = saved
    if dtype is not None: patches["scores"] = partial(scores_as_kernels, reference.scores)
    cot = case.do.reshape(o.shape), None if case.dL is None else case.dL.reshape(L.shape)
    back = lambda y: torch.autograd.grad(x[:len(leaves)], leaves, y[:len(leaves)], retain_graph=True)
    with mock.patch.multiple(reference, **patches):
        grads, gdo, gdL = reference.double_backward(*x, o, L, *cot, *u, **kw)
        outs = [*back(reference.backward(*x, o, L, *cot, **kw)), *back(grads), gdo, *([] if case.dL is None else [gdL]), *reference.jvp(*x, o, L, *t, **kw)]
    return {n: y.detach().flatten() for n, y in zip(names(case)[2:], outs)}


def sizes(backend, c, p, case): # by name: norms before what cancels has cancelled
    still = partial(formula, backend, torch.float64, True)
    found = {n: y.norm() for n, y in derivatives(still, case).items()}
    if c.mask == "additive":
        apart = derivatives(still, unshared(c, p, case))
        for n in ("dbias", "gbias"): found[n] = max(found[n], apart[n].norm())
    _, x, t, u, kw = folded(backend, case)
    w = reference.probabilities(reference.scores(*x[:2], x[3], scale=kw["scale"], is_causal=kw["is_causal"]), reference.forward(*x, **kw)[1])
    moved = lambda t: (w*reference.tangent_scores(*x[:2], *t[:2], t[3], scale=kw["scale"]).abs()).sum(-1).norm()
    return {**found, "gdL": moved(u).detach(), "tL": moved(t).detach()}


def failures(backend, c, p):
    case = case_of(c, p)
    wide = case.to(torch.float64)
    truth = derivatives(partial(formula, backend, torch.float64, False), wide)
    size = sizes(backend, c, p, wide)
    plain = derivatives(partial(formula, backend, torch.float32, False), case)
    try:
        with arrangement(*c.form): got = derivatives(partial(ours, backend), case)
    except Exception as e: return [f"{c} {p} raises {type(e).__name__}: {e}"]
    bad, L = [], truth["L"].nan_to_num(neginf=0.).abs()
    unit, whole, rounded = 2**-23*L.max().item() if L.numel() else 0., as_kernels(backend, wide, None), [as_kernels(backend, wide, c.dtype, x) for x in STRETCHES]
    wrong = [n for n, y in whole.items() if (y - truth[n].flatten()).norm() > 1e-9*max(size[n], 1.)]
    assert not wrong, f"the formulas of the reference and autograd differ in {wrong}: {c} {p}"
    for name, y in truth.items():
        if name == "L":
            if not torch.equal(got[name].isneginf(), y.isneginf()): bad.append("L is -inf elsewhere")
            y, got[name], plain[name] = (z.nan_to_num(neginf=0.) for z in (y, got[name], plain[name]))
            scale = max(y.norm(), math.sqrt(y.numel()))
        else: scale = max(y.norm(), size[name]/2)
        absolute = lambda z: (z.double() - y).norm().item()/(float(scale) or 1.)
        tolerance = TOLERANCE[torch.float32 if name == "L" else c.dtype]  # L is fp32 whatever its inputs are
        kernels = max((y[name] - whole[name]).norm().item() for y in rounded)/(float(scale) or 1.) if name in whole else 0.
        limit = max(2*absolute(plain[name]) + 1e-6, 2*kernels, tolerance) + unit
        if got[name].shape != y.shape or not absolute(got[name]) <= limit: bad.append(f"{name}: {absolute(got[name]):.1e} above {limit:.1e}")
    return [f"{c} {p} {b}" for b in bad]


def search(backend, n, each, stream=0, **options):
    "What fails among n different problems, `each` to a variant. Hypothesis draws what they are made from; it begins with 0 whatever its seed, so every stream makes something else of it."
    seen, bad = set(), []
    @settings(max_examples=8*-(-n//each), deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), **options)
    @given(st.integers(0, 2**64 - 1))
    def one(drawn):
        r = random.Random(f"{stream} {drawn}")
        c = variant(r)
        for case in [(c, problem(r, c)) for _ in range(each)]:
            if case in seen or len(seen) == n: continue
            seen.add(case)
            bad.extend(failures(backend, *case))
    return one, seen, bad


@pytest.mark.parametrize("backend, n", [("triton_full_fused", 15), ("triton_fused", 6), ("triton_ref", 6), ("triton_fast", 6)])
def test_random_problems(backend, n):
    one, seen, bad = search(backend, n, 1)
    one()
    assert bad == [] and len(seen) == n


@pytest.mark.gpu
@pytest.mark.parametrize("backend, share", [("triton_full_fused", 1), ("triton_fused", 8), ("triton_ref", 8), ("triton_fast", 8)])
def test_many_random_problems(backend, share):
    total, cores = int(os.environ.get("THERIA_SURFACE", "2000"))//share, min(os.cpu_count(), 16)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    def run(shard):
        done = subprocess.run([sys.executable, __file__, backend, str(shard), str(-(-total//cores))], capture_output=True, text=True, env=env)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else dict(done=0, failures=[f"worker {shard}: {done.stderr[-2000:]}"])
    with ThreadPoolExecutor(cores) as pool: results = list(pool.map(run, range(cores)))
    bad = [b for r in results for b in r["failures"]]
    assert bad == [], f"{len(bad)} failures"
    assert sum(r["done"] for r in results) >= total


def worker(backend, shard, n):
    stream = 1000*int(os.environ.get("THERIA_SURFACE_SEED", "0")) + shard
    one, seen, bad = search(backend, n, 10, stream)
    seed(stream)(one)()
    print(json.dumps(dict(done=len(seen), failures=bad)))


if __name__ == "__main__": worker(sys.argv[1], *map(int, sys.argv[2:]))
