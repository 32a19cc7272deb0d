"The unfused steps: their kernels compile for every GPU they are meant for, and they hold at the sizes that only a GPU can."
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria import audit, sdpa_custom
from theria.attention.contract import TOLERANCE, rel_err

STEPS = ("triton_ref", "triton_fast", "triton_fused")
SHARED = {80: 101_376, 90: 232_448}  # bytes a program may use; the smallest of the 8.x family decides


def compile_all():
    import triton
    from triton.backends.compiler import GPUTarget

    from theria.attention import gate, unfused
    gate._POINTERS["p_s"] = "fp32"
    problems = [(unfused._scores_plain, "float16", 4, None), (unfused._scores_plain, "float32", 4, None)]
    problems += [(unfused._scores_tuned, dtype, size, D) for (dtype, size), D in product((("bfloat16", 2), ("float32", 4)), (33, 128, 256))]
    for arch, (kernel, dtype, size, D) in product(SHARED, problems):
        BD = unfused.padded(D or 32)
        c = unfused.tuned(BD, size) if D else unfused.PLAIN
        constants = dict(BD=BD, BM=c.BM, BN=c.BN, PRECISION="tf32x3" if size == 4 else "ieee", **(dict(D=D, STRIP=unfused.STRIP) if D else {}))
        compiled = triton.compile(gate._source(kernel, dtype, constants), target=GPUTarget("cuda", arch, 32), options=dict(num_warps=c.warps, num_stages=c.stages))
        if compiled.metadata.shared > SHARED[arch]: print(f"sm_{arch} {dtype} D={D} {c} needs {compiled.metadata.shared} bytes of shared memory")
    print(f"compiled {len(SHARED)*len(problems)}")


def test_kernels_compile_and_fit(tmp_path):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["compiled 16"]


def derivatives(attend, x, do, u):
    x, do = [y.detach().requires_grad_() for y in x], do.detach().requires_grad_()
    o = attend(*x)
    first = torch.autograd.grad(o, x, do, create_graph=True)
    return o, *first, *torch.autograd.grad(first, [*x, do], u)


@pytest.mark.parametrize("backend", STEPS)
@pytest.mark.parametrize("N, D, dtype", [(40, 64, torch.float16), *(pytest.param(*p, marks=pytest.mark.gpu) for p in product(
    (512, 1000), (64, 128), (torch.float16, torch.bfloat16, torch.float32)))])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_errors_beside_those_of_pytorch(backend, N, D, dtype, causal):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *x, do, dq, dk, dv = (torch.randn(1, 2, N, D, device=device).to(dtype) for _ in range(7))
    def plain(*x):
        with sdpa_kernel(SDPBackend.MATH): return F.scaled_dot_product_attention(*x, is_causal=causal)
    wide = lambda xs: [y.double() for y in xs]
    exact = derivatives(plain, wide(x), do.double(), wide((dq, dk, dv)))
    theirs, ours = derivatives(plain, x, do, (dq, dk, dv)), derivatives(lambda *x: sdpa_custom(*x, is_causal=causal, backend=backend), x, do, (dq, dk, dv))
    for n, (a, p, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert rel_err(a, e) <= min(2*rel_err(p, e) + 1e-6, TOLERANCE[dtype]), f"output {n}: {rel_err(a, e):.1e}, PyTorch {rel_err(p, e):.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_derivative(backend, dtype):
    found = audit(lambda q, k, v, is_causal=False: sdpa_custom(q, k, v, is_causal=is_causal, backend=backend), dtype=dtype, device="cuda", Lq=33, Lk=65, D=64, is_causal=True)
    assert found.verdict == "safe", found


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "tuned"])
def test_more_than_two_to_the_31_scores(fast):
    from theria.attention.unfused import scores
    q, k = (torch.randn(1, 1, 50_000, 16, device="cuda", dtype=torch.float16) for _ in range(2))
    s = scores(q, k, scale=1., fast=fast)
    rows = torch.tensor([0, 1, 24_999, 42_949, 42_950, 49_999], device="cuda")
    assert s.numel() > 2**31 and rel_err(s[:, :, rows], q[:, :, rows].double() @ k.double().mT) < 1e-6


if __name__ == "__main__": compile_all()
