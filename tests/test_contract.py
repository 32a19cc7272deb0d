"The public call: what it refuses, that it stands in for PyTorch's to second order, and that tensors of every kind pass through it."
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria import sdpa_custom
from theria.attention import attention, contract
from theria.attention.contract import ContractError, rel_err


def qkv(*lead, Lq=5, Lk=7, D=8, Dv=6, dtype=torch.float64): return [torch.randn(*lead, L, d, dtype=dtype) for L, d in ((Lq, D), (Lk, D), (Lk, Dv))]


# What is refused

@pytest.mark.parametrize("options, says", [
    (dict(is_causal="no"), "is_causal='no'"), (dict(is_causal=None), "is_causal=None"), (dict(is_causal=1), "is_causal=1"),
    (dict(enable_gqa=0), "enable_gqa=0"), (dict(dropout_p=False), "dropout_p=False"), (dict(scale=False), "scale=False"),
    (dict(is_causal=torch.ones(5, 7, dtype=torch.bool)), "is_causal of type torch.Tensor"), (dict(is_causal=np.True_), "is_causal of type numpy.bool"),
    (dict(enable_gqa="no"), "enable_gqa='no'"), (dict(return_lse=1), "return_lse=1"),
    (dict(scale=10**400), "finite number"), (dict(scale=torch.tensor(.5)), "finite number"), (dict(scale=torch.rand(4)), "finite number"),
    (dict(scale=-1), "scale=-1"), (dict(scale=math.nan), "scale=nan"), (dict(scale="1"), "scale='1'"), (dict(scale=True), "scale=True"),
    (dict(dropout_p=1.), "[0, 1)"), (dict(dropout_p=math.nan), "[0, 1)"), (dict(dropout_p=None), "[0, 1)"), (dict(dropout_p=True), "[0, 1)"),
    (dict(backend=["reference"]), "backend=['reference']"), (dict(backend=None), "backend=None"), (dict(backend="Reference"), "backend='Reference'"),
    (dict(stats=None), "stats=None"), (dict(attn_mask=torch.ones(7, 5)), "(7, 5)"), (dict(attn_mask=torch.ones(5, 7).int()), "torch.int32"),
    (dict(attn_mask=np.ones((5, 7), bool)), "ndarray"), (dict(attn_mask=torch.ones(7, dtype=torch.bool)), "rank ≥ 2"),
    (dict(attn_mask=torch.ones(5, 7, dtype=torch.bool), is_causal=True), "one of them")])
def test_faulty_options(options, says):
    x = qkv(2, 4)
    for good in ({}, dict(is_causal=True), dict(return_lse=True), dict(scale=1), dict(scale=0)): sdpa_custom(*x, **good)  # remembered, and equal to some of the faulty ones as keys
    with pytest.raises(ContractError) as e: sdpa_custom(*x, **options)
    message = str(e.value)
    assert says in message and message.startswith("got ") and "; accepted" in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("turn, says", [
    (lambda q: q.to_sparse(), "layout torch.sparse_coo"), (lambda q: q.numpy(), "type ndarray"), (lambda q: q.tolist(), "type list"), (lambda q: None, "NoneType"),
    (lambda q: q.int(), "torch.int32"), (lambda q: q.cdouble(), "torch.complex128"), (lambda q: q.float(), "one dtype"), (lambda q: q.to("meta"), "one device"),
    (lambda q: q[0, 0, 0], "rank 1"), (lambda q: q[:, :3], "3 query"), (lambda q: q[..., :4], "D=4"), (lambda q: q.expand(3, 2, 4, 5, 8)[:, :, :3], "3 query")])
def test_faulty_queries(turn, says):
    q, k, v = qkv(2, 4)
    sdpa_custom(q, k, v)
    with pytest.raises(ContractError, match=says.replace("(", "\\(")): sdpa_custom(turn(q), k, v)


def test_a_number_is_any_plain_number():
    q, k, v = qkv(2, 4)
    for scale in (np.float32(.5), np.float64(.5), .5): assert sdpa_custom(q, k, v, scale=scale).equal(sdpa_custom(q, k, v, scale=.5))
    assert sdpa_custom(q, k, v, scale=np.int64(1)).equal(sdpa_custom(q, k, v, scale=1))


