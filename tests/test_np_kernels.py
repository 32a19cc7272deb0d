"Fused kernels of the neural process: odd sizes, derivatives through autograd itself, torch.compile, and the compile gate."
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

from theria.attention.contract import BackendUnavailable, ContractError, rel_err
from theria.neural_process import gmm, heads, mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def draw(kernel, T, K, C, W, dtype=torch.float32):
    shapes = dict(mlp=((T, C), (W, C), (C, W)), heads=((T, C), (K, W, C), (K, 3, W)), gmm=((T, K, 3),))[kernel]
    return [(torch.randn(s, device=DEVICE)/(s[-1]**.5 if n else 1)).to(dtype) for n, s in enumerate(shapes)]


def doors(kernel, y=None, form=None):
    if kernel == "mlp": return partial(mlp.mlp, backend="fused", form=form), mlp.mlp_reference
    if kernel == "heads": return heads.HEADS["fused"], heads.heads_reference
    return tuple(lambda z, b=b: gmm.nll(z, y.to(z.dtype) if z.dtype == torch.float64 else y, backend=b) for b in ("fused", "reference"))


def two_orders(f, xs, ts):
    xs = [x.detach().requires_grad_() for x in xs]
    out = f(*xs)
    first = torch.autograd.grad(out.square().sum(), xs, create_graph=True)
    assert all(g.requires_grad for g in first)
    return out.detach(), *(g.detach() for g in first), *torch.autograd.grad(first, xs, ts)


def compare(kernel, T, K, C, W, dtype, form=None):
    xs, ts = draw(kernel, T, K, C, W, dtype), draw(kernel, T, K, C, W, dtype)
    ours, ref = doors(kernel, torch.randn(T, device=DEVICE), form)
    for n, (a, b) in enumerate(zip(two_orders(ours, xs, ts), two_orders(ref, [x.double() for x in xs], [t.double() for t in ts]), strict=True)):
        assert rel_err(a, b) < LIMITS[dtype], f"output {n}: {rel_err(a, b):.1e}"


SIZES = dict(T=st.sampled_from((1, 7, 63, 65, 100)), K=st.integers(1, 5), C=st.sampled_from((3, 16, 33, 64)), W=st.sampled_from((1, 15, 64, 65)))


@pytest.mark.parametrize("kernel", ["heads", "gmm"])
@settings(max_examples=6)
@given(**SIZES, dtype=st.sampled_from((torch.float32, torch.float16)))
def test_two_orders_at_odd_sizes(kernel, T, K, C, W, dtype): compare(kernel, T, K, C, W, dtype)


@pytest.mark.parametrize("form", mlp.FORMS)
@settings(max_examples=4)
@given(**SIZES)
def test_two_orders_of_the_mlp_at_odd_sizes(form, T, K, C, W): compare("mlp", T, K, C, W, torch.float32, form)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel, form", [("heads", None), ("gmm", None), *(("mlp", f) for f in mlp.FORMS)])
@pytest.mark.parametrize("T, W", [(1, 1376), (127, 1365), (1000, 1376), (9_001, 1376)])
def test_two_orders_at_the_size_of_the_model(kernel, form, T, W, dtype): compare(kernel, T, 10, 512, W, dtype, form)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel, form", [("heads", None), ("gmm", None), *(("mlp", f) for f in mlp.FORMS)])
def test_results_are_the_same_bits_twice(kernel, form):
    xs, ts = draw(kernel, 5_000, 10, 512, 1376, torch.bfloat16), draw(kernel, 5_000, 10, 512, 1376, torch.bfloat16)
    f = doors(kernel, torch.randn(5_000, device=DEVICE), form)[0]
    assert all(torch.equal(a, b) for a, b in zip(two_orders(f, xs, ts), two_orders(f, xs, ts)))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_compile_as_one_graph(dtype):
    W = 16 if DEVICE == "cpu" else 1376
    (x, w1, w2), (_, v1, v2), y = draw("mlp", 20, 4, 16, W, dtype), draw("heads", 20, 4, 16, W, dtype), torch.randn(20, device=DEVICE)
    def model(x, w1, w2, v1, v2): return gmm.nll(heads.heads(x + mlp.mlp(x, w1, w2, backend="fused"), v1, v2, backend="fused"), y, backend="fused")
    def step(f):
        ps = [p.detach().requires_grad_() for p in (x, w1, w2, v1, v2)]
        loss = f(*ps)
        return loss.detach(), *torch.autograd.grad(loss, ps)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for a, b in zip(step(compiled), step(model), strict=True): assert rel_err(a, b) < LIMITS[dtype]


