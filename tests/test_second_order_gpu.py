"""Every second-order map on random problems over the whole surface, against the reference in float64.

Double backward, forward mode, forward over reverse and reverse over forward, with random sets of absent tangents and cotangents. On a CPU a handful of tiny problems run through Triton's
interpreter. `pytest -m gpu tests/test_second_order_gpu.py` runs 300 (THERIA_SECOND_ORDER for another number) in one process per core, because most of the time goes into compiling.
"""
import json
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from theria.attention import reference, tuning
from theria.attention.autograd import attend
from theria.attention.backward import backward
from theria.attention.contract import TOLERANCE, rel_err
from theria.attention.forward import forward
from theria.attention.samples import Sample, sample, up
from theria.attention.tangent_backward import double_backward
from theria.attention.tiles import dropout_mask

CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16) + CUDA*(torch.bfloat16,)  # the interpreter's bf16 is not the hardware's
FEATURES = ((64, 64), (64, 64), (32, 32), (16, 48), (128, 128), (20, 100), (1, 7), (256, 40))
MASKS = (None, None, "causal", "bool", "dead", "holes", "full", "row", "column")
LONGEST = 300 if CUDA else 20


# What is drawn: kernels are compiled for a kind of problem, so several problems share one

def kind(r):
    groups, mask = r.choice((1, 1, 2, 3)), r.choice(MASKS)
    return dict(dtype=r.choice(DTYPES), features=r.choice(FEATURES), groups=groups, mask=None if mask == "causal" else mask, is_causal=mask == "causal",
                p=r.choice((0., 0., 0., 0.3)), odd=r.random() < 0.7, present=[r.random() < 0.75 for _ in range(7)])