# Against PyTorch, to second order

@st.composite
def problems(draw):
    some = lambda lead: tuple(1 if draw(st.integers(0, 5)) == 0 else n for n in lead)  # a dimension that is broadcast
    Hkv, grouped, flat = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(0, 8)) == 0
    Hq = Hkv*draw(st.integers(1, 3)) if grouped else Hkv
    batch, heads = ((), lambda h: ()) if flat else (tuple(draw(st.lists(st.integers(1, 3), max_size=2))), lambda h: (h,))
    Lq, Lk, D, Dv = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    sizes = some(batch) + heads(Hq) + (Lq, D), some(batch) + heads(Hkv) + (Lk, D), some(batch) + heads(Hkv) + (Lk, Dv)
    kind, mask = draw(st.sampled_from(["none", "causal", "bool", "sparse", "additive"])), some(batch + heads(Hq) + (Lq, Lk))
    return sizes, grouped and not flat, kind, mask[draw(st.integers(0, len(mask) - 2)):], draw(st.sampled_from([None, 0., .3, 2])), draw(st.integers(0, 2**31))


def derivatives(f, xs, do, u):
    "o, the gradients, and the gradients of their product with u."
    o = f(*xs)
    first = torch.autograd.grad(o, xs, do, create_graph=True)
    return o, *first, *torch.autograd.grad(sum((g*w).sum() for g, w in zip(first, u)), xs, allow_unused=True, materialize_grads=True)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(problems())
def test_same_as_pytorch_to_second_order(problem):
    sizes, grouped, kind, size, scale, seed = problem
    rng = torch.Generator().manual_seed(seed)
    random = lambda *n: torch.randn(n, dtype=torch.float64, generator=rng)
    xs, mask = [random(*n).requires_grad_() for n in sizes], None
    if kind in ("bool", "sparse"): mask = random(*size) > (kind == "sparse")
    if kind == "additive": xs.append(random(*size).requires_grad_())
    call = lambda f: lambda *x: f(*x[:3], x[3] if len(x) > 3 else mask, is_causal=kind == "causal", scale=scale, enable_gqa=grouped)
    try: ours = call(sdpa_custom)(*xs)
    except ContractError as e:
        assert "attn_mask of shape" in str(e)  # the one thing of these that only PyTorch takes: a mask with more batch dimensions than the tensors have
        return
    do, u = random(*ours.shape), [random(*x.shape) for x in xs]
    try:
        with sdpa_kernel(SDPBackend.MATH): theirs = derivatives(call(F.scaled_dot_product_attention), xs, do, u)
    except RuntimeError as e:
        assert "doesn't match the broadcast shape" in str(e)  # PyTorch adds a mask in place, which cannot broadcast the scores
        return
    for a, b in zip(derivatives(call(sdpa_custom), xs, do, u), theirs, strict=True):
        assert a.shape == b.shape and (rel_err(a, b) <= 1e-11 or (a - b).abs().max() <= 1e-13)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_a_remembered_call_is_the_same_call(problem, dtype):
    sizes, grouped, kind, size, scale, _ = problem
    *x, mask = (torch.zeros(n, dtype=dtype) for n in (*sizes, size))
    call = (*x, {"none": None, "causal": None, "additive": mask}.get(kind, mask > 0), 0., kind == "causal", scale, grouped, "exact", False, "auto")
    contract._decided.clear()
    try: first, *folded = contract.check(*call)
    except ContractError:
        assert not contract._decided
        return
    again, *same = contract.check(*call)
    assert first == again == contract._decide(*call)[0] and len(contract._decided) == 1
    for a, b in zip(folded, same, strict=True): assert (a is None and b is None) or (a.shape, a.stride()) == (b.shape, b.stride())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, on the first use of its compiler
