"""The fused kernels behind their public names: forward, backward and autograd, against PyTorch.

One body for both worlds: small problems run everywhere, on a CPU through Triton's interpreter; `pytest -m gpu` runs the sizes and types that only a GPU can.
"""
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria import FlashAttention, audit, flash_attention
from theria.attention import flash_attn_forward
from theria.attention.contract import TOLERANCE, ContractError, rel_err

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = [(1, 1, 16, 16, torch.float32), (2, 2, 33, 16, torch.float32), (1, 2, 65, 64, torch.float32), (1, 2, 17, 128, torch.float32), (1, 2, 33, 64, torch.float16)]
LARGE = [(2, 4, *rest) for rest in (*product((512, 1024), (64, 128), (torch.float16, torch.bfloat16)), *product((1000,), (64, 128), (torch.bfloat16, torch.float32)))]
PROBLEMS = [pytest.param(*p, id="-".join(map(str, p)).replace("torch.", ""), marks=() if p in SMALL else pytest.mark.gpu) for p in SMALL + LARGE]
problems, causal = pytest.mark.parametrize("B, H, N, D, dtype", PROBLEMS), pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def inputs(*shape, n=3): return [torch.randn(*shape[:4], device=DEVICE).to(shape[4]) for _ in range(n)]


def by_pytorch(q, k, v, causal=False):
    with sdpa_kernel(SDPBackend.MATH): return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def gradients(f, x, do):
    x = [y.detach().requires_grad_() for y in x]
    return torch.autograd.grad(f(*x), x, do)


def accurate(ours, plain, exact): # at most twice PyTorch's own error, and below the ceiling of the type
    for n, (a, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == p.dtype and a.isfinite().all()
        assert rel_err(a, e) <= min(2*rel_err(p, e) + 1e-6, TOLERANCE[a.dtype]), f"output {n}: {rel_err(a, e):.1e}, PyTorch {rel_err(p, e):.1e}"


class TestTritonAttentionForward:
    "`flash_attn_forward(q, k, v, causal)`."

    @problems
    @causal
    def test_forward(self, B, H, N, D, dtype, causal):
        x = inputs(B, H, N, D, dtype)
        o = flash_attn_forward(*x, causal=causal)
        assert o.shape == (B, H, N, D) and o.dtype == dtype and o.device == x[0].device
        accurate([o], [by_pytorch(*x, causal)], [by_pytorch(*(y.double() for y in x), causal)])

    @pytest.mark.parametrize("N", [200, *(pytest.param(n, marks=pytest.mark.gpu) for n in (512, 1024, 4096, 16384))])
    @causal
    def test_forward_long_sequence(self, N, causal):
        x = inputs(1, 1, N, 64, torch.float16)
        accurate([flash_attn_forward(*x, causal=causal)], [by_pytorch(*x, causal)], [by_pytorch(*(y.double() for y in x), causal)])

    @pytest.mark.parametrize("lq, lk", [(1, 40), (40, 1), (17, 50), (50, 17)])
    @causal
    def test_forward_different_lengths(self, lq, lk, causal):
        q, (k, v) = inputs(1, 2, lq, 16, torch.float32, n=1)[0], inputs(1, 2, lk, 16, torch.float32, n=2)
        assert rel_err(flash_attn_forward(q, k, v, causal=causal), by_pytorch(q.double(), k.double(), v.double(), causal)) <= TOLERANCE[torch.float32]

    def test_forward_strides(self):
        x = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in inputs(2, 2, 20, 16, torch.float32)]
        assert not x[0].is_contiguous()
        assert torch.equal(flash_attn_forward(*x), flash_attn_forward(*(y.contiguous() for y in x)))

    def test_forward_large_scores(self):
        q, k, v = inputs(1, 1, 33, 16, torch.float32)
        assert flash_attn_forward(300*q, 300*k, v).isfinite().all()

    @problems
    def test_forward_is_deterministic(self, B, H, N, D, dtype):
        x = inputs(B, H, N, D, dtype)
        assert torch.equal(flash_attn_forward(*x), flash_attn_forward(*x))

    @pytest.mark.gpu
    def test_forward_memory_is_linear(self):
        x = inputs(1, 4, 16384, 64, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = flash_attn_forward(*x)
        assert torch.cuda.max_memory_allocated() - before <= 2*o.nbytes


class TestTritonAttentionBackward:
    "Gradients of `flash_attention` in each input."

    @problems
    @causal
    def test_backward(self, B, H, N, D, dtype, causal):
        *x, do = inputs(B, H, N, D, dtype, n=4)
        accurate(gradients(lambda *x: flash_attention(*x, is_causal=causal), x, do), gradients(lambda *x: by_pytorch(*x, causal), x, do),
                 gradients(lambda *x: by_pytorch(*x, causal), [y.double() for y in x], do.double()))

    @pytest.mark.parametrize("N", [130, *(pytest.param(n, marks=pytest.mark.gpu) for n in (512, 1024, 4096))])
    @causal
    def test_backward_long_sequence(self, N, causal):
        *x, do = inputs(1, 1, N, 64, torch.float16, n=4)
        accurate(gradients(lambda *x: flash_attention(*x, is_causal=causal), x, do), gradients(lambda *x: by_pytorch(*x, causal), x, do),
                 gradients(lambda *x: by_pytorch(*x, causal), [y.double() for y in x], do.double()))

    def test_backward_of_a_cotangent_with_odd_strides(self):
        *x, do = inputs(1, 2, 20, 16, torch.float32, n=4)
        for odd in (do.mT.contiguous().mT, do[:, :, :1].expand_as(do), do[:1, :1, :1, :1].expand_as(do)):
            for a, b in zip(gradients(flash_attention, x, odd), gradients(flash_attention, x, odd.contiguous())): assert torch.equal(a, b)

    @problems
    def test_backward_is_deterministic(self, B, H, N, D, dtype):
        *x, do = inputs(B, H, N, D, dtype, n=4)
        for a, b in zip(gradients(flash_attention, x, do), gradients(flash_attention, x, do)): assert torch.equal(a, b)

    def test_backward_numerical_stability(self):
        q, k, v, do = inputs(1, 1, 33, 16, torch.float32, n=4)
        for s in (1e-4, 1e2): assert all(g.isfinite().all() for g in gradients(flash_attention, [s*q, k, v], do))

    @pytest.mark.gpu
    def test_backward_memory_is_linear(self):
        *x, do = inputs(1, 4, 16384, 64, torch.bfloat16, n=4)
        x = [y.requires_grad_() for y in x]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        g = torch.autograd.grad(flash_attention(*x), x, do)
        assert torch.cuda.max_memory_allocated() - before <= 6*g[0].nbytes


# Models as users write them

class MultiHead(nn.Module):
    def __init__(self, d_model, heads):
        super().__init__()
        self.heads, self.attention = heads, FlashAttention(head_dim=d_model//heads)
        self.q, self.k, self.v, self.out = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x):
        B, L, E = x.shape
        split = lambda y: y.view(B, L, self.heads, E//self.heads).transpose(1, 2)
        o = self.attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        return self.out(o.transpose(1, 2).contiguous().view(B, L, E))


class Block(nn.Module):
    def __init__(self, d_model, heads, d_ff):
        super().__init__()
        self.attention, self.ff = MultiHead(d_model, heads), nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.ff(self.norm2(x)))


models = pytest.mark.parametrize("B, L, d_model, heads, depth", [(2, 9, 32, 2, 1), pytest.param(8, 128, 512, 8, 6, marks=pytest.mark.gpu)], ids=["small", "guide"])
alone = pytest.mark.parametrize("shape", [(1, 2, 9, 16), pytest.param((2, 8, 512, 64), marks=pytest.mark.gpu)], ids=["small", "guide"])


def train(model, steps, batch, *, clip=None, scheduler=None, lr=1e-3):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    rate, losses = scheduler and scheduler(optimizer), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = batch(model)
        loss.backward()
        if clip: torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=clip)
        optimizer.step()
        if rate: rate.step()
        losses.append(loss.item())
    return losses, optimizer


