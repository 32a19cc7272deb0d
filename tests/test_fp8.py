"FP8 attention: rounding to the bit, the forward against its emulation, derivatives in every mode, refusals, and the compile gate."
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention import fp8, reference
from theria.attention.contract import BackendUnavailable, ContractError, rel_err
from theria.attention.custom import sdpa_custom

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(Lq, Lk, D, Dv=None, Hq=2, Hkv=2):
    return [torch.randn(1, h, n, d, device=DEVICE).bfloat16() for h, n, d in ((Hq, Lq, D), (Hkv, Lk, D), (Hkv, Lk, Dv or D))]


def rounded(x): return [fp8.round_blocks(y, n) for y, n in zip(x, (fp8.Q_ROWS, fp8.KV_ROWS, fp8.KV_ROWS))]


@settings(max_examples=8)
@given(L=st.sampled_from((1, 63, 64, 65, 200)), D=st.sampled_from((1, 24, 64, 80)), rows=st.sampled_from((64, 128)), transposed=st.booleans(), power=st.integers(-60, 60))
def test_the_kernel_rounds_as_pytorch_does(L, D, rows, transposed, power):
    x = (torch.randn(1, 2, L, D, device=DEVICE)*torch.exp2(4*torch.randn(1, 2, L, 1, device=DEVICE))*2.**power).bfloat16()
    x8, s, hat = fp8.quantise(x, rows, transposed)
    assert torch.equal(hat, fp8.round_blocks(x, rows)) and (torch.log2(s) % 1 == 0).all()
    whole = x8.mT if transposed else x8
    assert torch.equal((whole.double().unflatten(2, (-1, rows))*s.double()[..., None, None]).flatten(2, 3)[:, :, :L, :D], hat.double())
    assert not whole[:, :, L:].float().any() and not whole[..., D:].float().any() and whole.float().isfinite().all()


