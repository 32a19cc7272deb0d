"""What only a GPU can show: sizes past 32 bits, devices, streams, graphs, memory, and that nothing depends on luck.

`pytest -m gpu tests/test_gpu.py` takes two to three minutes on an H200, most of them for compiling.
"""
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria import sdpa_custom
from theria.attention import reference
from theria.attention.backward import arrangement, backward
from theria.attention.contract import TOLERANCE, ContractError, rel_err
from theria.attention.flash import FlashAttention, flash_attention
from theria.attention.forward import forward
from theria.attention.samples import poisoned

pytestmark = pytest.mark.gpu
FUSED = "triton_full_fused"
GIB = 2**30


def needs(gib):
    if torch.cuda.mem_get_info()[0] < gib*GIB: pytest.skip(f"needs {gib} GiB of free GPU memory")


def randn(*shape, dtype=torch.bfloat16, device="cuda", seed=0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def problem(B=2, Hq=4, Hkv=2, Lq=200, Lk=300, D=64, Dv=64, dtype=torch.bfloat16, device="cuda", seed=0):
    "q, k, v, the cotangent of o, and cotangents of the three gradients."
    shapes = ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), (B, Hq, Lq, Dv), (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    return [randn(*s, dtype=dtype, device=device, seed=seed + n) for n, s in enumerate(shapes)]


def derivatives(x, backend=FUSED, mask=None, **kw):
    "o, the first gradients, and the gradients of those."
    *qkv, do, uq, uk, uv = x
    leaves = [y.detach().requires_grad_() for y in (*qkv, do)]
    o = sdpa_custom(*leaves[:3], mask, enable_gqa=True, backend=backend, **kw)
    first = torch.autograd.grad(o, leaves[:3], leaves[3], create_graph=True)
    return [y.detach() for y in (o, *first, *torch.autograd.grad(first, leaves, (uq, uk, uv)))]


def exact(x, mask=None, **kw):
    up = lambda y: y if y is None or y.dtype == torch.bool else y.double()
    return derivatives([*map(up, x)], "reference", up(mask), **kw)


def assert_close(ours, theirs, tolerance):
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert rel_err(a, b) <= tolerance, f"output {n} is off by {rel_err(a, b):.1e}"


# Offsets past 2³¹ elements

def test_inputs_that_lie_more_than_two_to_the_31_elements_apart():
    needs(8)
    near = problem(B=2, Hq=1, Hkv=1, Lq=100, Lk=130)
    store, far, at = torch.empty(2**31 + 2**18, dtype=torch.bfloat16, device="cuda"), [], 0
    for x in near:
        view = store.as_strided(x.shape, (2**31, *x.stride()[1:]), at)
        at += x[0].numel()
        far.append(view.copy_(x))
    assert far[0].stride(0) == 2**31
    assert_close(derivatives(far, is_causal=True), exact(near, is_causal=True), TOLERANCE[torch.bfloat16])
    assert all(torch.equal(a, b) for a, b in zip(derivatives(far, is_causal=True), derivatives(near, is_causal=True)))


def test_outputs_of_more_than_two_to_the_31_elements():
    needs(40)
    N, M, D = 8_400_000, 64, 256
    q, do = (randn(1, 1, N, D, seed=n) for n in (0, 1))
    k, v = (randn(1, 1, M, D, seed=n) for n in (2, 3))
    assert q.numel() > 2**31
    o, L = forward(q, k, v, scale=D**-.5)
    d = backward(q, k, v, None, None, o, L, do, scale=D**-.5)
    dk, dv = torch.zeros(1, 1, M, D, dtype=torch.float64, device="cuda"), torch.zeros(1, 1, M, D, dtype=torch.float64, device="cuda")
    for lo in range(0, N, 2**20):
        rows = slice(lo, lo + 2**20)
        some = q[:, :, rows].double(), k.double(), v.double(), None
        o64, L64 = reference.forward(*some, scale=D**-.5)
        g = reference.backward(*some, o64, L64, do[:, :, rows].double(), scale=D**-.5)
        assert_close((o[:, :, rows], L[:, :, rows], d.q[:, :, rows]), (o64, L64, g.q), TOLERANCE[torch.bfloat16])
        dk += g.k; dv += g.v
    assert_close((d.k, d.v), (dk, dv), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=["boolean", "additive"])
def test_masks_of_more_than_two_to_the_31_elements(dtype):
    needs(30)
    N, D = 47_000, 16
    q, k, v, do = (randn(1, 1, N, D, seed=n) for n in range(4))
    mask = randn(1, 1, N, N, dtype=torch.bfloat16, seed=4)
    mask = mask > 0 if dtype == torch.bool else mask
    assert mask.numel() > 2**31
    o, L = forward(q, k, v, mask, scale=.25)
    d = backward(q, k, v, mask, None, o, L, do, scale=.25)
    rows = torch.tensor([0, 1, 20_000, 45_691, 45_692, N - 1], device="cuda")  # 45,691·47,000 is just below 2³¹
    pick = lambda x: x[:, :, rows].double()
    some = pick(q), k.double(), v.double(), mask[:, :, rows] if dtype == torch.bool else pick(mask)
    o64, L64 = reference.forward(*some, scale=.25)
    g = reference.backward(*some, o64, L64, pick(do), scale=.25)
    assert_close((o[:, :, rows], L[:, :, rows], d.q[:, :, rows]), (o64, L64, g.q), TOLERANCE[torch.bfloat16])
    if dtype != torch.bool: assert rel_err(d.bias[:, :, rows], g.bias) < TOLERANCE[torch.bfloat16]


def test_more_heads_than_a_grid_dimension_holds():
    x = problem(B=2, Hq=70_000, Hkv=35_000, Lq=5, Lk=7, D=16, Dv=8)
    assert_close(derivatives(x), exact(x), TOLERANCE[torch.bfloat16])


# Devices, streams and graphs

def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2: pytest.skip("needs two GPUs")
    x = problem()
    there = [y.to("cuda:1") for y in x]
    assert torch.cuda.current_device() == 0
    with poisoned(): ours = derivatives(there, is_causal=True)
    assert all(y.device == torch.device("cuda:1") for y in ours) and torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, derivatives(x, is_causal=True)))
    dropped = sdpa_custom(*there[:3], enable_gqa=True, dropout_p=.5, backend=FUSED)
    assert dropped.device == torch.device("cuda:1") and dropped.isfinite().all()