def test_operators_pass_opcheck():
    x, w1, w2 = draw("mlp", 9, 2, 8, 5)
    z, v1, v2 = draw("heads", 9, 2, 8, 5)
    m, y = draw("gmm", 9, 3, 0, 0)[0], torch.randn(9, device=DEVICE)
    a = x @ w1.T
    calls = dict(mlp_up=(x, w1, True), mlp_dual=(x, w1, w2, a, x), mlp_one=(x, w1, w2), heads=(z, v1, v2), heads_backward=(z, v1, v2, torch.randn(9, 2, 3, device=DEVICE)),
                 mixture=(m, y, True), mixture_gradient=(m, y, y, .5, True))
    for name, args in calls.items():
        found = torch.library.opcheck(getattr(torch.ops.theria, name).default, args, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}, name


def test_checkpoint_and_autocast():
    xs = [x.requires_grad_() for x in draw("mlp", 12, 1, 16, 24)]
    def loss(f):
        with torch.autocast(DEVICE, torch.float16 if DEVICE == "cpu" else torch.bfloat16): return f(*xs).float().square().sum()
    f = partial(mlp.mlp, backend="fused")
    plain = torch.autograd.grad(loss(f), xs)
    again = torch.autograd.grad(loss(lambda *ps: torch.utils.checkpoint.checkpoint(f, *ps, use_reentrant=False)), xs)
    assert all(g.dtype == torch.float32 and torch.equal(g, h) for g, h in zip(plain, again, strict=True))


def test_padding_is_invisible():
    x, w1, w2 = draw("mlp", 10, 1, 16, 21)
    width = mlp.padded_width(21)
    padded = x.requires_grad_(), mlp.zero_pad(w1, width, 0).requires_grad_(), mlp.zero_pad(w2, width, 1).requires_grad_()
    for form in mlp.FORMS:
        y = mlp.mlp(*padded, backend="fused", form=form)
        dx, dw1, dw2 = torch.autograd.grad(y.square().sum(), padded)
        assert rel_err(y, mlp.mlp_reference(x.double(), w1.double(), w2.double())) < 1e-6
        assert not dw1[21:].any() and not dw2[:, 21:].any() and dx.isfinite().all()


def test_the_loss_is_minus_the_mean():
    z, y = draw("gmm", 700, 10, 0, 0)[0], torch.randn(700, device=DEVICE)
    assert rel_err(gmm.nll(z, y, backend="fused"), -gmm.log_prob(z, y, backend="fused").mean()) < 1e-6
    assert gmm.nll(z[:0], y[:0], backend="fused").isnan() and gmm.log_prob(z[:0], y[:0], backend="fused").shape == (0,)


@pytest.mark.gpu
def test_captured_in_a_graph():
    from theria.bench import captured
    ps, y = [*draw("heads", 500, 10, 512, 1376, torch.bfloat16)], torch.randn(500, device=DEVICE)
    def step():
        leaves = [p.detach().requires_grad_() for p in ps]
        loss = gmm.nll(heads.heads(*leaves, backend="fused"), y, backend="fused")
        return loss.detach(), *torch.autograd.grad(loss, leaves)
    eager = step()
    replay, out = captured(lambda: step)
    for o in out: o.fill_(torch.nan)
    replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(out, eager))


@pytest.mark.gpu
def test_no_hidden_activations_are_kept():
    x, w1, w2 = draw("heads", 20_000, 10, 512, 1376, torch.bfloat16)
    x.requires_grad_(); w1.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    z = heads.heads(x, w1, w2, backend="fused")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 8*z.nbytes < 20_000*10*1376  # a hundredth of the hidden layer


