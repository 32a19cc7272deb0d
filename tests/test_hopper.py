"The warp-specialised kernels for Hopper: compiled everywhere, run on a GPU."
import os
import subprocess
import sys

import pytest
import torch

from theria.attention import hopper, launch, ops, reference, tuning
from theria.attention.contract import rel_err

SHAPES = [(1, 2, 2, 256, 256), (2, 4, 2, 1000, 777), (1, 2, 1, 100, 1300), (1, 1, 1, 333, 5), (1, 2, 2, 130, 65), (3, 2, 1, 65, 127)]
COMPILE = """
from theria.attention import gate, tuning
from theria.attention.hopper import SPECIALS, Stream, assemble
from theria.attention import hopper_backward, hopper_forward, hopper_tangent
for op, (kernel, constants) in SPECIALS.items():
    entries = {tuple(name.split()[1:]): entry for name, entry in tuning.table()["sm_90"][op + " hopper"].items()}
    for (D, *causal), entry in entries.items():
        found = gate.resources(assemble(op, "bfloat16", int(D[1:]), bool(causal), Stream(*entry)), 90)
        assert found.shared <= 232_448 and found.spills <= 256 and not found.waits, (op, D, causal, entry, found)
        print(op, D, *causal, found)
"""


def test_every_entry_compiles_without_waits():
    "Shared memory within bounds, (next to) nothing spilt, no product that waits for another."
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == sum(len(entries)//2 for op, entries in tuning.table()["sm_90"].items() if op.endswith(" hopper"))


def test_both_half_precisions_are_filed():
    for op, entries in tuning.table()["sm_90"].items():
        if op.endswith(" hopper"): assert {n.split(maxsplit=1)[1] for n in entries if n.startswith("float16")} == {n.split(maxsplit=1)[1] for n in entries if n.startswith("bfloat16")}


@pytest.fixture
def used(monkeypatch):
    "Every problem is worth it; the passes that took one are noted."
    taken = []
    monkeypatch.setattr(hopper, "worth", lambda op, D: 0)
    for op, f in list(launch.SPECIAL.items()):
        def noted(x, *options, f=f, op=op):
            found = f(x, *options)
            if isinstance(found, hopper.Streamed): taken.append(op)
            return found
        monkeypatch.setitem(launch.SPECIAL, op, noted)
    monkeypatch.setattr(tuning, "SHORT", 0) # the forms for large problems
    launch._plans.clear()
    yield taken
    launch._plans.clear()


def problem(D, shape, dtype, strided):
    (B, Hq, Hkv, Lq, Lk), like = shape, dict(device="cuda", dtype=dtype)
    def matrix(H, L): return torch.randn(B, L, H, D, **like).transpose(1, 2) if strided else torch.randn(B, H, L, D, **like)
    return [matrix(H, L) for H, L in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk), (Hq, Lq), (Hq, Lq), (Hkv, Lk), (Hkv, Lk))] # q k v do tq tk tv


def check(D, shape, dtype, is_causal, strided=False):
    q, k, v, do, tq, tk, tv = x = problem(D, shape, dtype, strided)
    kw, numbers = dict(scale=D**-.5, is_causal=is_causal), (D**-.5, is_causal, 0.)
    q2, k2, v2, do2, *t2 = [y.double() for y in x]
    o2, L2 = reference.forward(q2, k2, v2, None, **kw)
    to2, r2 = reference.jvp(q2, k2, v2, None, o2, L2, *t2, None, **kw)
    o, L = ops.IMPLEMENTATIONS["forward"](q, k, v, None, None, *numbers)
    ol, Ll = o2.to(dtype), L2.float()
    made = {"o": (o, o2), "L": (L, L2)}
    grads = ops.IMPLEMENTATIONS["backward"](q, k, v, None, None, ol, Ll, do, None, *numbers, False)
    made |= {n: (a, b) for n, a, b in zip(("dq", "dk", "dv"), grads, reference.backward(q2, k2, v2, None, o2, L2, do2, None, **kw))}
    to, r = ops.IMPLEMENTATIONS["jvp"](q, k, v, None, None, ol, Ll, tq, tk, tv, None, *numbers, "exact")
    made |= {"to": (to, to2), "r": (r, r2)}
    g2 = reference.tangent_backward(q2, k2, v2, None, o2, L2, do2, None, *t2, **kw).tgrads
    g = ops.IMPLEMENTATIONS["tangent_backward"](q, k, v, None, None, ol, Ll, do, None, tq, tk, tv, None, None, None, to2.to(dtype), r2.float(), *numbers, False)
    made |= {n: (a, b) for n, a, b in zip(("gq", "gk", "gv"), g, g2)}
    for n, (a, b) in made.items(): assert rel_err(a, b) < (1e-2 if n in ("gq", "gk", "gv") else 6e-3), (n, rel_err(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("D", (64, 128))
def test_against_float64(used, D, is_causal):
    if torch.cuda.get_device_capability() != (9, 0): pytest.skip("needs a Hopper GPU")
    for shape in SHAPES: check(D, shape, torch.bfloat16, is_causal)
    check(D, SHAPES[1], torch.float16, is_causal)
    check(D, SHAPES[1], torch.bfloat16, is_causal, strided=True)
    filed = {op.split()[0] for op, entries in tuning.table()["sm_90"].items() if op.endswith(" hopper") and tuning.entry_name(torch.bfloat16, D, is_causal) in entries}
    assert {"tangent_kv" if op == "tangent_pair" else op for op in filed} == set(used)


@pytest.mark.gpu
def test_what_they_do_not_know_goes_to_triton(used):
    q = torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    f = lambda q, bias=None: ops.IMPLEMENTATIONS["forward"](q, q, q, bias, None, .125, False, 0.)
    f(q, torch.zeros(1, 1, 256, 256, device="cuda", dtype=torch.bfloat16)), f(q.float()), f(q[:, :, :, :48].contiguous()), f(q[..., ::2]), f(q[:, :1].expand(1, 2, -1, -1))
    assert not used


@pytest.mark.gpu
def test_the_same_bits_each_time(used):
    if torch.cuda.get_device_capability() != (9, 0): pytest.skip("needs a Hopper GPU")
    q, k, v, do, tq, tk, tv = problem(128, (2, 4, 2, 1000, 777), torch.bfloat16, False)
    def once():
        o, L = ops.IMPLEMENTATIONS["forward"](q, k, v, None, None, .1, False, 0.)
        to, r = ops.IMPLEMENTATIONS["jvp"](q, k, v, None, None, o, L, tq, tk, tv, None, .1, False, 0., "exact")
        return [o, L, to, r, *ops.IMPLEMENTATIONS["backward"](q, k, v, None, None, o, L, do, None, .1, False, 0., False)[:3],
                *ops.IMPLEMENTATIONS["tangent_backward"](q, k, v, None, None, o, L, do, None, tq, tk, tv, None, None, None, to, r, .1, False, 0., False)[:3]]
    first = once()
    for _ in range(5): assert all(torch.equal(a, b) for a, b in zip(first, once()))