def test_every_e4m3_number_and_every_tie():
    numbers = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    between = torch.cat([numbers, (numbers[1:] + numbers[:-1])/2])  # ties go to even
    x = torch.cat([between, between.new_zeros(512 - len(between))]).view(1, 1, 8, 64)
    x[..., 7, 63] = 448  # the scale is 1
    assert torch.equal(x.bfloat16().float(), x)
    x8, s, _ = fp8.quantise(x.bfloat16(), 64)
    assert s.item() == 1 and torch.equal(x8[0, 0, :8].float(), x[0, 0].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("Lq, Lk, D, Dv, causal", [(1, 7, 64, 64, False), (63, 129, 64, 32, False), (100, 127, 48, 64, False), (65, 65, 64, 64, True), (40, 130, 128, 128, False),
    *(pytest.param(*c, marks=pytest.mark.gpu) for c in ((564, 64, 64, 64, False), (2000, 1000, 64, 64, False), (1000, 1000, 128, 128, True), (300, 300, 256, 256, False)))])
def test_forward_against_its_emulation(Lq, Lk, D, Dv, causal):
    x = inputs(Lq, Lk, D, Dv)
    o, L = fp8.sdpa_fp8(*x, is_causal=causal, return_lse=True)
    o_ref, L_ref = fp8.forward_reference(*x, scale=D**-.5, is_causal=causal, keys=fp8.config(fp8.features(max(D, Dv))).BN)
    short = fp8.forward_reference(*x, scale=D**-.5, is_causal=causal, sums=fp8.short_sums)[1]
    limit = 1e-6 + (DEVICE == "cuda")*2*rel_err(short, L_ref)  # fp32's rounding, and what tensor cores drop from sums
    assert rel_err(o, o_ref) < 1e-2 and rel_err(L, L_ref) < limit
    exact = reference.forward(*(y.double() for y in rounded(x)), None, scale=D**-.5, is_causal=causal)
    assert rel_err(L, exact[1]) < limit and rel_err(o, exact[0]) < 4e-2  # L belongs to the rounded inputs; o has the rounding of the weights besides


@pytest.mark.parametrize("N", [40, pytest.param(1000, marks=pytest.mark.gpu)])
def test_derivatives_are_those_at_the_rounded_inputs(N):
    x, t, do, tdo = inputs(N, N, 64), inputs(N, N, 64), *inputs(N, N, 64)[:2]
    exact = lambda q, k, v: reference.forward(q, k, v, None, scale=1/8)[0]
    gradient = lambda f, q, k, v, do: torch.func.vjp(f, q, k, v)[1](do)
    wide, wt = tuple(y.double() for y in rounded(x)), tuple(y.double() for y in t)
    def close(ours, theirs, limit):
        for a, b in zip(ours, theirs, strict=True): assert rel_err(a, b) < limit
    close(gradient(fp8.sdpa_fp8, *x, do), gradient(exact, *wide, do.double()), 4e-2)
    close([torch.func.jvp(fp8.sdpa_fp8, tuple(x), tuple(t))[1]], [torch.func.jvp(exact, wide, wt)[1]], 4e-2)
    hvp = lambda f, x, t, do, tdo: torch.func.jvp(partial(gradient, f), (*x, do), (*t, tdo))[1]
    close(hvp(fp8.sdpa_fp8, x, t, do, tdo), hvp(exact, wide, wt, do.double(), tdo.double()), 6e-2)


def test_the_hessian_is_symmetric():
    x, do = inputs(20, 40, 64, Hq=1, Hkv=1), inputs(20, 40, 64, Hq=1, Hkv=1)[0]
    def product(u):
        leaves = [y.detach().requires_grad_() for y in x]
        first = torch.autograd.grad(fp8.sdpa_fp8(*leaves), leaves, do, create_graph=True)
        return torch.autograd.grad(first, leaves, u)
    u, w = inputs(20, 40, 64, Hq=1, Hkv=1), inputs(20, 40, 64, Hq=1, Hkv=1)
    dot = lambda a, b: sum((y.double()*z.double()).sum() for y, z in zip(a, b)).item()
    size = sum(y.double().norm()**2 for y in product(u)).sqrt().item()*sum(y.double().norm()**2 for y in w).sqrt().item()
    assert abs(dot(product(u), w) - dot(product(w), u)) < 1e-3*size


def test_transforms_and_compile():
    x = inputs(20, 33, 64)
    batched = torch.func.vmap(fp8.sdpa_fp8)(*(torch.stack([y, 2*y]) for y in x))
    assert torch.equal(batched, torch.stack([fp8.sdpa_fp8(*x), fp8.sdpa_fp8(*(2*y for y in x))]))
    def step(f):
        leaves = [y.detach().requires_grad_() for y in x]
        return torch.autograd.grad(f(*leaves).float().square().sum(), leaves)
    compiled = torch.compile(fp8.sdpa_fp8, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled), step(fp8.sdpa_fp8), strict=True): assert torch.equal(a, b)


