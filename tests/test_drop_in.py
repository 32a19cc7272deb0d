"""theria under PyTorch's own call: every station, every transform, every layer, and back to PyTorch afterwards."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from theria import sdpa_custom
from theria.attention.contract import INTERPRETING, TOLERANCE, rel_err
from theria.drop_in import Underneath, register_sdpa, replace_sdpa

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(device="cpu", dtype=torch.float64, D=16):
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, D, generator=gen, dtype=torch.float64).to(device, dtype) for _ in range(4)]


def penalty(attend, q, k, v, **kw):
    q = q.detach().requires_grad_()
    g, = torch.autograd.grad(attend(q, k, v, **kw).double().pow(3).sum(), q, create_graph=True)
    return torch.autograd.grad(g.double().pow(2).sum(), q)[0]


def ways(attend, q, k, v, t):
    loss = lambda q: attend(q, k, v, is_causal=True).pow(3).sum()
    rows = torch.vmap(lambda q, k, v: attend(q, k, v).pow(3).sum())
    twice = lambda q: torch.autograd.grad(checkpoint(loss, q, use_reentrant=False), q, create_graph=True)[0].pow(2).sum()
    leaf = q.detach().requires_grad_()
    return {"penalty": penalty(attend, q, k, v), "grad": torch.func.grad(loss)(q), "hvp": torch.func.jvp(torch.func.grad(loss), (q,), (t,))[1], "vmap": rows(q, k, v),
            "hvp of vmap": torch.func.jvp(torch.func.grad(lambda q: rows(q, k, v).sum()), (q,), (t,))[1],
            "vmap of grad": torch.vmap(torch.func.grad(lambda q: attend(q, k[0], v[0]).pow(3).sum()))(q),
            "checkpoint": torch.autograd.grad(twice(leaf), leaf)[0]}


@pytest.mark.parametrize("device", DEVICES)
def test_every_way_reaches_the_fused_backend(device):
    if device == "cpu" and not INTERPRETING: pytest.skip("the kernels run on a CPU only through Triton's interpreter")
    x = problem(device, torch.float32)
    with replace_sdpa("triton_full_fused"): got = ways(F.scaled_dot_product_attention, *x)
    want = ways(lambda *a, **kw: sdpa_custom(*a, **kw, backend="reference"), *[t.double() for t in x])
    for way in want: assert rel_err(got[way], want[way]) <= TOLERANCE[torch.float32], way


def test_masks_groups_and_scale_are_handed_on():
    q, k, v, _ = problem()
    mask = torch.randn(3, 5, 5, dtype=torch.float64)
    for kw in (dict(attn_mask=mask), dict(attn_mask=mask > 0, scale=0.3)):
        with replace_sdpa(): got = penalty(F.scaled_dot_product_attention, q, k, v, **kw)
        assert rel_err(got, penalty(sdpa_custom, q, k, v, **kw)) == 0
    with replace_sdpa(): got = penalty(F.scaled_dot_product_attention, q, k[:, :1], v[:, :1], enable_gqa=True)
    assert rel_err(got, penalty(sdpa_custom, q, k[:, :1], v[:, :1], enable_gqa=True)) == 0
    with replace_sdpa(): got = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, is_causal=True)
    assert rel_err(got, sdpa_custom(q, k, v, is_causal=True)) == 0
    torch.manual_seed(0)
    with replace_sdpa(): got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert rel_err(got, sdpa_custom(q, k, v, dropout_p=0.5)) == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, monkeypatch):
    calls = []
    monkeypatch.setattr("theria.drop_in.sdpa_custom", lambda *a, **kw: calls.append(a) or sdpa_custom(*a, **kw))
    q, k, v, _ = problem()
    with context(), replace_sdpa(): got = F.scaled_dot_product_attention(q, k, v)
    assert len(calls) == 1 and rel_err(got, F.scaled_dot_product_attention(q, k, v)) <= TOLERANCE[torch.float64]


def test_code_compiled_afresh_takes_what_is_underneath_at_that_time():
    q, k, v, _ = problem()
    calls, original = [], sdpa_custom
    def value(q): return F.scaled_dot_product_attention(q, k, v).pow(3).sum()
    def hvp(q): return torch.func.jvp(torch.func.grad(value), (q,), (q,))[1]
    def compiled(f):
        torch._dynamo.reset()
        return torch.compile(f, backend="aot_eager", fullgraph=True)(q)
    compiled(value)
    with pytest.raises(Exception, match="forward AD|not implemented|Unsupported"): compiled(hvp)
    with replace_sdpa(): inside = compiled(hvp)
    assert rel_err(inside, torch.func.jvp(torch.func.grad(lambda q: original(q, k, v).pow(3).sum()), (q,), (q,))[1]) <= TOLERANCE[torch.float64]
    with pytest.raises(Exception, match="forward AD|not implemented|Unsupported"): compiled(hvp)


def test_two_at_once_and_removing_twice():
    q, k, v, _ = problem()
    with replace_sdpa(), replace_sdpa("reference"): assert penalty(F.scaled_dot_product_attention, q, k, v).norm() > 0
    under, over = Underneath(), Underneath("reference")
    under.remove(), under.remove()  # not the latest: the other one stays
    assert penalty(F.scaled_dot_product_attention, q, k, v).norm() > 0
    over.remove(), over.remove()
    with pytest.raises(RuntimeError, match="is not implemented"): penalty(F.scaled_dot_product_attention, q, k, v)


def test_an_error_inside_gives_the_call_back():
    q, k, v, _ = problem()
    with pytest.raises(ZeroDivisionError), replace_sdpa(): 1/0
    with pytest.raises(RuntimeError, match="is not implemented"): penalty(F.scaled_dot_product_attention, q, k, v)


def test_registering_activates_nothing():
    q, k, v, _ = problem()
    assert register_sdpa("theria-unused") in torch.nn.attention.list_flash_attention_impls()
    with pytest.raises(RuntimeError, match="is not implemented"): penalty(F.scaled_dot_product_attention, q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["mha", "encoder"])
def test_layers_of_pytorch_on_the_gpu(kind, dtype):
    torch.manual_seed(0)
    if kind == "mha":
        layer = nn.MultiheadAttention(64, 2, batch_first=True).double()
        call = lambda m, x: m(x, x, x, need_weights=False)[0]
    else:
        layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0., batch_first=True).double()
        call = lambda m, x: m(x)
    x = torch.randn(2, 65, 64, dtype=torch.float64)
    def second(m, x):
        x = x.detach().requires_grad_()
        g, = torch.autograd.grad(call(m, x).double().pow(3).mean(), x, create_graph=True)
        return torch.autograd.grad(g.double().pow(2).sum(), x)[0]
    with sdpa_kernel(SDPBackend.MATH): want = second(layer, x)
    layer, x = layer.to("cuda", dtype), x.to("cuda", dtype)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        with pytest.raises(RuntimeError, match="not implemented"): second(layer, x)
    with sdpa_kernel(SDPBackend.MATH): limit = rel_err(second(layer, x), want)
    with replace_sdpa("triton_full_fused"): got = second(layer, x)
    assert rel_err(got, want) <= 2*limit + 1e-6


@pytest.mark.gpu
def test_autocast_on_the_gpu():
    q, k, v, _ = problem("cuda", torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16), replace_sdpa("triton_full_fused"):
        o = F.scaled_dot_product_attention(q, k, v)
        assert o.dtype == torch.bfloat16
        got = penalty(F.scaled_dot_product_attention, q, k, v)
    assert rel_err(got, penalty(sdpa_custom, *[x.double() for x in (q, k, v)])) <= 5*TOLERANCE[torch.bfloat16]