def test_a_traced_call_is_not_remembered():
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    contract._decided.clear()
    f = lambda q, k, v: sdpa_custom(q, k, v, is_causal=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(f, fullgraph=True, backend=counter), qkv(2, 4)
    compiled(*x)
    for traced in (f, torch.func.grad(lambda *x: f(*x).sum()), torch.vmap(f)): make_fx(traced, tracing_mode="symbolic")(*x)
    torch.export.export(type("Attention", (nn.Module,), dict(forward=lambda self, q, k, v: f(q, k, v)))(), tuple(x), strict=False)
    assert not contract._decided
    f(*x)
    assert len(contract._decided) == 1 and rel_err(compiled(*x), f(*x)) <= 1e-12 and counter.frame_count == 1  # nor does a remembered call compile anything again


def test_row_statistics_are_differentiated_twice():
    q, k, v = (x.requires_grad_() for x in qkv(2, 4))
    plain = lambda q, k: (q @ k.mT/q.shape[-1]**.5).logsumexp(-1)
    found = [derivatives(f, (q, k), torch.ones(2, 4, 5, dtype=torch.float64), (q, k)) for f in (lambda q, k: sdpa_custom(q, k, v, return_lse=True)[1], plain)]
    for a, b in zip(*found): assert rel_err(a, b) <= 1e-12


def test_partial_results_merge():
    q, k, v = (x.requires_grad_() for x in qkv(2, 4))
    def merged(q, k, v):
        (o1, L1), (o2, L2) = (sdpa_custom(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 3), slice(3, None)))
        L = torch.logaddexp(L1, L2)
        return o1*(L1 - L).exp()[..., None] + o2*(L2 - L).exp()[..., None]
    do = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    for a, b in zip(*(derivatives(f, (q, k, v), do, (q, k, v)) for f in (merged, sdpa_custom))): assert rel_err(a, b) <= 1e-12


# In place of PyTorch's function, under PyTorch's own layers

@pytest.mark.parametrize("options", [dict(), dict(norm_first=True, activation="gelu")])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_drop_in_under_an_encoder_layer(monkeypatch, mask, options):
    kw = dict(none={}, causal=dict(src_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64), is_causal=True),
              padding=dict(src_key_padding_mask=torch.arange(6).expand(3, 6) > 3))[mask]
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True, dtype=torch.float64, **options)
    x, losses, calls, original = torch.randn(5, 3, 6, 8, dtype=torch.float64), [], [], F.scaled_dot_product_attention
    for attend in (original, lambda *a, **k: calls.append(1) or sdpa_custom(*a, **k)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
        copied = copy.deepcopy(layer)
        optimizer = torch.optim.SGD(copied.parameters(), lr=.1)
        for batch in x:
            optimizer.zero_grad()
            loss = copied(batch, **kw).pow(3).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss)
    assert len(calls) == 5 and rel_err(losses[1], losses[0]) <= 1e-12


# Tensors of every kind