def test_two_streams_at_once():
    problems = [problem(Lq=1500, Lk=1500, seed=10*n) for n in range(2)]
    alone = [derivatives(x, is_causal=True) for x in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(5):
        together = []
        for stream, x in zip(streams, problems):
            with torch.cuda.stream(stream): together.append(derivatives(x, is_causal=True))
        torch.cuda.synchronize()
        for ours, theirs in zip(together, alone): assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("form", ["two", "once"])
def test_a_graph_of_all_orders_replays_on_fresh_data(form):
    still, kw = problem(), dict(is_causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with arrangement(form), torch.cuda.stream(stream):
        for _ in range(3): derivatives(still, **kw)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with arrangement(form), torch.cuda.graph(graph): captured = derivatives(still, **kw)
    for seed in (100, 200):
        fresh = problem(seed=seed)
        for a, b in zip(still, fresh): a.copy_(b)
        graph.replay()
        assert_close(captured, exact(fresh, **kw), TOLERANCE[torch.bfloat16])
        with arrangement(form): assert all(torch.equal(a, b) for a, b in zip(captured, derivatives(fresh, **kw)))


# The same bits

@pytest.mark.parametrize("form, Lq, Lk", [("two", 1000, 1000), ("once", 1000, 1000), (None, 20_000, 64), (None, 64, 20_000)])
def test_repeats_bit_for_bit(form, Lq, Lk):
    x, busy = problem(Lq=Lq, Lk=Lk), torch.randn(4096, 4096, device="cuda")
    with arrangement(form):
        first, noise = derivatives(x), torch.cuda.Stream()
        for _ in range(4):
            with torch.cuda.stream(noise): busy @ busy  # programs finish in another order when the device is shared
            assert all(torch.equal(a, b) for a, b in zip(derivatives(x), first))
    assert_close(first, exact(x), TOLERANCE[torch.bfloat16])


def test_dropout_repeats_with_the_generator():
    x = problem()
    def run():
        torch.manual_seed(3)
        return derivatives(x, dropout_p=.3)
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
    torch.manual_seed(4)
    assert not torch.equal(derivatives(x, dropout_p=.3)[0], run()[0])


def test_atomics_are_right_and_have_to_be_asked_for():
    x = problem(Lq=2000, Lk=2000)
    up = [y.double() for y in x[:4]]
    o64, L64 = reference.forward(*up[:3], None, scale=.125)
    g = reference.backward(*up[:3], None, o64, L64, up[3], scale=.125)
    run = lambda: torch.autograd.grad(sdpa_custom(*[y.requires_grad_() for y in x[:3]], scale=.125, enable_gqa=True, backend=FUSED), x[:3], x[3])
    plain = run()
    with arrangement("atomic"):
        assert_close(run(), g[:3], TOLERANCE[torch.bfloat16])
        with poisoned(): assert all(torch.equal(a, b) for a, b in zip(run(), plain))  # PyTorch's deterministic mode forbids them


# Memory

def held_and_peak(f):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, out


def test_memory_grows_with_the_length_and_not_with_its_square():
    peaks = {}
    for N in (8192, 16384):
        q, k, v, do, *u = problem(B=1, Hq=8, Hkv=8, Lq=N, Lk=N)
        size, rows, slack = q.numel()*2, 8*N*4, 2**20
        forward_peak, o = held_and_peak(lambda: flash_attention(q, k, v))
        assert forward_peak <= size + rows + slack
        del o
        for y in (q, k, v, do): y.requires_grad_()
        o = flash_attention(q, k, v)
        backward_peak, grads = held_and_peak(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
        assert backward_peak <= 3*size + 2*rows + slack
        del o, grads
        def both():
            first = torch.autograd.grad(flash_attention(q, k, v), (q, k, v), do, create_graph=True)
            return torch.autograd.grad(first, (q, k, v, do), u)
        peaks[N], out = held_and_peak(both)
        assert peaks[N] <= 14*size + 8*rows + slack  # o, three gradients, four of theirs, to, and what autograd adds up
        del out
    assert peaks[16384] <= 2.05*peaks[8192] + 2**20


def test_strided_and_expanded_inputs_are_not_copied():
    B, H, N, D = 4, 8, 2048, 64
    packed = randn(B, N, 3, H, D)
    q, k, v = (packed[:, :, n].transpose(1, 2) for n in range(3))
    assert not q.is_contiguous()
    flash_attention(q, k, v)
    size, rows = B*H*N*D*2, B*H*N*4
    peak, o = held_and_peak(lambda: flash_attention(q, k, v))
    assert peak <= size + rows + 2**19
    assert rel_err(o, sdpa_custom(q.double(), k.double(), v.double(), backend="reference")) < TOLERANCE[torch.bfloat16]
    one = randn(1, 1, N, D, seed=5)
    shared, mask = one.expand(B, H, N, D), randn(1, 1, 1, N, seed=6).expand(B, H, N, N)
    sdpa_custom(q, shared, shared, mask, backend=FUSED)
    peak, o = held_and_peak(lambda: sdpa_custom(q, shared, shared, mask, backend=FUSED))
    assert peak <= size + rows + 2**19
    assert rel_err(o, sdpa_custom(q.double(), shared.double(), shared.double(), mask.double(), backend="reference")) < TOLERANCE[torch.bfloat16]


def test_gradients_of_strided_inputs_need_no_copies_either():
    packed = randn(4, 2048, 3, 8, 64)
    q, k, v = (packed[:, :, n].transpose(1, 2).requires_grad_() for n in range(3))
    o = flash_attention(q, k, v)
    do = randn(4, 2048, 8, 64, seed=9).transpose(1, 2)
    run = lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    run()
    peak, grads = held_and_peak(run)
    assert peak <= 3*q.numel()*2 + 2*4*8*2048*4 + 2**19
    up = [y.detach().double() for y in (q, k, v)]
    o64, L64 = reference.forward(*up, None, scale=.125)
    assert_close(grads, reference.backward(*up, None, o64, L64, do.double(), scale=.125)[:3], TOLERANCE[torch.bfloat16])


# Numbers

def still(x):
    "The derivatives if the row statistics stood still: the size of what cancels where a softmax is nearly one-hot."
    *qkv, do, uq, uk, uv = map(torch.Tensor.double, x)
    leaves = [y.requires_grad_() for y in (*qkv, do)]
    w = reference.scores(*leaves[:2], None, scale=qkv[0].shape[-1]**-.5, is_causal=False)
    o = reference.probabilities(w, w.detach().logsumexp(-1)) @ reference.repeat_heads(leaves[2], w.shape[1])
    first = torch.autograd.grad(o, leaves[:3], do, create_graph=True)
    return [o, *first, *torch.autograd.grad(first, leaves, (uq, uk, uv), materialize_grads=True)]


def saved(x):
    "The formulas in float64, from o and lse as a fused kernel saves them for its backward: o in the type of q, lse in fp32."
    q, k, v, do, *u = map(torch.Tensor.double, x)
    kw = dict(scale=q.shape[-1]**-.5, is_causal=False)
    o, L = reference.forward(q, k, v, None, **kw)
    args = q, k, v, None, o.to(x[0].dtype).double(), L.float().double(), do, None
    grads, ddo, _ = reference.double_backward(*args, *u, None, **kw)
    return [args[4], *reference.backward(*args, **kw)[:3], *grads[:3], ddo]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("size", [30., 1e3])
def test_large_logits(dtype, size):
    x = problem(dtype=dtype, Lq=130, Lk=170)
    x[0] = x[0]*size
    theirs, sizes = exact(x), still(x)
    with sdpa_kernel(SDPBackend.MATH): math = derivatives(x, "sdpa") # a score of a thousand is itself uncertain in every type
    def errors(got): return [((a.double() - b).norm()/max(b.norm(), z.norm()/4)).item() for a, b, z in zip(got, theirs, sizes)]
    for n, (ours, m, s) in enumerate(zip(*map(errors, (derivatives(x), math, saved(x))))):
        assert ours <= max(2*m + 1e-6, 4*s, TOLERANCE[dtype]), f"output {n}: {ours:.1e}, the math path {m:.1e}, what was saved {s:.1e}"


@pytest.mark.parametrize("N", [100, 1000])
def test_pytorchs_precision_of_float32_products_is_honoured(N):
    x = problem(dtype=torch.float32, Lq=N, Lk=N)
    theirs, before, errors = exact(x), torch.get_float32_matmul_precision(), {}
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            errors[setting] = max(map(rel_err, derivatives(x), theirs))
    finally: torch.set_float32_matmul_precision(before)
    assert errors["highest"] < 3e-6 and errors["high"] < 1e-5 < errors["medium"] < 1e-2, errors


def test_bits_do_not_depend_on_what_memory_held():
    x = problem(Lq=333, Lk=77, D=40, Dv=24)
    plain = derivatives(x, is_causal=True)
    with poisoned(): again = derivatives(x, is_causal=True)
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(again, plain))


# Edges

@pytest.mark.parametrize("Lq, Lk", [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(Lq, Lk):
    x = problem(Lq=Lq, Lk=Lk)
    with poisoned(): ours = derivatives(x)
    for a, b in zip(ours, exact(x)): assert a.shape == b.shape and (a == 0).all()


@pytest.mark.parametrize("x", [torch.zeros(1, 1, 4, 16, device="meta"), torch.zeros(1, 1, 4, 16)], ids=["meta", "cpu"])
def test_tensors_that_are_not_on_a_gpu_are_refused(x):
    for call in (lambda: flash_attention(x, x, x), lambda: FlashAttention(16)(x, x, x), lambda: sdpa_custom(x, x, x, backend=FUSED)):
        with pytest.raises(ContractError) as e: call()
        said = str(e.value)
        assert said.count("got ") == 1 and "reference" in said and "\n" not in said


def test_tensors_on_two_devices_are_refused():
    q, k = torch.zeros(1, 1, 4, 16, device="cuda"), torch.zeros(1, 1, 4, 16)
    with pytest.raises(ContractError, match="accepted is one device"): flash_attention(q, k, k)