def test_operator_passes_opcheck():
    found = torch.library.opcheck(torch.ops.theria.fp8_forward.default, (*inputs(9, 12, 64), .1, True), test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


def test_ties_are_unbiased():
    q, k, v = inputs(64, 300, 64)
    k = torch.zeros_like(k)
    k[:, :, 5, 0] = 1.
    x = torch.full_like(q, 2.85), k, v + 1
    exact = reference.forward(*(y.double() for y in rounded(x)), None, scale=1/8)[0]
    assert rel_err(fp8.sdpa_fp8(*x), exact) < 6e-3
    assert rel_err(fp8.forward_reference(*x, scale=1/8, own_sum=False)[0], exact) > 1.2e-2  # what the other sum would do


def test_empty_shapes_and_large_numbers():
    q, k, v = inputs(5, 0, 64)
    o, L = fp8.sdpa_fp8(q, k, v, return_lse=True)
    assert not o.any() and L.isneginf().all()
    assert fp8.sdpa_fp8(*inputs(0, 5, 64)).shape == (1, 2, 0, 64)
    x = [y*1e4 for y in inputs(33, 65, 64)]
    assert fp8.sdpa_fp8(*x).isfinite().all()
    for tiny in (0., 1e-36):
        o, L = fp8.sdpa_fp8(*(y*tiny for y in x), return_lse=True)
        assert rel_err(L, torch.full_like(L, 65).log()) < 1e-6 and o.abs().max() <= 1e-31


def test_refusals():
    x = inputs(3, 4, 64)
    with pytest.raises(ContractError, match="bfloat16"): fp8.sdpa_fp8(*(y.half() for y in x))
    with pytest.raises(BackendUnavailable, match="8.9 or newer"): fp8.sdpa_fp8(*(y.to("meta") for y in x))
    with pytest.raises(ContractError, match="scale"): fp8.sdpa_fp8(*x, scale=-1)


def test_it_is_a_backend_of_the_door():
    x = inputs(9, 12, 64)
    for kw in (dict(), dict(is_causal=True), dict(scale=.3)):
        assert torch.equal(sdpa_custom(*x, backend="triton_fp8", **kw), fp8.sdpa_fp8(*x, **kw))
    for bad, words in ((dict(dropout_p=.1), "got attn_mask or dropout_p"), (dict(attn_mask=torch.ones(9, 12, dtype=torch.bool, device=DEVICE)), "got attn_mask or dropout_p"), (dict(stats="frozen"), "got stats='frozen'")):
        with pytest.raises(ContractError, match=words): sdpa_custom(*x, backend="triton_fp8", **bad)
    with pytest.raises(ContractError, match="accepted is bfloat16"): sdpa_custom(*(y.half() for y in x), backend="triton_fp8")


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA A100")
    assert fp8.fp8_missing("cuda") == "NVIDIA A100, of compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    assert fp8.fp8_missing("cuda") is None


def gate():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {"p_q": "*fp8e4nv", "p_k": "*fp8e4nv", "p_vt": "*fp8e4nv", "p_x8": "*fp8e4nv", "p_o": "*bf16", "p_x": "*bf16", "p_hat": "*bf16", "scale2": "fp32"}
    found = []
    def put(kernel, config, **constants):
        signature, values, hints = {}, {}, {}
        for n, name in enumerate(kernel.arg_names):
            if name in constants: signature[name], values[n,] = "constexpr", constants[name]
            else:
                signature[name] = types.get(name, "*fp32" if name.startswith("p_") else "i32")
                if name.startswith("p_") or name[1:] in ("_b", "_h", "_l"): hints[n,] = [["tt.divisibility", 16]]
        k = triton.compile(ASTSource(kernel, signature, values, hints), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=config.warps, num_stages=config.stages))
        found.append(dict(kernel=kernel.fn.__name__, D=constants["BD"], shared=k.metadata.shared, e4m3=k.asm["ptx"].count("wgmma.mma_async.sync.aligned.m64n") and k.asm["ptx"].count(".e4m3.e4m3"), ptx=k.asm["ptx"]))
    for D, causal in ((64, False), (64, True), (128, False), (256, False)):
        c = fp8.config(D)
        put(fp8._fp8_kernel, c, DV=D, BD=D, BDV=D, BM=c.BM, BN=c.BN, ROWS=fp8.Q_ROWS, KV=fp8.KV_ROWS, CAUSAL=causal)
    put(fp8._fp8_quantise, fp8.QUANTISE, D=64, BD=64, ROWS=fp8.KV_ROWS, TRANSPOSED=True)
    print(json.dumps(found))


def test_kernels_compile_to_fp8_products_without_spills(tmp_path):
    import triton
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 5
    ptxas = Path(triton.__path__[0])/"backends/nvidia/bin/ptxas"
    for k in found:
        assert k["shared"] <= 232_448 and bool(k["e4m3"]) == (k["kernel"] == "_fp8_kernel"), k["kernel"]
        (tmp_path/"k.ptx").write_text(k["ptx"])
        said = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", "k.ptx", "-o", "k.cubin"], capture_output=True, text=True, cwd=tmp_path)
        text = said.stderr + said.stdout
        spilled = re.search(r"(\d+) bytes spill stores", text)
        assert spilled and spilled[1] == "0" and not re.search("C75(10|12|15)", text), (k["kernel"], k["D"], text[-500:])


if __name__ == "__main__": gate()