def test_tensors_without_data():
    q, k, v = (x.to("meta").requires_grad_() for x in qkv(2, 4))
    o, L = sdpa_custom(q, k, v, is_causal=True, return_lse=True)
    g = torch.autograd.grad(o.sum() + L.sum(), (q, k, v), create_graph=True)
    assert (o.shape, L.shape) == ((2, 4, 5, 6), (2, 4, 5))
    assert [x.shape for x in torch.autograd.grad(sum(x.sum() for x in g), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_a_traced_call_has_free_lengths():
    f = lambda q, k, v: sdpa_custom(q, k, v, is_causal=q.shape[-2] > 1)
    traced = make_fx(f, tracing_mode="symbolic")(*qkv(2, 4))
    for sizes in (dict(Lq=9, Lk=3), dict(Lq=4, Lk=12)): assert rel_err(traced(*(x := qkv(2, 4, **sizes))), f(*x)) <= 1e-12


def test_an_exported_call_has_free_batch_and_heads():
    class Attention(nn.Module):
        def forward(self, q, k, v): return sdpa_custom(q, k, v)
    free = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("H", min=2, max=64)}
    program = torch.export.export(Attention(), tuple(qkv(2, 4)), dynamic_shapes=(free,)*3, strict=False)
    assert rel_err(program.module()(*(x := qkv(3, 6))), sdpa_custom(*x)) <= 1e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # PyTorch's own, on the first use of its compiler
@pytest.mark.parametrize("f", [lambda q, k, v: sdpa_custom(q, k, v, scale=q.shape[-1]**-.5), lambda q, k, v: sdpa_custom(q, k, v, is_causal=q.shape[-2] > 1),
                               lambda q, k, v: torch.func.jvp(torch.func.grad(lambda q: sdpa_custom(q, k, v).sin().sum()), (q,), (q,))[1]],
                         ids=["scale of a size", "switch of a size", "forward over reverse"])
def test_one_graph_with_free_sizes(f):
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, L in ((2, 5), (3, 9)): assert rel_err(compiled(*(x := qkv(B, 4, Lq=L, Lk=L + 1))), f(*x)) <= 1e-12


class Marked(torch.Tensor): pass

@pytest.mark.parametrize("turn", [lambda x: x.as_subclass(Marked), lambda x: x.mT.contiguous().mT, lambda x: x.flip(-1), lambda x: x[:1, :1].expand_as(x), nn.Parameter,
                                  lambda x: torch.stack([x, x], -1)[..., 0]], ids=["subclass", "transposed", "flipped", "expanded", "parameter", "strided"])
def test_any_tensor(turn):
    q, k, v = map(turn, qkv(2, 4))
    o = sdpa_custom(q, k, v)
    assert type(o) is (Marked if type(q) is Marked else torch.Tensor) and rel_err(o, F.scaled_dot_product_attention(q, k, v)) <= 1e-12


@pytest.mark.parametrize("mask", [torch.randn(3, 5, 7, dtype=torch.float64), torch.rand(3, 5, 7) > .2], ids=["additive", "boolean"])
def test_mapped_over_the_mask_alone(mask):
    q, k, v = qkv(2, 4)
    mapped = torch.vmap(sdpa_custom, in_dims=(None, None, None, 0))(q, k, v, mask)
    assert rel_err(mapped, torch.stack([sdpa_custom(q, k, v, m) for m in mask])) <= 1e-12


def test_inference_mode():
    q, k, v = qkv(2, 4)
    with torch.inference_mode(): o = sdpa_custom(q, k, v, stats="frozen")
    assert o.is_inference() and o.equal(sdpa_custom(q, k, v))


# NumPy

@pytest.mark.parametrize("change, says", [
    (dict(query=[[1., 2.]]), "type list"), (dict(query=torch.ones(2, 4)), "type Tensor"), (dict(query=np.ones((2, 4), complex)), "complex128"),
    (dict(query=np.ones(4)), "check the dimensions"), (dict(key=np.ones((3, 5))), "check the dimensions"), (dict(key=np.ones((2, 3, 4)), value=np.ones((5, 3, 2))), "broadcast"),
    (dict(mask=np.tril(np.ones((2, 3), int))), "mask.astype"), (dict(mask=np.ones((3, 2), bool)), "broadcasts to"), (dict(mask=np.ones((5, 2, 3), bool)), "broadcasts to"),
    (dict(scale=math.nan), "scale=nan"), (dict(scale=-1), "scale=-1")])
def test_faulty_arrays(change, says):
    with pytest.raises(ContractError, match=says): attention(**{**dict(query=np.ones((2, 4)), key=np.ones((3, 4)), value=np.ones((3, 2))), **change})


def test_a_nan_is_not_an_empty_row():
    q, k, v = np.ones((2, 4)), np.ones((3, 4)), np.ones((3, 2))
    assert np.isnan(attention(q*[[1], [np.nan]], k, v)[0]).tolist() == [[False]*2, [True]*2]
    assert (attention(q, k, v, mask=np.zeros((2, 3), bool))[0] == 0).all()


def test_integers_are_numbers():
    q, k, v = (np.arange(n*4).reshape(n, 4) % 3 for n in (2, 3, 3))
    for scale in (None, 1): np.testing.assert_allclose(attention(q, k, v, scale=scale)[0], attention(*(x.astype(float) for x in (q, k, v)), scale=scale)[0], rtol=1e-15)
