"""Attention and second derivatives over several processes: gloo on the CPU, NCCL where there are GPUs; always against one process with the whole problem."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from theria.attention.contract import INTERPRETING, ContractError, rel_err
from theria.attention.custom import sdpa_custom
from theria.distributed import all_reduce, context_parallel, inner_gradient, measure_scaling, run_ranks, scaling_figure, shard, unshard
from theria.layers import MultiHeadAttention, TransformerBlock
from theria.records import Record

ROOT = Path(__file__).resolve().parent.parent
GPUS = torch.cuda.device_count()
CASES = [("keys", "contiguous", False), ("keys", "contiguous", True), ("keys", "balanced", True), ("queries", "contiguous", False), ("queries", "contiguous", True)]


def needs(n): return pytest.mark.skipif(GPUS < n, reason=f"needs {n} CUDA devices, and there are {GPUS}")


def problem(Lq, Lk, D, dtype, device):
    gen = torch.Generator().manual_seed(0)
    shapes = (4, Lq), (2, Lk), (2, Lk), (4, Lq), (4, Lq), (2, Lk), (2, Lk)
    return [torch.randn(1, h, n, D, generator=gen, dtype=torch.float64).to(device, dtype) for h, n in shapes]


def orders(attend, q, k, v, do, *u):
    "Output, gradients, gradients of a scalar of the gradients, and a Hessian-vector product."
    x = [t.requires_grad_() for t in (q, k, v)]
    o = attend(*x)
    grads = torch.autograd.grad((o*do).float().sum() if o.dtype != torch.float64 else (o*do).sum(), x, create_graph=True)
    second = torch.autograd.grad(sum((g*w).sum() for g, w in zip(grads, u)), x)
    hvp = torch.func.jvp(torch.func.grad(lambda *x: (attend(*x)*do).sum(), argnums=(0, 1, 2)), tuple(t.detach() for t in x), tuple(u))[1]
    return [t.detach() for t in (o, *grads, *second, *hvp)]


def errors(cases, Lq, Lk, D, dtype, device, backend):
    "On one rank: for each case the errors of its parts, and of one process's in the same dtype, both against float64."
    at = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    found = []
    for bring, layout, causal in cases:
        kw = dict(is_causal=causal, enable_gqa=True)
        part = partial(shard, layout=layout)
        ours = orders(partial(context_parallel, bring=bring, layout=layout, backend=backend, **kw), *map(part, problem(Lq, Lk, D, dtype, at)))
        alone = orders(partial(sdpa_custom, backend=backend, **kw), *problem(Lq, Lk, D, dtype, at))
        truth = orders(partial(sdpa_custom, backend="reference", **kw), *problem(Lq, Lk, D, torch.float64, at))
        found.append([(rel_err(a, part(t)), rel_err(b, t)) for a, b, t in zip(ours, alone, truth)])
    return found


def as_good_as_one_process(found, floor):
    return all(mine <= 2*alone + floor for rank in found for case in rank for mine, alone in case)


def test_four_processes():
    found = run_ranks(4, errors, CASES, 16, 16, 4, torch.float64, "cpu", "reference")
    assert len(found) == 4 and as_good_as_one_process(found, 1e-12)


@pytest.mark.skipif(not INTERPRETING and not GPUS, reason="the kernels run on a CPU only through Triton's interpreter")
def test_two_processes_on_the_fused_kernels():
    assert as_good_as_one_process(run_ranks(2, errors, CASES[1:2], 10, 10, 16, torch.float32, "cpu", "triton_full_fused"), 1e-6)


def layer_on_rank():
    "A causal layer on a balanced layout, against the same layer on the whole sequence."
    torch.manual_seed(0)
    make = lambda backend: MultiHeadAttention(16, 4, n_kv_heads=2, backend=backend).double()
    ours, alone = make(partial(context_parallel, layout="balanced")), make("reference")
    alone.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    y, want = ours(shard(x, layout="balanced"), is_causal=True), alone(x, is_causal=True)
    g = [all_reduce(g) for g in torch.autograd.grad(y.pow(3).sum(), list(ours.parameters()))]
    h = torch.autograd.grad(want.pow(3).sum(), list(alone.parameters()))
    return rel_err(unshard(y, layout="balanced"), want), max(rel_err(a, b) for a, b in zip(g, h) if b.norm() > 1e-9)


def test_a_layer_takes_it_like_any_attention(): assert all(max(found) < 1e-11 for found in run_ranks(2, layer_on_rank))


def neural_process_on_rank():
    "The rectangular transformer with its observations and its targets dealt out, against the same model on all of them."
    from theria.neural_process.model import Size, TransformerNP
    from theria.neural_process.tasks import draw
    W = dist.get_world_size()
    make = lambda attention: TransformerNP(Size(d_model=16, n_layers=2, n_heads=2, d_ff=24, components=2), attention=attention, mlp="reference", heads="reference", gmm="reference").double()
    ours, alone = make(context_parallel), make("reference")
    alone.load_state_dict(ours.state_dict())
    batch = [t.double() for t in draw("rbf", 3, 4*W, 6*W).batch]
    for p, q in zip(ours.parameters(), alone.parameters()): dist.broadcast(p.data, 0), q.data.copy_(p.data)
    mine = [t.chunk(W, 1)[dist.get_rank()] for t in batch]
    loss, want = ours.loss(*mine), alone.loss(*batch)
    g = [all_reduce(g)/W for g in torch.autograd.grad(loss, list(ours.parameters()))]
    return rel_err(all_reduce(loss)/W, want), max(rel_err(a, b) for a, b in zip(g, torch.autograd.grad(want, list(alone.parameters()))) if b.norm() > 1e-12)


def test_a_neural_process_over_several_ranks(): assert all(max(found) < 1e-10 for found in run_ranks(2, neural_process_on_rank))


def refusals():
    said, x = [], torch.zeros(1, 2, 6, 4)
    for call in (lambda: shard(torch.zeros(1, 1, 5, 4)), lambda: shard(x, layout="balanced"), lambda: shard(x, layout="other"), lambda: context_parallel(x, x, x, bring="both"),
                 lambda: context_parallel(x, x, x, bring="queries", layout="balanced"), lambda: unshard(x, dim=2)):
        with pytest.raises(ContractError) as e: call()
        said.append(str(e.value))
    return said


def test_what_is_refused():
    for said in run_ranks(2, refusals):
        for sentence, words in zip(said, ("a length of 5 for 2 ranks", "multiple of 4", "layout='other'", "bring='both'", "accepted is 'contiguous' there", "dim=2")):
            assert words in sentence


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[TransformerBlock(8, 2, 16) for _ in range(2)], nn.LayerNorm(8)).double()


def step(model, x):
    with inner_gradient(model):
        x = x.detach().requires_grad_()
        y = model(x).tanh().pow(2).sum((1, 2)).mean()
        g, = torch.autograd.grad(y, x, create_graph=True)
    (y + len(x)**2*g.pow(2).sum((1, 2)).mean()).backward()


def data_parallel(kind, device, reshard):
    "The error of the averaged gradients of a gradient penalty, after two steps."
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    W = dist.get_world_size()
    examples = torch.randn(2*W, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    ours, alone = model().to(device), model().to(device)
    if kind == "ddp": ours = DistributedDataParallel(ours)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh(device, (W,))
        for part in (*ours[:2], ours): fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        ours.zero_grad()
        step(ours, examples.chunk(W)[dist.get_rank()])
    for part in examples.chunk(W): step(alone, part)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return max(rel_err(whole(a.grad), b.grad/W) for a, b in zip(ours.parameters(), alone.parameters()) if b.grad.norm() > 1e-9)


@pytest.mark.parametrize("kind, reshard", [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_gradient_penalty_under_a_wrapper(kind, reshard): assert max(run_ranks(2, data_parallel, kind, "cpu", reshard)) < 1e-11


def local_gradient():
    "`autograd.grad` in the parameters of a wrapped model gives this rank's gradient, not the average."
    from torch.nn.parallel import DistributedDataParallel
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    loss = lambda m: m(x).tanh().pow(2).sum()
    alone = model()
    local = torch.autograd.grad(loss(alone), list(alone.parameters()))
    wrapped = DistributedDataParallel(model())
    mine = torch.autograd.grad(loss(wrapped), list(wrapped.parameters()))
    return max(rel_err(a, b) for a, b in zip(mine, local))


def test_nothing_is_averaged_by_autograd_grad(): assert max(run_ranks(2, local_gradient)) < 1e-12


def test_torchrun(tmp_path):
    code = f"from theria.distributed import measure_scaling; import torch; measure_scaling({str(tmp_path/'s.json')!r}, queries=64, keys=32, heads=2, dim=16, dtype=torch.float32, repeats=1)"
    (tmp_path/"job.py").write_text(code)
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path/"job.py")], capture_output=True, text=True,
                       timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert r.returncode == 0, r.stderr[-2000:]
    rows = Record(tmp_path/"s.json").rows(every_run=True)
    assert [r["ranks"] for r in rows] == [1, 2] and all(r["error"] < 1e-5 for r in rows) and "aria-label" in scaling_figure(rows)


# NCCL

@pytest.mark.gpu
@pytest.mark.parametrize("world", [pytest.param(2, marks=needs(2)), pytest.param(4, marks=needs(4))])
@pytest.mark.parametrize("dtype, floor", [(torch.bfloat16, 1e-3), (torch.float32, 1e-6)])
def test_nccl(world, dtype, floor):
    found = run_ranks(world, errors, CASES, 520, 520, 64, dtype, "cuda", "triton_full_fused", backend="nccl")
    assert as_good_as_one_process(found, floor)


@pytest.mark.gpu
@needs(2)
@pytest.mark.parametrize("kind, reshard", [("ddp", True), ("fsdp", True), ("fsdp", False)])
def test_gradient_penalty_under_a_wrapper_on_gpus(kind, reshard): assert max(run_ranks(2, data_parallel, kind, "cuda", reshard, backend="nccl")) < 1e-11


@pytest.mark.gpu
def test_scaling_on_one_gpu(tmp_path):
    rows = measure_scaling(tmp_path/"s.json", queries=4100, keys=4096, repeats=1)
    assert rows[0]["ranks"] == 1 and rows[0]["error"] < 1e-2 and rows[0]["peak_gib"] > 0
