"One pass of AdamW: against PyTorch in float64, inside a training step, as a graph, and the compile gate."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.contract import rel_err
from theria.neural_process.adamw import BLOCK, AdamW
from theria.neural_process.training import Optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pair(sizes, dtype=torch.bfloat16, decay=.1):
    params = [torch.nn.Parameter(torch.randn(n, device=DEVICE).to(dtype)) for n in sizes]
    twins = [torch.nn.Parameter(p.detach().double()) for p in params]
    return params, twins, AdamW(params, torch.tensor(1e-2, device=DEVICE), decay), torch.optim.AdamW(twins, lr=1e-2, weight_decay=decay)


def give(params, twins, factor=1.):
    for p, q in zip(params, twins):
        p.grad = (torch.randn_like(p.float())*factor).to(p.dtype)
        q.grad = p.grad.double()


@settings(max_examples=6)
@given(sizes=st.lists(st.sampled_from((1, 7, 8, 40, BLOCK - 1, BLOCK, BLOCK + 8, 3*BLOCK)), min_size=1, max_size=18), dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_masters_are_those_of_pytorch(sizes, dtype):
    params, twins, ours, theirs = pair(sizes, dtype)
    for t in range(4):
        give(params, twins, 10.**-t)
        ours.step()
        theirs.step()
    for p, q, master in zip(params, twins, ours.views(ours.theta), strict=True):
        assert (master.double() - q).norm() <= 1e-6*(q.norm() + 1e-2) and p.dtype == dtype
        if DEVICE == "cuda": assert torch.equal(p.detach(), master.to(dtype))  # Triton's interpreter cuts off instead of rounding


def test_nothing_spills_over_the_end_of_a_tensor():
    params, twins, ours, _ = pair([5, BLOCK + 3])
    for p in params:
        big = torch.full((p.numel() + 64,), 1e30, device=DEVICE, dtype=p.dtype)
        big[:p.numel()] = 0.
        p.grad = big[:p.numel()]
    before = [m.clone() for m in ours.views(ours.theta)]
    ours.step()
    for m, b in zip(ours.views(ours.theta), before): assert rel_err(m, b*(1 - 1e-3)) < 1e-6
    assert not ours.v.any() and ours.theta.isfinite().all()


@pytest.mark.parametrize("clip", [None, .5, 1e9])
def test_the_optimizer_is_the_same_with_either(clip):
    start = [torch.randn(n, device=DEVICE).bfloat16() for n in (6, BLOCK + 1, 300)]
    both = [Optimizer([torch.nn.Parameter(x.clone()) for x in start], 1e-2, .1, clip, adamw=how) for how in ("fused", "reference")]
    for t in range(5):
        grads = [torch.randn_like(x) for x in start]
        for o in both:
            o.set_lr(1e-2/(1 + t))
            for p, g in zip(o.params, grads): p.grad = g.clone()
            o.step()
    assert both[0].fused and not both[1].fused
    for a, b in zip(*(o.masters for o in both), strict=True): assert rel_err(a, b) < 1e-5
    for a, b in zip(*(o.params for o in both), strict=True): assert rel_err(a, b) < 2**-7


def test_parts_may_come_one_by_one():
    start = [torch.randn(n, device=DEVICE).bfloat16() for n in (20, BLOCK, 9)]
    whole, apart = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    one, two = Optimizer(whole, 1e-2, adamw="fused"), Optimizer(apart, 1e-2, parts=[apart[1:], apart[:1]], adamw="fused")
    for o in (one, two):
        for p, x in zip(o.params, start): p.grad = x.clone()
    one.step()
    for i in (1, 0): two.step(i)
    assert all(torch.equal(a, b) for a, b in zip(one.masters, two.masters, strict=True))


def gate():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from theria.neural_process import adamw
    kernel, found = adamw._adamw, []
    for N, clip, even in ((8, False, True), (5, True, True), (1, False, False)):
        types, values, hints = {}, {}, {}
        fixed = dict(N=N, CLIP=clip, EVEN=even, BLOCK=BLOCK)
        for n, name in enumerate(kernel.arg_names):
            if name in fixed: types[name], values[n,] = "constexpr", fixed[name]
            elif re.fullmatch(r"g\d", name) and int(name[1]) >= N or name == "p_clip" and not clip: types[name], values[n,] = "constexpr", None
            elif re.fullmatch(r"g\d|p_\w+", name): types[name], hints[n,] = "*bf16" if name[0] == "g" or name == "p_w" else "*fp32", [["tt.divisibility", 16]]
            else: types[name] = "i32" if name == "start" or re.fullmatch(r"[es]\d", name) else "fp32"
        k = triton.compile(ASTSource(kernel, types, values, hints), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=1))
        found.append(dict(even=even, N=N, ptx=k.asm["ptx"]))
    print(json.dumps(found))


def test_it_reads_in_long_words_and_does_not_spill(tmp_path):
    import triton
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for k in json.loads(done.stdout):
        (tmp_path/"k.ptx").write_text(k["ptx"])
        said = subprocess.run([Path(triton.__path__[0])/"backends/nvidia/bin/ptxas", "-v", "--gpu-name=sm_90a", "k.ptx", "-o", "k.cubin"], capture_output=True, text=True, cwd=tmp_path)
        assert "0 bytes spill stores" in said.stderr + said.stdout
        narrow = len(re.findall(r"ld\.global\.b16", k["ptx"]))
        assert (narrow == 0) == k["even"], k["N"]


@pytest.mark.gpu
def test_as_a_graph():
    from theria.bench import captured
    params, twins, ours, theirs = pair([BLOCK*5 + 8, 64, 8])
    give(params, twins)
    before = [x.clone() for x in (*ours.tensors(), ours.w)]
    replay, _ = captured(lambda: ours.step)
    for x, b in zip((*ours.tensors(), ours.w), before): x.copy_(b)
    for _ in range(3):
        replay()
        theirs.step()
    for q, master in zip(twins, ours.views(ours.theta), strict=True): assert rel_err(master, q) < 1e-6


if __name__ == "__main__": gate()
