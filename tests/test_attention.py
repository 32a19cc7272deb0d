"The definition of attention: in NumPy, against PyTorch's call on every backend that runs here, and its gradients."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria import sdpa_custom
from theria.attention import attention
from theria.attention.contract import TOLERANCE, ContractError, rel_err

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BACKENDS = ("reference", "triton_ref", "triton_fast", "triton_fused", "triton_full_fused")
CLOSE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.float16: dict(rtol=1e-2, atol=1e-2), torch.bfloat16: dict(rtol=1e-2, atol=1e-2)}
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=() if CUDA else pytest.mark.gpu)]  # Triton's interpreter has no bf16 of its own


def pytorch_attention(q, k, v, mask=None, scale=None):
    "Attention from PyTorch operations, with its weights."
    s = q @ k.transpose(-2, -1)*(1/math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None: s = s.masked_fill(~mask, -math.inf)
    p = torch.softmax(s, -1).nan_to_num()
    return p @ v, p


def arrays(*shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def against_pytorch(q, k, v, mask=None, scale=None, tol=1e-5):
    o, p = attention(q, k, v, mask=mask, scale=scale)
    ref_o, ref_p = pytorch_attention(*map(torch.from_numpy, (q, k, v)), None if mask is None else torch.from_numpy(mask), scale)
    np.testing.assert_allclose(o, ref_o.numpy(), rtol=tol, atol=tol)
    np.testing.assert_allclose(p, ref_p.numpy(), rtol=tol, atol=tol)
    return o, p


class TestAttention:
    "`attention(query, key, value, mask, scale)` in NumPy."

    @pytest.mark.parametrize("n, d", [(2, 3), (4, 8), (32, 16), (128, 64), (256, 128)], ids=["tiny", "small", "medium", "large", "larger"])
    def test_sizes(self, n, d): against_pytorch(*arrays((n, d), (n, d), (n, d)))

    @pytest.mark.parametrize("lead", [(2,), (2, 3), (1, 2, 3)])
    def test_leading_dimensions(self, lead):
        o, p = against_pytorch(*arrays((*lead, 5, 4), (*lead, 7, 4), (*lead, 7, 6)))
        assert o.shape == (*lead, 5, 6) and p.shape == (*lead, 5, 7)

    @pytest.mark.parametrize("lq, lk", [(1, 9), (9, 1), (5, 12), (1, 1)])
    def test_different_lengths(self, lq, lk): against_pytorch(*arrays((lq, 8), (lk, 8), (lk, 8)))

    def test_different_value_dimension(self):
        assert against_pytorch(*arrays((5, 8), (6, 8), (6, 3)))[0].shape == (5, 3)

    def test_boolean_mask(self):
        mask = np.random.default_rng(1).random((6, 9)) > 0.4
        _, p = against_pytorch(*arrays((6, 8), (9, 8), (9, 8)), mask=mask)
        assert (p[~mask] == 0).all()

    def test_causal_mask(self):
        q, k, v = arrays((7, 8), (7, 8), (7, 8))
        o, _ = against_pytorch(q, k, v, mask=np.tril(np.ones((7, 7), bool)))
        np.testing.assert_allclose(o[0], v[0], rtol=1e-6)  # the first query sees the first key only

    def test_additive_mask(self):
        q, k, v, bias = arrays((6, 8), (9, 8), (9, 4), (6, 9))
        s = q @ k.T/math.sqrt(8) + bias
        p = np.exp(s - s.max(-1, keepdims=True))
        np.testing.assert_allclose(attention(q, k, v, mask=bias)[1], p/p.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)

    def test_row_that_sees_nothing(self):
        mask = np.ones((3, 5), bool)
        mask[1] = False
        o, p = attention(*arrays((3, 4), (5, 4), (5, 4)), mask=mask)
        assert (o[1] == 0).all() and (p[1] == 0).all() and np.isfinite(o).all()

    @pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0])
    def test_scale(self, scale): against_pytorch(*arrays((5, 8), (6, 8), (6, 8)), scale=scale)

    def test_weights_are_probabilities(self):
        _, p = attention(*arrays((2, 5, 8), (2, 6, 8), (2, 6, 8)))
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
        assert (p >= 0).all()

    def test_large_scores(self):
        q, k, v = arrays((5, 8), (6, 8), (6, 8))
        o, p = against_pytorch(1e3*q, 1e3*k, v)
        assert np.isfinite(o).all() and np.isfinite(p).all()

    def test_equal_keys_give_the_mean(self):
        q, k, v = arrays((4, 8), (1, 8), (6, 5))
        np.testing.assert_allclose(attention(q, np.repeat(k, 6, 0), v)[0], np.broadcast_to(v.mean(0), (4, 5)), rtol=1e-5, atol=1e-6)

    def test_order_of_keys_does_not_matter(self):
        (q, k, v), order = arrays((4, 8), (6, 8), (6, 8), dtype=np.float64), np.random.default_rng(2).permutation(6)
        np.testing.assert_allclose(attention(q, k, v)[0], attention(q, k[order], v[order])[0], rtol=1e-12)

    def test_determinism_and_inputs_untouched(self):
        x = arrays((5, 8), (6, 8), (6, 8))
        kept = [y.copy() for y in x]
        for a, b in zip(attention(*x), attention(*x)): np.testing.assert_array_equal(a, b)
        for a, b in zip(x, kept): np.testing.assert_array_equal(a, b)

    def test_float64(self): against_pytorch(*arrays((5, 8), (6, 8), (6, 8), dtype=np.float64), tol=1e-12)

    @pytest.mark.parametrize("shapes", [((5, 8), (6, 7), (6, 8)), ((5, 8), (6, 8), (7, 8)), ((8,), (6, 8), (6, 8))])
    def test_shapes_that_do_not_fit(self, shapes):
        with pytest.raises(ContractError, match="got query .*; accepted are"): attention(*arrays(*shapes))


