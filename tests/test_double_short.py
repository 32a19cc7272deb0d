"Second order in one tile: every size, mask and dtype against float64; what the rule admits compiles without spilling; on a GPU, the public call takes it."
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

SIZES = [(1, 128), (2, 3), (31, 33), (64, 1), (65, 64), (127, 100)]


def errors(s, dL=True):
    "Relative errors of both orders, named."
    from theria.attention import reference
    from theria.attention.contract import rel_err
    from theria.attention.double_short import backward_short, double_short
    from theria.attention.forward import forward
    from theria.attention.samples import for_reference, poisoned, up
    o, L = forward(*s.args, **s.options)
    cL = s.dL if dL else None
    with poisoned():
        grads, to, r = double_short(*s.args, o, L, s.do, cL, *s.t[:3], **s.options)
        first = backward_short(*s.args, L, s.do, cL, **s.options)
    args, kw = for_reference(s)
    saved = reference.forward(*args, **kw)
    theirs, ref_to, ref_r = reference.double_backward(*args, *saved, up(s.do), up(cL), *map(up, s.t[:3]), **kw)
    ref_first = reference.backward(*args, *saved, up(s.do), up(cL), **kw)
    ours = dict(gq=grads.q, gk=grads.k, gv=grads.v, ddo=to, ddL=r, dq=first.q, dk=first.k, dv=first.v)
    wanted = dict(gq=theirs.q, gk=theirs.k, gv=theirs.v, ddo=ref_to, ddL=ref_r, dq=ref_first.q, dk=ref_first.k, dv=ref_first.v)
    assert all(x.isfinite().all() for x in ours.values())
    return {n: 0. if (ours[n].double() - wanted[n]).norm() <= 1e-6 else rel_err(ours[n], wanted[n]) for n in ours}


@pytest.mark.parametrize("Lq, Lk", SIZES)
def test_sizes(Lq, Lk):
    from theria.attention.contract import TOLERANCE
    from theria.attention.samples import sample
    s = sample(B=1, Lq=Lq, Lk=Lk, D=20, Dv=40, is_causal=(Lq + Lk) % 2 == 1, seed=Lq)
    assert max(errors(s).values()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("options", [dict(mask="bool"), dict(mask="holes"), dict(mask="row", p=0.3), dict(mask="dead", is_causal=True), dict(Hq=4, Hkv=2, Lq=70, p=0.1), dict(dtype=torch.bfloat16)])
def test_masks_heads_and_dropout(options):
    from theria.attention.contract import TOLERANCE
    from theria.attention.samples import sample
    s = sample(**(dict(B=2, Lq=40, Lk=70, D=32, Dv=32) | options))
    found = errors(s, dL="dtype" not in options)
    assert max(found.values()) <= TOLERANCE[s.do.dtype], found


def test_a_wrong_sign_would_be_seen():
    "The check itself: a kernel that forgot the projection of Y (@eq-short-second) would miss by far more than the tolerance."
    from theria.attention import reference
    from theria.attention.contract import rel_err
    from theria.attention.samples import for_reference, sample, up
    s = sample(B=1, Lq=20, Lk=30)
    args, kw = for_reference(s)
    saved = reference.forward(*args, **kw)
    right = reference.double_backward(*args, *saved, up(s.do), None, *map(up, s.t[:3]), **kw)[0]
    p = reference.probabilities(reference.scores(*args[:2], scale=kw["scale"]), saved[1])
    w = p*(reference.tangent_scores(args[0], args[1], *map(up, s.t[:2]), scale=kw["scale"]))
    w -= p*w.sum(-1, keepdim=True)
    a = up(s.do) @ args[2].mT
    u = a - (p*a).sum(-1, keepdim=True)
    y = w*u + p*(up(s.do) @ up(s.t[2]).mT)
    gq = lambda e: reference.to_q(e, args[1], kw["scale"]) + reference.to_q(p*u, up(s.t[1]), kw["scale"])
    assert rel_err(gq(y - p*y.sum(-1, keepdim=True)), right.q) < 1e-12 and rel_err(gq(y), right.q) > 1e-2


def compiles():
    "Every form that the rule admits: no spill beyond a few registers' worth, no product that waits for another, room in shared memory."
    import triton
    from theria.attention import gate
    from theria.attention.double_short import _backward_short, _double_short, tile_for
    given, masked = dict(p_dL="*fp32"), dict(BIAS=1, bias_j=1, p_bias="*i1")
    forms = [(128, "bf16", {}), (128, "fp16", given), (128, "bf16", dict(CAUSAL=True)), (128, "bf16", masked), (64, "bf16", masked | given)]
    forms.append((64, "bf16", dict(ONE=False, BM=128, G="i32")))
    for kernel, (sizes, dtype, form) in product((_double_short, _backward_short), forms):
        c, names = tile_for(form.get("BM", sizes), sizes), kernel.arg_names
        types = {n: v for n, v in form.items() if isinstance(v, str)}
        constants = dict.fromkeys(("p_bias", "p_seed", "p_dL")) | dict(D=64, DV=64, BD=64, BDV=64, BM=c.BM, BN=c.BN, BIAS=0, CAUSAL=False, DROP=False, ONE=True, G=1, PRECISION="ieee")
        constants = {n: v for n, v in (constants | form).items() if n not in types}
        numbers = dict(scale="fp32", scale2="fp32", keep_scale="fp32", threshold="i64", p_L="*fp32", p_r="*fp32")
        kind = lambda n: "constexpr" if n in constants else types.get(n) or numbers.get(n) or (f"*{dtype}" if n.startswith("p_") else "i32")
        hints = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and (n.startswith("p_") or n[-2:] in ("_b", "_h", "_l"))}
        source = triton.compiler.ASTSource(kernel, {n: kind(n) for n in names}, {(names.index(n),): v for n, v in constants.items()}, hints)
        k = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=dict(num_warps=c.warps, num_stages=c.stages))
        r = gate.resources(k, 90)
        assert "wgmma" in k.asm["ptx"] and not r.waits and r.spills <= (32 if form.get("ONE", True) else 256) and r.shared <= gate.SHARED[90], (kernel.__name__, c, dtype, form, r)
        assert not gate.miscompiled(k, kernel.__name__), (c, dtype, form, gate.miscompiled(k))
    print("compiled")