def problem(r, c):
    def length():
        n = 16*r.randint(1, LONGEST//16)
        return n + r.randint(-14, 15) if c["odd"] else n
    Hkv, (D, Dv) = r.randint(1, 2), c["features"]
    return dict(dtype=c["dtype"], B=r.randint(1, 3 if CUDA else 1), Hq=Hkv*c["groups"], Hkv=Hkv, Lq=length(), Lk=length(), D=D, Dv=Dv, mask=c["mask"], is_causal=c["is_causal"],
                p=c["p"], scale=r.choice((1/math.sqrt(D), 0.3)), seed=r.randrange(2**31))


def of_problem(c, p): # a sample in which some tangents and cotangents are absent; one tangent of the inputs is always there
    s = sample(**p)
    keep = [x if on else None for x, on in zip((*s.t, s.dL, s.tdo, s.tdL), c["present"])]
    if all(x is None for x in keep[:4]): keep[0] = s.t[0]
    return Sample(s.args, tuple(keep[:4]), s.do, *keep[4:], s.options)


# The callables: the fused kernels, and the reference in a given precision, whole or with its statistics frozen

def fused(s, q, k, v, bias): return finite(*attend(q, k, v, bias, s.args[4], *s.options.values(), "exact"))


def formula(inside, frozen, drop, s, q, k, v, bias):
    kw = dict(scale=s.options["scale"], is_causal=s.options["is_causal"])
    drop = drop if drop is None else drop.to(inside)
    x = [y if y is None or y.dtype == torch.bool else y.to(inside) for y in (q, k, v, bias)]
    o, L = reference.forward(*x, **kw, drop=drop)
    if frozen:
        w = reference.probabilities(reference.scores(*x[:2], x[3], **kw), L.detach())
        o, L = reference.weigh(w, drop) @ reference.repeat_heads(x[2], q.shape[1]), w.sum(-1)
    return finite(o.to(q.dtype), L)


def finite(o, L): return o, L.masked_fill(L.isneginf(), 0.)


def absent(x, like): return torch.zeros_like(like) if x is None else x


def maps(f, s):
    "Second-order maps by name of output. Absent cotangents are absent for the double backward and for the inputs of forward mode; torch.func wants the rest as zeros."
    given = s.args[:4]
    moves = [n for n, y in enumerate(given) if y is not None and y.dtype != torch.bool]
    at = lambda y: f(s, *(y[moves.index(n)] if n in moves else given[n] for n in range(4)))
    x, t = tuple(given[n] for n in moves), [s.t[n] for n in moves]
    names, cot = ["qkvb"[n] for n in moves], (s.do,) if s.dL is None else (s.do, s.dL)
    leaves, do = [y.detach().requires_grad_() for y in x], [y.detach().requires_grad_() for y in cot]
    grads = torch.autograd.grad(at(leaves)[:len(cot)], leaves, do, create_graph=True)
    asked, u = zip(*((g, u) for g, u in zip(grads, t) if u is not None))
    double = torch.autograd.grad(asked, leaves + do, u, materialize_grads=True)
    out = {f"g{n}": y for n, y in zip([*names, "do", "dL"], double)}
    moving = [n for n, u in enumerate(t) if u is not None] # the others stand still: no tangent reaches the kernels
    def along(*y): return at([y[moving.index(n)] if n in moving else x[n] for n in range(len(x))])
    xm, tm = tuple(x[n] for n in moving), tuple(t[n] for n in moving)
    out |= dict(zip(("to", "tL"), torch.func.jvp(along, xm, tm)[1]))
    def pull(*y): return torch.func.vjp(along, *y[:len(xm)])[1]((y[-2], y[-1]))
    o, L = at(x)
    hvp = torch.func.jvp(pull, (*xm, s.do, absent(s.dL, L)), (*tm, absent(s.tdo, o), absent(s.tdL, L)))[1]
    out |= {f"h{names[n]}": y for n, y in zip(moving, hvp)}
    def push(*y): return torch.func.jvp(along, y[:len(xm)], y[len(xm):])[1]
    rof = torch.func.vjp(push, *xm, *tm)[1]((s.do, absent(s.dL, L)))
    return out | {f"r{n}": y for n, y in zip([names[n] for n in moving] + ["t" + names[n] for n in moving], rof)}


# The judgment is that of test_surface: an error is relative to the true derivative, or where that vanishes by cancellation to half of what it would be if the row statistics
# stood still (a hundredth of a quarter would be less than one operand loses when it is rounded to bfloat16); the limit is twice the error of the formula with PyTorch's precision, and not less than the tolerance of the type.

def failures(c, p):
    s = of_problem(c, p)
    wide = Sample(*(tuple(y if y is s.args[4] else up(y) for y in v) if isinstance(v, tuple) else v if isinstance(v, dict) else up(v) for v in s))
    seed, (q, k) = s.args[4], s.args[:2]
    drop = None if seed is None else dropout_mask(seed, *q.shape[:3], k.shape[2], s.options["dropout_p"])
    truth, size = (maps(partial(formula, torch.float64, frozen, drop), wide) for frozen in (False, True))
    plain = maps(partial(formula, torch.float32, False, drop), s)
    try: got = maps(fused, s)
    except Exception as e: return [f"{c} {p} raises {type(e).__name__}: {e}"]
    bad = []
    for name, y in truth.items():
        scale = float(max(y.norm(), size[name].norm()/2)) or 1.
        error = lambda z: (z.double() - y).norm().item()/scale
        limit = max(2*error(plain[name]) + 1e-6, TOLERANCE[p["dtype"]])
        if got[name].shape != y.shape or not error(got[name]) <= limit: bad.append(f"{name}: {error(got[name]):.1e} above {limit:.1e}")
    return [f"{c} {p} {b}" for b in bad]


def search(seed, n, each):
    r, bad, done = random.Random(seed), [], 0
    while done < n:
        c = kind(r)
        for _ in range(min(each, n - done)):
            bad += failures(c, problem(r, c))
            done += 1
    return bad


def test_random_problems(): assert search(0, 5, 1) == []


@pytest.mark.gpu
def test_many_random_problems():
    total, cores = int(os.environ.get("THERIA_SECOND_ORDER", "300")), min(os.cpu_count(), 16)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    def run(shard):
        done = subprocess.run([sys.executable, __file__, str(1 + shard), str(-(-total//cores))], capture_output=True, text=True, env=env)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else [f"worker {shard}: {done.stderr[-2000:]}"]
    with ThreadPoolExecutor(cores) as pool: bad = [b for result in pool.map(run, range(cores)) for b in result]
    assert bad == [], f"{len(bad)} failures"


# Sizes and configurations that only a GPU can run

@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_pinned_configuration_of_double_backward(D, is_causal):
    s = sample(torch.bfloat16, 2, 4, 4, 528, 528, D, D, is_causal=is_causal, scale=D**-.5)
    o, L = forward(*s.args, **s.options)
    dq = backward(*s.args, o, L, s.do, **s.options).q
    args, kw = [up(x) for x in s.args[:4]], dict(scale=D**-.5, is_causal=is_causal)
    theirs, ddo, _ = reference.double_backward(*args, *reference.forward(*args, **kw), up(s.do), None, *map(up, s.t), **kw)
    configs = lambda op: {tuning.Config(*c) for arch in tuning.table().values() for n, c in arch.get(op, {}).items() if c and f" D{D}" in n and n.startswith("bfloat16")} | {None}
    first = None
    for cq in configs("double_q"):
        for ckv in configs("tangent_kv"):
            for _ in range(2):
                g, to, _ = double_backward(*s.args, o, L, s.do, None, dq, *s.t, config_q=cq, config_kv=ckv, **s.options)
                for a, b in zip((g.q, g.k, g.v, to), (theirs.q, theirs.k, theirs.v, ddo)): assert rel_err(a, b) <= 4e-3, (cq, ckv, rel_err(a, b))
                first = first or {}
                for n, a in enumerate((g.q, g.k, g.v, to)): assert torch.equal(first.setdefault((cq, ckv, n), a), a)


@pytest.mark.gpu
def test_memory_of_a_second_order_step_is_linear():
    x = [torch.randn(1, 8, 16384, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(4)]
    u = [torch.randn_like(y) for y in x[:3]]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = attend(*x[:3], None, None, 0.125, False, 0., "exact")[0]
    torch.autograd.grad(torch.autograd.grad(o, x[:3], x[3], create_graph=True), x, u)
    assert torch.cuda.max_memory_allocated() - before <= 12*x[0].nbytes


@pytest.mark.gpu
def test_a_second_order_step_as_a_cuda_graph():
    static = [torch.randn(2, 4, 100, 64, device="cuda", dtype=torch.float16) for _ in range(7)]
    def step():
        leaves = [y.detach().requires_grad_() for y in static[:4]]
        grads = torch.autograd.grad(attend(*leaves[:3], None, None, 0.125, True, 0., "exact")[0], leaves[:3], leaves[3], create_graph=True)
        return torch.autograd.grad(grads, leaves, static[4:])
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3): step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream): out = step()
    for seed in range(3):
        torch.manual_seed(seed)
        for y in static: y.normal_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(out, step()): assert torch.equal(a, b)


@pytest.mark.gpu
def test_plans_tell_streams_and_alignments_apart():
    base = [torch.randn(2*4*100*64 + 8, device="cuda", dtype=torch.float16) for _ in range(8)]
    for shift in (0, 1, 0, 3):
        x = [b[shift:shift + 2*4*100*64].view(2, 4, 100, 64) for b in base]
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            o, L = forward(*x[:3], None, None, scale=0.125)
            g, to, _ = double_backward(*x[:3], None, None, o, L, x[3], None, backward(*x[:3], None, None, o, L, x[3], scale=0.125).q, *x[4:7], None, scale=0.125)
        torch.cuda.synchronize()
        y = [up(a) for a in x]
        theirs, ddo, _ = reference.double_backward(*y[:3], None, *reference.forward(*y[:3], scale=0.125), y[3], None, *y[4:7], scale=0.125)
        for a, b in zip((g.q, g.k, g.v, to), (theirs.q, theirs.k, theirs.v, ddo)): assert rel_err(a, b) <= TOLERANCE[torch.float16]


if __name__ == "__main__": print(json.dumps(search(int(sys.argv[1]), int(sys.argv[2]), 5)))
