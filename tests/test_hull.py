"The hull and the core of a mask are what they are defined to be, for any mask; and on a GPU as in the interpreter."
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

NOWHERE = 2**31 - 1


def runs(visible, free, S):
    "lo, hi, a, b of one block by counting: (rows, columns) each, in patches of S columns."
    n = visible.shape[1]
    seen, common = ([bool(f(x[:, t:t + S])) for t in range(0, n, S)] for x, f in ((visible, np.any), (free, np.all)))
    b = max((t + 1 for t in range(len(common)) if common[t]), default=0)
    a = b
    while a > 0 and common[a - 1]: a -= 1
    first, last = (seen.index(True), len(seen) - seen[::-1].index(True)) if any(seen) else (None, None)
    return [S*first if any(seen) else NOWHERE, min(S*last, n) if any(seen) else 0, S*a, min(S*b, n)]


def expected(mask, Lq, Lk, by_keys):
    m = mask.expand(*mask.shape[:2], Lq, Lk).numpy()
    visible, free = (m, m) if mask.dtype == torch.bool else (m != -np.inf, m == 0)
    R, S = (32 if n > 1 else length for n, length in zip(mask.shape[2:], (Lq, Lk)))
    if by_keys: visible, free, R, S = visible.swapaxes(2, 3), free.swapaxes(2, 3), S, R
    return [[[runs(visible[b, h, n:n + R], free[b, h, n:n + R], S) for n in range(0, visible.shape[2], R)] for h in range(m.shape[1])] for b in range(m.shape[0])]