def test_refusals():
    x, w1, w2 = draw("mlp", 4, 1, 600, 8)
    with pytest.raises(ContractError, match="up to 512"): mlp.mlp(x, w1, w2, backend="fused", form="one")
    with pytest.raises(BackendUnavailable, match="compute capability 8.0"): mlp.mlp(*(t.to("meta") for t in (x, w1, w2)), backend="fused")
    with pytest.raises(ContractError, match="one device"): heads.heads(x.to("meta"), w1[None], w2[None])
    with pytest.raises(ContractError, match="one row of K"): gmm.nll(torch.zeros(3, 3), torch.zeros(4))


# The compile gate: every configuration that a door can choose, for a GPU that need not be there

def gate():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    pointers = dict(p_y="fp32", p_out="fp32", p_sums="fp32", p_ticket="i32", p_g="fp32", p_dy="fp32", p_dw2="fp32")
    aligned = set("x_t w1_f w1_k w2_d w2_k w2_o dy_t h_t y_t da_f C C_out W".split())
    common, found = dict(BC=64, CHECK=False, PRECISION="ieee"), []
    def put(kernel, config, **constants):
        mlp_y = kernel is mlp._mlp_one or kernel is mlp._mlp_dual
        types, values, hints = {}, {}, {}
        for n, name in enumerate(kernel.arg_names):
            if name in constants: types[name], values[n,] = "constexpr", constants[name]
            elif name.startswith("p_"): types[name], hints[n,] = "*" + ("bf16" if mlp_y else pointers.get(name, "bf16")), [["tt.divisibility", 16]]
            else:
                types[name] = "fp32" if name == "factor" else "i32"
                if name in aligned: hints[n,] = [["tt.divisibility", 16]]
        for arch in (80, 90):
            k = triton.compile(ASTSource(kernel, types, values, hints), target=GPUTarget("cuda", arch, 32), options=dict(num_warps=config.warps, num_stages=config.stages))
            name = kernel.fn.__name__ + "".join(f" {c}" for c, on in constants.items() if on is True)
            found.append(dict(kernel=name, arch=arch, shared=k.metadata.shared, wgmma=k.asm["ptx"].count("wgmma.mma_async"), ptx=k.asm["ptx"] if arch == 90 else None))
    c = gmm.CONFIGS["forward"]
    for loss in (False, True): put(gmm._gmm_log_prob, c, K=10, LEVELS=5, ROW=30, BT=c.BM, LOSS=loss)
    c = gmm.CONFIGS["backward"]
    put(gmm._gmm_gradient, c, K=10, LEVELS=5, ROW=30, BT=c.BM, HAS_DY=False)
    for op, keep in (("up", False), ("keep", True)):
        c = mlp.CONFIGS[op]
        put(mlp._mlp_up, c, BM=c.BM, BN=c.BN, KEEP=keep, **common)
    for op, kept in (("redo", False), ("dual", True)):
        c = mlp.CONFIGS[op]
        put(mlp._mlp_dual, c, BM=c.BM, BN=c.BN, KEPT=kept, CHECK_OUT=False, **common)
    c = mlp.CONFIGS["one"]
    put(mlp._mlp_one, c, C=512, C_OUT=512, BC=512, BO=512, BM=c.BM, BN=c.BN, PRECISION="ieee")
    for op, kernel in (("forward", heads._heads_forward), ("backward", heads._heads_backward)):
        c = heads.CONFIGS[op]
        put(kernel, c, O=3, BO=16, BM=c.BM, BN=c.BN, **common)
    print(json.dumps(found))


def test_every_configuration_compiles_without_spills(tmp_path):
    import triton
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 20
    ptxas = Path(triton.__path__[0])/"backends/nvidia/bin/ptxas"
    for k in found:
        assert k["shared"] <= (166_912 if k["arch"] == 80 else 232_448) or (k["arch"], k["kernel"]) == (80, "_mlp_one"), (k["kernel"], k["arch"], k["shared"])
        if k["arch"] == 80: continue
        assert bool(k["wgmma"]) == (not k["kernel"].startswith("_gmm")), k["kernel"]
        (tmp_path/"k.ptx").write_text(k["ptx"])
        said = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", "k.ptx", "-o", "k.cubin"], capture_output=True, text=True, cwd=tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores", said.stderr + said.stdout)
        assert spilled and spilled[1] == "0" and not re.search("C75(10|12|15)", said.stderr + said.stdout), (k["kernel"], said.stderr[-500:])


if __name__ == "__main__": gate()