class TestTritonAttentionAutograd:
    "The kernels as part of a graph: leaves, modules, training loops, higher order, and refusals."

    @alone
    def test_module(self, shape):
        x = [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3)]
        o = FlashAttention(head_dim=shape[-1])(*x)
        o.sum().backward()
        assert o.shape == shape and o.requires_grad
        for y, g in zip(x, gradients(by_pytorch, [y.double() for y in x], torch.ones(shape, device=DEVICE, dtype=torch.float64))):
            assert y.grad.isfinite().all() and (y.grad - g).norm() <= 1e-5*max(g.norm(), x[0].numel()**0.5)

    @pytest.mark.parametrize("n", range(3), ids=["q", "k", "v"])
    def test_only_what_is_asked_for(self, n):
        x = inputs(1, 2, 9, 16, torch.float32)
        x[n].requires_grad_()
        flash_attention(*x).pow(2).sum().backward()
        assert [y.grad is not None for y in x] == [m == n for m in range(3)]

    def test_no_graph_without_need(self):
        x = inputs(1, 2, 9, 16, torch.float32)
        assert not flash_attention(*x).requires_grad and not FlashAttention(16)(*x).requires_grad
        with torch.no_grad(): assert not flash_attention(*(y.requires_grad_() for y in x)).requires_grad

    def test_gradients_accumulate(self):
        x = [y.requires_grad_() for y in inputs(1, 1, 9, 16, torch.float32)]
        flash_attention(*x).sum().backward()
        once = [y.grad.clone() for y in x]
        flash_attention(*x).sum().backward()
        for y, g in zip(x, once): torch.testing.assert_close(y.grad, 2*g)

    @alone
    def test_attention_alone_in_a_training_loop(self, shape):
        batch = lambda m: F.mse_loss(m(*(torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))), torch.randn(shape, device=DEVICE))
        losses, optimizer = train(FlashAttention(shape[-1]).to(DEVICE), 6, batch, clip=1., scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5))
        assert len(losses) == 6 and optimizer.param_groups[0]["lr"] == 5e-4

    @models
    def test_multi_head_layer(self, B, L, d_model, heads, depth):
        layer, x = MultiHead(d_model, heads).to(DEVICE), torch.randn(B, L, d_model, device=DEVICE)
        o = layer(x)
        q, k, v = (p(x).double().unflatten(-1, (heads, -1)).transpose(1, 2) for p in (layer.q, layer.k, layer.v))
        exact = by_pytorch(q, k, v).transpose(1, 2).flatten(2) @ layer.out.weight.double().T + layer.out.bias.double()
        assert o.shape == x.shape and rel_err(o, exact) <= TOLERANCE[torch.float32]

    @models
    def test_transformer_learns(self, B, L, d_model, heads, depth):
        model, x = nn.Sequential(*(Block(d_model, heads, 4*d_model) for _ in range(depth))).to(DEVICE), torch.randn(B, L, d_model, device=DEVICE)
        losses, _ = train(model, 8, lambda m: F.mse_loss(m(x), x.flip(1)), clip=1., lr=3e-3 if depth == 1 else 3e-4)
        assert losses[-1] < losses[0] and all(p.grad.isfinite().all() for p in model.parameters())

    @models
    @pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["fp16", "bf16"])
    def test_autocast(self, B, L, d_model, heads, depth, dtype):
        layer, x = MultiHead(d_model, heads).to(DEVICE), torch.randn(B, L, d_model, device=DEVICE)
        exact = layer(x)
        with torch.autocast(DEVICE, dtype=dtype): o = layer(x)
        o.float().pow(2).sum().backward()
        assert o.dtype == dtype and rel_err(o, exact) <= 2*TOLERANCE[dtype]  # the projections are rounded as well
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())

    def test_gradients_over_all_parameters(self):
        model, x = Block(32, 2, 64).to(DEVICE), torch.randn(2, 9, 32, device=DEVICE)
        names, params = zip(*model.named_parameters())
        g = torch.autograd.grad(model(x).pow(2).sum(), params, create_graph=True)
        h = torch.autograd.grad(sum(a.pow(2).sum() for a in g), [p for n, p in zip(names, params) if n.endswith("weight")])
        assert all(a.shape == p.shape for a, p in zip(g, params)) and all(a.isfinite().all() and a.norm() > 0 for a in h)

    def test_state_dicts_fit_models_without_it(self):
        layer = MultiHead(32, 2)
        assert not any("attention" in name for name in layer.state_dict())
        assert not any(layer.load_state_dict(layer.state_dict(), strict=True))

    @pytest.mark.parametrize("N, D", [(9, 4), pytest.param(128, 64, marks=pytest.mark.gpu)])
    @causal
    def test_every_derivative(self, N, D, causal):
        kw = dict(dtype=torch.float32, device=DEVICE, is_causal=causal, B=1, H=1 if N < 99 else 2, Lq=N//3, Lk=N//3, D=D)
        found = audit(FlashAttention(D), **kw, ways=None if CUDA else ["autograd.grad", "torch.func"])
        assert found.verdict == "safe", found

    @pytest.mark.parametrize("features", [(8, 8, 8), (16, 16, 8), (16, 8, 16), (32, 32, 32)])
    def test_other_head_dim_is_one_sentence(self, features):
        with pytest.raises(ContractError, match=r"^got q, k, v with .* features; accepted is 16, [^\n]*\.$"):
            FlashAttention(16)(*(torch.randn(1, 1, 3, d, device=DEVICE) for d in features))

    @pytest.mark.parametrize("head_dim", [0, -1, 257, 1.5, "64", None, True])
    def test_impossible_head_dim(self, head_dim):
        with pytest.raises(ContractError, match="^got head_dim=.*; accepted is a whole number from 1 to 256: "): FlashAttention(head_dim)

    def test_a_cpu_without_the_interpreter_is_refused(self):
        code = """import torch, theria
from theria.attention import flash_attn_forward
x = torch.zeros(1, 1, 3, 4)
steps = [lambda b=b: theria.sdpa_custom(x, x, x, backend=b) for b in ("triton_ref", "triton_fast", "triton_fused", "triton_full_fused")]
for f in [lambda: theria.flash_attention(x, x, x), lambda: theria.FlashAttention(4)(x, x, x), lambda: flash_attn_forward(x, x, x), *steps]:
    try: f()
    except RuntimeError as e: print(type(e).__name__, e)"""
        env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
        lines = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert len(lines) == 7
        for line in lines: assert line.startswith("BackendUnavailable got backend='triton_") and line.endswith("or use backend='reference'.")