@st.composite
def a_mask(draw):
    "Rows with one or two runs of visible keys, whose ends wander: bands, documents, sinks, paddings; a few faults strewn in; in any broadcast form and any order in memory."
    Lq, Lk = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    sizes = [draw(st.sampled_from([1, n])) for n in (2, 2, Lq, Lk)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    j, slope = np.arange(sizes[3]), rng.choice([-1, 0, 1, 2])
    m = np.zeros(sizes, dtype=bool)
    for _ in range(rng.integers(0, 3)):
        lo, hi = np.sort(rng.integers(-20, sizes[3] + 20, (2, *sizes[:2], 1, 1)), 0)
        at = slope*np.arange(sizes[2])[:, None]
        m |= (j >= lo + at) & (j < hi + at)
    m ^= rng.random(sizes) < draw(st.sampled_from([0., 0., 0.01, 0.5]))
    order = draw(st.permutations(range(4)))
    x = torch.from_numpy(m).permute(*order).contiguous().permute(*np.argsort(order).tolist())
    if draw(st.booleans()): x = torch.where(x, 0., -torch.inf) + (torch.rand(x.shape) < 0.02)
    return x, Lq, Lk


@given(a_mask())
@settings(max_examples=60)
def test_tables_are_what_they_are_defined_to_be(problem):
    from theria.attention.hull import hull
    mask, Lq, Lk = problem
    rows, cols = hull(mask.to("cuda") if torch.cuda.is_available() else mask, Lq, Lk)
    assert rows.tolist() == expected(mask, Lq, Lk, False)
    assert cols.tolist() == expected(mask, Lq, Lk, True)


def long_masks(n): # of more patches than the n of a chunk, so that runs cross from one into the next
    n, m = n*32, torch.ones(3, n*32 + 616, dtype=torch.bool)
    m[0, :n//2], m[1, n//2 + 100:n//2 + 101], m[2, n - 256:n - 250] = False, False, False
    yield m[None, None]
    m = torch.ones(2, 2*n, dtype=torch.bool)
    yield m[None, None]
    m[:, n + 500:] = False
    yield m[None, None]
    m[:, n - 1:] = False
    yield torch.where(m, 0., -torch.inf)[None, None].contiguous()


def test_runs_cross_chunks(monkeypatch):
    "With chunks of 32 patches, where a call has more."
    import theria.attention.hull  # noqa: F401, the module is behind a function of the same name
    module = sys.modules["theria.attention.hull"]
    monkeypatch.setattr(module, "SUM_UP", module.SUM_UP._replace(BN=32))
    for mask in long_masks(32):
        Lq, Lk = mask.shape[2:]
        rows, cols = module.hull(mask, Lq, Lk)
        assert rows.tolist() == expected(mask, Lq, Lk, False) and cols.tolist() == expected(mask, Lq, Lk, True), mask.shape


def test_an_empty_hull_begins_at_zero():
    "Loads run ahead of a loop's steps: a walk over nothing that began at the largest integer would overflow into an address."
    global hull_range, tl # a kernel looks names up here
    import triton
    import triton.language as tl
    from theria.attention.hull import hull, hull_range

    @triton.jit
    def kernel(p_hull, p_out, n_rows, n, H: tl.constexpr, STEP: tl.constexpr):
        lo, hi, core = hull_range(p_hull, (0, 0, 4), 0, 0, tl.program_id(0)*H, n_rows, 0, n, H, STEP)
        p_out += tl.program_id(0)*4
        tl.store(p_out, lo)
        tl.store(p_out + 1, hi)
        tl.store(p_out + 2, core[0] + core[1])
        tl.store(p_out + 3, core[1])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for mask in (torch.zeros(1, 1, 300, 200, dtype=torch.bool), torch.full((1, 1, 300, 200), -torch.inf)):
        for table, rows, n in zip(hull(mask.to(device), 300, 200), (300, 200), (200, 300)):
            for H, STEP in ((16, 32), (64, 32), (128, 64)):
                out = torch.full((-(-rows//H), 4), -1, dtype=torch.int32, device=device)
                kernel[(len(out),)](table, out, rows, n, H=H, STEP=STEP)
                assert (out == 0).all(), (mask.dtype, H, STEP, out)


def compiles():
    "Registers, spills and shared memory on sm_90, for masks that lie in rows, in columns, and additive ones; and the kernels that read the tables."
    import triton
    from theria.attention import gate, tuning
    from theria.attention.gate import resources
    from theria.attention.hull import LOOK, SUM_UP, _look, _sum_up
    forms = [(_look, LOOK, dict(p_mask="*u8", mask_j=1, W=LOOK.BN, ADDED=False), True), (_look, LOOK, dict(p_mask="*u8", mask_i=1, W=LOOK.BN, ADDED=False), True), (_look, LOOK, dict(p_mask="*u8", W=LOOK.BN, ADDED=False), False),
             (_look, LOOK, dict(p_mask="*fp32", mask_j=1, W=LOOK.BN//4, ADDED=True), True), (_look, LOOK, dict(p_mask="*bf16", W=LOOK.BN//4, ADDED=True), False), (_sum_up, SUM_UP, dict(W=SUM_UP.BN), True)]
    for kernel, c, form, aligned in forms:
        names, pointers = kernel.arg_names, dict(p_patches="*u8", p_rows="*i32", p_cols="*i32")
        constants = {n: v for n, v in form.items() if n != "p_mask"}
        types = {n: "constexpr" if n in constants else form.get(n) or pointers.get(n, "i32") for n in names}
        hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and (n.startswith("p_") or aligned and n in ("mask_b", "mask_h", "mask_i", "mask_j", "ni", "nj"))}
        source = triton.compiler.ASTSource(kernel, types, {(names.index(n),): x for n, x in constants.items()}, hints)
        k = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=dict(num_warps=c.warps, num_stages=c.stages))
        r = resources(k, 90)
        assert r.spills == 0 and r.registers <= 168 and r.shared <= 65_536 and not gate.miscompiled(k, kernel.__name__), (kernel.__name__, form, r)
        assert "mask_j" not in form or re.search(r"ld\.global\.v(4\.b32|2\.b64)", k.asm["ptx"]), "loads one element at a time"
    for op, entries in tuning.table()["sm_90"].items():
        for name in entries:
            if not name.startswith("bfloat16") or "hull" not in name.split(): continue
            present = dict(p_bias="i1", p_hull="i32", p_rows="i32", p_cols="i32") | ({"p_tdo": "bf16", "p_tdL": "fp32"} if "tdo" in name.split() else {})
            k = gate.compile(op, "bfloat16", int(name.split()[1][1:]), False, tuning.Config(*entries[name]), 90, present=present, BIAS=1, bias_j=1)
            r = resources(k, 90)
            assert not r.waits and r.spills <= 160 and r.shared <= gate.SHARED[90] and not gate.miscompiled(k, op), (op, name, r, gate.miscompiled(k))
    print("compiled")


def test_compiles_for_a_gpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[-3000:]


def test_the_switch(monkeypatch):
    from theria.attention.hull import worth_a_hull
    mask = torch.ones(1, 1, 600, 600, dtype=torch.bool)
    assert worth_a_hull(mask, 8, 600, 600)
    monkeypatch.setattr(sys.modules["theria.attention.hull"], "USED", False)
    assert not worth_a_hull(mask, 8, 600, 600)


@pytest.mark.gpu
def test_on_the_device():
    "The mask of the test-time-training shape, one per batch element, beyond 2**31 bytes from the first to the last."
    from theria.attention.hull import hull
    i, j = torch.arange(1024, device="cuda")[:, None], torch.arange(9216, device="cuda")
    window = ((j <= i + 8192) & (j > i))[None, None]
    for mask in (window, torch.where(window, 0., -torch.inf), window.mT.contiguous().mT, window.expand(300, 1, -1, -1)):
        rows, cols = hull(mask, 1024, 9216)
        first = torch.arange(0, 1024, 32, device="cuda")
        assert (rows == torch.stack([first, (first + 8224).clamp(max=9216), first + 32, first + 8192], -1)[None, None]).all()
        first = torch.arange(0, 9216, 32, device="cuda")
        lo, hi, a, b = (first - 8192).clamp(min=0), (first + 32).clamp(max=1024), (first - 8160).clamp(min=0), first.clamp(max=1024)
        assert (cols == torch.stack([lo, hi, torch.where(b > a, a, 0), torch.where(b > a, b, 0)], -1)[None, None]).all()
    big = torch.zeros(230, 1, 1024, 9216, dtype=torch.bool, device="cuda")
    big[-1] = window[0]
    rows, _ = hull(big, 1024, 9216)
    assert torch.equal(rows[-1], hull(window, 1024, 9216)[0][0]) and (rows[:-1, ..., 1] == 0).all()


def kinds(Lq, Lk, device):
    i, j = torch.arange(Lq, device=device)[:, None], torch.arange(Lk, device=device)
    yield "window", (j <= i + Lk - Lq) & (j > i - Lq//5)
    yield "documents", (i*5//Lq) == (j*5//Lk)
    yield "prefix", (j <= i) | (j < Lk//4)
    yield "dead rows", (i % 100 > 70) & (j < Lk - 77)
    yield "at random", torch.rand(Lq, Lk, device=device) > 0.5


def compare(name, m, dtype, D, Dv, tolerance, forms, **sizes):
    "Both orders in both modes against float64."
    from theria.attention import reference
    from theria.attention.backward import backward
    from theria.attention.contract import rel_err
    from theria.attention.forward import forward
    from theria.attention.jvp import jvp
    from theria.attention.samples import poisoned, sample, up
    from theria.attention.tangent_backward import double_backward, tangent_backward
    s = sample(dtype, Lq=m.shape[2], Lk=m.shape[3], D=D, Dv=Dv, p=0.1 if name == "prefix" and m.dtype == torch.bool else 0., **sizes)
    args, kw = (*s.args[:3], m, s.args[4]), dict(s.options)
    rkw = dict(scale=kw["scale"], is_causal=False, drop=None)
    if s.args[4] is not None:
        from theria.attention.tiles import dropout_mask
        rkw["drop"] = dropout_mask(s.args[4], *s.args[0].shape[:3], m.shape[3], kw["dropout_p"]).double()
    x = (*map(up, s.args[:3]), up(m))
    saved = reference.forward(*x, **rkw)
    rd = reference.backward(*x, *saved, up(s.do), up(s.dL), **rkw)
    rg, rddo, rddL = reference.double_backward(*x, *saved, up(s.do), up(s.dL), *map(up, s.t[:3]), **rkw)
    rh = reference.tangent_backward(*x, *saved, up(s.do), up(s.dL), *map(up, s.t[:3]), None, up(s.tdo), up(s.tdL), **rkw)
    live = saved[1].isfinite()
    with poisoned():
        o, L = forward(*args, **kw)
        firsts = [backward(*args, o, L, s.do, s.dL, bias_grad=False, **form, **kw) for form in forms]
        to, r = jvp(*args, o, L, *s.t[:3], None, **kw)
        g, ddo, ddL = double_backward(*args, o, L, s.do, s.dL, firsts[0].q, *s.t[:3], None, bias_grad=False, **kw)
        h = tangent_backward(*args, o, L, s.do, s.dL, *s.t[:3], None, s.tdo, s.tdL, to, r, bias_grad=False, **kw)
    pairs = [(o, saved[0]), (L[live], saved[1][live]), *(p for d in firsts for p in zip(d[:3], rd[:3])), (to, rh.to), (r, rh.tL), *zip(g[:3], rg[:3]), (ddo, rddo), (ddL, rddL), *zip(h[:3], rh.tgrads[:3])]
    for n, (a, b) in enumerate(pairs): assert a.isfinite().all() and rel_err(a, b) <= tolerance, (name, m.dtype, n, rel_err(a, b))


def test_kernels_with_tables(monkeypatch):
    "On masks small enough for the interpreter, with walks whole and in parts."
    from importlib import import_module
    from theria.attention.launch import _plans
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in ("forward", "backward", "jvp", "tangent_backward"): monkeypatch.setattr(import_module(f"theria.attention.{module}"), "worth_a_hull", lambda mask, *_: mask is not None)
    _plans.clear()
    forms = dict(form="two", parts=(2, 3)), dict(form="atomic")
    try:
        for name, mask in kinds(110, 130, device):
            if name not in ("window", "prefix", "dead rows"): continue
            m = (torch.where(mask, 0., -torch.inf) if name == "dead rows" else mask)[None, None]
            compare(name, m, torch.float32, 16, 8, 1e-5, forms, B=1, Hq=2, Hkv=1)
    finally: _plans.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, D, Dv", [(torch.bfloat16, 64, 64), (torch.float16, 128, 128), (torch.float32, 64, 64), (torch.bfloat16, 40, 24)])
def test_kernels_with_tables_on_the_device(dtype, D, Dv):
    "On masks that many heads share and that are large enough to get tables."
    from theria.attention.contract import TOLERANCE
    from theria.attention.launch import launch, listening, unheard
    heard = []
    def hear(kernel, programs, args, config, **constants):
        heard.append((kernel.__name__, sum(isinstance(a, torch.Tensor) and a.dtype == torch.int32 for a in args)))
        with unheard(): launch(kernel, programs, args, config, **constants)
    with listening(hear):
        for name, mask in kinds(1000, 1111, "cuda"):
            for m in (mask, torch.where(mask, 0., -torch.inf)): compare(name, m[None, None], dtype, D, Dv, TOLERANCE[dtype], ({}, dict(form="once")), B=1, Hq=8, Hkv=4)
    kernels = {n for n, tables in heard if tables}
    assert {"_forward_kernel", "_backward_q", "_backward_kv", "_backward_once", "_jvp_kernel", "_tangent_q", "_tangent_kv"} <= kernels and (D != 64 or dtype == torch.float32 or "_double_q" in kernels), kernels


if __name__ == "__main__": compiles()
