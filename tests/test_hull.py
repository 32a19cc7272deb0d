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


def long_masks(): # of more patches than a chunk has, so that runs cross from one into the next
    n, m = 512*32, torch.ones(3, 17_000, dtype=torch.bool)
    m[0, :1000], m[1, 2000:2001], m[2, n - 1024:n - 1000] = False, False, False
    yield m[None, None]
    m = torch.ones(2, 2*n, dtype=torch.bool)
    yield m[None, None]
    m[:, n + 500:] = False
    yield m[None, None]
    m[:, n - 1:] = False
    yield torch.where(m, 0., -torch.inf)[None, None].contiguous()


def test_runs_cross_chunks():
    from theria.attention.hull import hull
    for mask in long_masks():
        Lq, Lk = mask.shape[2:]
        rows, cols = hull(mask, Lq, Lk)
        assert rows.tolist() == expected(mask, Lq, Lk, False) and cols.tolist() == expected(mask, Lq, Lk, True), mask.shape


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
    present = dict(p_bias="i1", p_hull="i32", p_rows="i32", p_cols="i32")
    for op, entries in tuning.table()["sm_90"].items():
        for name in entries:
            if not name.startswith("bfloat16") or "hull" not in name.split(): continue
            k = gate.compile(op, "bfloat16", int(name.split()[1][1:]), False, tuning.Config(*entries[name]), 90, present=present, BIAS=1, bias_j=1)
            r = resources(k, 90)
            assert not r.waits and r.spills <= gate.spills_allowed(op, "bfloat16", 64, True) and r.shared <= gate.SHARED[90] and not gate.miscompiled(k, op), (op, name, r, gate.miscompiled(k))
    print("compiled")


def test_compiles_for_a_gpu(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[-3000:]


def test_tables_are_off_until_a_device_has_run_them(used):
    "The switch does what it says, both ways."
    from theria.attention.hull import worth_a_hull
    mask = torch.ones(1, 1, 600, 600, dtype=torch.bool)
    assert worth_a_hull(mask, 8, 600, 600)
    sys.modules["theria.attention.hull"].USED = False
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


@pytest.fixture
def used(monkeypatch):
    "Within, masks that are worth it have tables."
    import theria.attention.hull
    from theria.attention.launch import _plans
    monkeypatch.setattr(sys.modules["theria.attention.hull"], "USED", True)
    _plans.clear()
    yield
    _plans.clear()


def kinds(Lq, Lk, device):
    i, j = torch.arange(Lq, device=device)[:, None], torch.arange(Lk, device=device)
    yield "window", (j <= i + Lk - Lq) & (j > i - 200)
    yield "documents", (i*5//Lq) == (j*5//Lk)
    yield "prefix", (j <= i) | (j < 300)
    yield "dead rows", (i % 300 > 70) & (j < Lk - 77)
    yield "at random", torch.rand(Lq, Lk, device=device) > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, D, Dv", [(torch.bfloat16, 64, 64), (torch.float16, 128, 128), (torch.float32, 64, 64), (torch.bfloat16, 40, 24)])
def test_kernels_with_tables_on_the_device(dtype, D, Dv, used):
    "Both orders in both modes against float64, on masks that many heads share and that are large enough to get tables."
    from theria.attention import reference
    from theria.attention.backward import backward
    from theria.attention.contract import TOLERANCE, rel_err
    from theria.attention.forward import forward
    from theria.attention.jvp import jvp
    from theria.attention.launch import launch, listening, unheard
    from theria.attention.samples import poisoned, sample, up
    from theria.attention.tangent_backward import double_backward, tangent_backward
    Lq, Lk, heard = 1000, 1111, []
    def hear(kernel, programs, args, config, **constants):
        heard.append((kernel.__name__, sum(isinstance(a, torch.Tensor) and a.dtype == torch.int32 for a in args)))
        with unheard(): launch(kernel, programs, args, config, **constants)
    for name, mask in kinds(Lq, Lk, "cuda"):
        for added in (False, True):
            m = (torch.where(mask, 0., -torch.inf) if added else mask)[None, None]
            s = sample(dtype, B=1, Hq=8, Hkv=4, Lq=Lq, Lk=Lk, D=D, Dv=Dv, p=0.1 if name == "prefix" and not added else 0.)
            args, kw = (*s.args[:3], m, s.args[4]), dict(s.options)
            drop = None
            if s.args[4] is not None:
                from theria.attention.tiles import dropout_mask
                drop = dropout_mask(s.args[4], 1, 8, Lq, Lk, kw["dropout_p"]).double()
            rkw = dict(scale=kw["scale"], is_causal=False, drop=drop)
            with poisoned(), listening(hear):
                o, L = forward(*args, **kw)
                d = backward(*args, o, L, s.do, s.dL, bias_grad=False, **kw)
                to, r = jvp(*args, o, L, *s.t[:3], None, **kw)
                g, ddo, ddL = double_backward(*args, o, L, s.do, s.dL, d.q, *s.t[:3], None, bias_grad=False, **kw)
                h = tangent_backward(*args, o, L, s.do, s.dL, *s.t[:3], None, s.tdo, s.tdL, to, r, bias_grad=False, **kw)
            x = (*map(up, s.args[:3]), up(m))
            saved = reference.forward(*x, **rkw)
            rd = reference.backward(*x, *saved, up(s.do), up(s.dL), **rkw)
            rg, rddo, rddL = reference.double_backward(*x, *saved, up(s.do), up(s.dL), *map(up, s.t[:3]), **rkw)
            rh = reference.tangent_backward(*x, *saved, up(s.do), up(s.dL), *map(up, s.t[:3]), None, up(s.tdo), up(s.tdL), **rkw)
            live = saved[1].isfinite()
            pairs = [(o, saved[0]), (L[live], saved[1][live]), *zip(d[:3], rd[:3]), (to, rh.to), (r, rh.tL), *zip(g[:3], rg[:3]), (ddo, rddo), (ddL, rddL), *zip(h[:3], rh.tgrads[:3])]
            for n, (a, b) in enumerate(pairs): assert a.isfinite().all() and rel_err(a, b) <= TOLERANCE[dtype], (name, added, n, rel_err(a, b))
    kernels = {n for n, tables in heard if tables}
    assert {"_forward_kernel", "_backward_q", "_backward_kv", "_jvp_kernel", "_tangent_q", "_tangent_kv"} <= kernels and (D != 64 or dtype == torch.float32 or "_double_q" in kernels), kernels


if __name__ == "__main__": compiles()