def tensors(B=1, H=2, Lq=17, Lk=33, D=16, Dv=16, dtype=torch.float32):
    return [torch.randn(s, device=DEVICE).to(dtype) for s in ((B, H, Lq, D), (B, H, Lk, D), (B, H, Lk, Dv))]


def same_as_torch(backend, q, k, v, mask=None, **kw):
    o, ref = sdpa_custom(q, k, v, mask, backend=backend, **kw), F.scaled_dot_product_attention(q, k, v, mask, **kw)
    assert o.dtype == ref.dtype and o.shape == ref.shape and o.isfinite().all()
    torch.testing.assert_close(o, ref, **CLOSE[q.dtype])
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask if mask is None or mask.dtype == torch.bool else mask.double(), **kw)
    assert rel_err(o, exact) <= TOLERANCE[q.dtype]


@pytest.mark.parametrize("backend", BACKENDS)
class TestAttentionPyTorchAPI:
    "`sdpa_custom` against `F.scaled_dot_product_attention`."

    @pytest.mark.parametrize("sizes", [dict(B=1, H=1, Lq=4, Lk=4, D=8, Dv=8), dict(), dict(Lq=40, Lk=7, D=33, Dv=5), dict(Lq=1, Lk=65)],
                             ids=["small", "medium", "tall", "one query"])
    def test_attention_basic(self, backend, sizes): same_as_torch(backend, *tensors(**sizes))

    @pytest.mark.parametrize("lq, lk", [(33, 33), (40, 20), (20, 40)])
    def test_attention_causal_mask(self, backend, lq, lk): same_as_torch(backend, *tensors(Lq=lq, Lk=lk), is_causal=True)

    def test_attention_boolean_mask(self, backend): same_as_torch(backend, *tensors(), torch.rand(1, 1, 17, 33, device=DEVICE) > 0.5)

    def test_attention_additive_mask(self, backend): same_as_torch(backend, *tensors(), torch.randn(2, 17, 33, device=DEVICE))

    def test_attention_scale(self, backend): same_as_torch(backend, *tensors(), scale=0.7)

    def test_attention_grouped_heads(self, backend):
        q, (_, k, v) = torch.randn(1, 4, 9, 16, device=DEVICE), tensors()
        same_as_torch(backend, q, k, v, enable_gqa=True)

    def test_attention_fp16(self, backend):
        for kw in ({}, dict(is_causal=True)): same_as_torch(backend, *tensors(dtype=torch.float16), **kw)

    @pytest.mark.gpu
    def test_attention_bf16(self, backend):
        for kw in ({}, dict(is_causal=True)): same_as_torch(backend, *tensors(dtype=torch.bfloat16), **kw)