def test_what_the_rule_admits_compiles(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout.strip() == "compiled", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("Lq, Lk", [(1, 128), (16, 16), (31, 33), (32, 32), (64, 64), (65, 64), (64, 65), (127, 100), (128, 128), (100, 16)])
def test_on_the_device(Lq, Lk, dtype):
    "Sizes at which the true answer is not all cancellation, as it is in a row that sees a single key."
    from theria.attention.contract import TOLERANCE
    from theria.attention.double_short import takes_short
    from theria.attention.samples import sample
    for options in ({}, *[dict(is_causal=True)]*(Lq > 1), dict(mask="bool"), dict(mask="dead")):
        s = sample(dtype, B=3, Hq=5, Hkv=5, Lq=Lq, Lk=Lk, D=64, Dv=64, **options)
        assert takes_short(*s.args[:4])
        found = errors(s)
        assert max(found.values()) <= TOLERANCE[dtype], (options, found)


@pytest.mark.gpu
@pytest.mark.parametrize("Lq, Lk, Hq", [(300, 64, 4), (564, 64, 4), (100, 100, 8), (129, 33, 4)])
def test_several_steps_on_the_device(Lq, Lk, Hq):
    from theria.attention.contract import TOLERANCE
    from theria.attention.samples import sample
    found = errors(sample(torch.bfloat16, B=2, Hq=Hq, Hkv=4, Lq=Lq, Lk=Lk, D=64, Dv=64))
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@pytest.mark.gpu
def test_the_general_calls_take_it_and_repeat_their_bits():
    from theria.attention.backward import backward
    from theria.attention.forward import forward
    from theria.attention.launch import listening, unheard, launch
    from theria.attention.samples import sample
    from theria.attention.tangent_backward import double_backward
    s, heard = sample(torch.bfloat16, B=16, Hq=8, Hkv=8, Lq=128, Lk=128, D=64, Dv=64), []
    def hear(kernel, programs, args, config, **constants):
        heard.append(kernel.__name__)
        with unheard(): launch(kernel, programs, args, config, **constants)
    o, L = forward(*s.args, **s.options)
    runs = []
    for _ in "ab":
        with listening(hear):
            d = backward(*s.args, o, L, s.do, **s.options)
            g, to, r = double_backward(*s.args, o, L, s.do, None, d.q, *s.t, **s.options)
        runs.append((*d[:3], *g[:3], to, r))
    assert heard == ["_backward_short", "_double_short"]*2
    assert all(torch.equal(a, b) for a, b in zip(*runs))


if __name__ == "__main__": compiles()