@pytest.mark.parametrize("backend", BACKENDS)
class TestAttentionGradients:
    "Gradients with respect to query, key and value, and their stability."

    def gradients(self, f, x, do): return torch.autograd.grad(f(*x), x, do)

    def pair(self, backend, x, **kw):
        x = [y.requires_grad_() for y in x]
        do = torch.randn(*x[0].shape[:-1], x[2].shape[-1], device=DEVICE, dtype=x[0].dtype)
        ours = self.gradients(lambda *x: sdpa_custom(*x, backend=backend, **kw), x, do)
        wide = [y.detach().double().requires_grad_() for y in x]
        return ours, self.gradients(lambda *x: F.scaled_dot_product_attention(*x, **kw), wide, do.double())

    @pytest.mark.parametrize("n", range(3), ids=["query", "key", "value"])
    def test_gradient(self, backend, n):
        ours, theirs = self.pair(backend, tensors())
        assert ours[n].isfinite().all() and rel_err(ours[n], theirs[n]) <= TOLERANCE[torch.float32]

    @pytest.mark.parametrize("lq, lk", [(33, 33), (40, 20), (20, 40)])
    def test_gradients_causal(self, backend, lq, lk):
        for a, b in zip(*self.pair(backend, tensors(Lq=lq, Lk=lk), is_causal=True)): assert rel_err(a, b) <= TOLERANCE[torch.float32]

    @pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
    def test_gradients_half(self, backend, dtype):
        for a, b in zip(*self.pair(backend, tensors(dtype=dtype))): assert a.dtype == dtype and rel_err(a, b) <= TOLERANCE[dtype]

    @pytest.mark.parametrize("size", [1e-4, 1e2], ids=["tiny", "huge"])
    def test_gradient_numerical_stability(self, backend, size):
        q, k, v = tensors()
        for a in self.pair(backend, [size*q, k, v])[0]: assert a.isfinite().all()

    def test_gradients_of_a_row_that_sees_nothing(self, backend):
        x, mask = [y.requires_grad_() for y in tensors()], torch.ones(17, 33, dtype=torch.bool, device=DEVICE)
        mask[3] = False
        g = torch.autograd.grad(sdpa_custom(*x, mask, backend=backend).sum(), x)
        assert g[0][:, :, 3].eq(0).all() and all(a.isfinite().all() for a in g)

    def test_second_gradients(self, backend):
        x, u = [y.requires_grad_() for y in tensors()], [torch.randn_like(y) for y in tensors()]
        def second(x, attend):
            g = torch.autograd.grad(attend(*x).pow(2).sum(), x, create_graph=True)
            return torch.autograd.grad(g, x, [a.to(y.dtype) for a, y in zip(u, x)])
        ours = second(x, lambda *x: sdpa_custom(*x, backend=backend))
        with sdpa_kernel(SDPBackend.MATH): theirs = second([y.detach().double().requires_grad_() for y in x], F.scaled_dot_product_attention)
        for a, b in zip(ours, theirs): assert rel_err(a, b) <= TOLERANCE[torch.float32]

    @pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
    def test_rows_hidden_by_a_large_finite_number(self, backend, fill):
        "PyTorch's softmax averages such a row, for its scores are lost in the sum; its statistic must still say over how many keys."
        x, u, mask = [y.requires_grad_() for y in tensors()], tensors(), torch.zeros(17, 33, device=DEVICE)
        mask[3], mask[5, 20:] = fill, fill
        def derivatives(attend):
            o = attend(*x, mask)
            g = torch.autograd.grad(o.pow(2).sum(), x, create_graph=True)
            return o, *g, *torch.autograd.grad(g, x, u)
        with sdpa_kernel(SDPBackend.MATH): theirs = derivatives(F.scaled_dot_product_attention)
        for a, b in zip(derivatives(lambda *a: sdpa_custom(*a, backend=backend)), theirs): assert rel_err(a, b) <= 1e-3
