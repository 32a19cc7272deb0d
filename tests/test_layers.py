"Layers against formulas written independently, under PyTorch's transforms, and for every refusal."
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from theria import sdpa_custom
from theria.attention.contract import TOLERANCE, ContractError, rel_err
from theria.layers import MultiHeadAttention, TransformerBlock, merge_heads, split_heads

F64 = TOLERANCE[torch.float64]


def close(a, b, tol=F64):
    return rel_err(a, b) <= tol or (a - b).abs().max().item() <= tol  # absolute where exact arithmetic gives 0


def by_einsum(layer, x, context, hidden=None):
    "Multi-head attention one head at a time, from the projections' rows, with no view and no library attention."
    D, group, heads = layer.head_dim, layer.n_heads // layer.n_kv_heads, []
    for h in range(layer.n_heads):
        mine, shared = slice(h*D, (h + 1)*D), slice(h//group*D, (h//group + 1)*D)
        q, k, v = (torch.einsum("...d,ed->...e", t, p.weight[rows]) + p.bias[rows]
                   for t, p, rows in ((x, layer.q_proj, mine), (context, layer.k_proj, shared), (context, layer.v_proj, shared)))
        s = torch.einsum("...id,...jd->...ij", q, k)/math.sqrt(D)
        if hidden is not None: s = s.masked_fill(hidden, -torch.inf)
        e = (s - s.amax(-1, keepdim=True)).exp()
        heads.append(torch.einsum("...ij,...jd->...id", e/e.sum(-1, keepdim=True), v))
    return torch.einsum("...e,de->...d", torch.cat(heads, -1), layer.out_proj.weight) + layer.out_proj.bias


def derivatives(y, leaves):
    "Value, gradients and a Hessian-vector product of a nonlinear scalar."
    gen = torch.Generator().manual_seed(1)
    u = [torch.randn(t.shape, generator=gen, dtype=t.dtype) for t in leaves]
    grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
    return [y, *grads, *torch.autograd.grad(sum((g*w).sum() for g, w in zip(grads, u)), leaves)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]), st.integers(1, 5),
       st.sampled_from(["full", "causal", "mask"]), st.booleans())
def test_attention_equals_the_formula_to_second_order(B, Lq, Lk, heads, D, kind, unbatched):
    torch.manual_seed(B + 10*Lq + 100*Lk)
    layer = MultiHeadAttention(6, heads[0], n_kv_heads=heads[1], head_dim=D).double()
    x = torch.randn(*(() if unbatched else (B,)), Lq, 6, dtype=torch.float64, requires_grad=True)
    context = x if kind == "causal" else torch.randn(*x.shape[:-2], Lk, 6, dtype=torch.float64, requires_grad=True)
    visible = torch.ones(Lq, context.shape[-2], dtype=torch.bool)
    if kind == "causal": visible = visible.tril()
    if kind == "mask": visible[:, 1:] = torch.rand(Lq, context.shape[-2] - 1) < 0.5
    leaves = [x, *({} if context is x else (context,)), *layer.parameters()]
    options = {"full": {}, "causal": dict(is_causal=True), "mask": dict(attn_mask=visible)}[kind]
    for ours, theirs in zip(derivatives(layer(x, context, **options), leaves), derivatives(by_einsum(layer, x, context, ~visible), leaves)):
        assert close(ours, theirs)


@pytest.mark.parametrize("options, hidden", [({}, None), (dict(is_causal=True), torch.ones(5, 5, dtype=torch.bool).triu(1)),
                                             (dict(attn_mask=torch.eye(5, dtype=torch.bool)), ~torch.eye(5, dtype=torch.bool))])
def test_block_equals_its_equation_to_second_order(options, hidden):
    torch.manual_seed(0)
    block = TransformerBlock(8, 4, n_kv_heads=2).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def norm(x, m): return (x - x.mean(-1, keepdim=True))/(x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()*m.weight + m.bias
    def gelu(x): return x*0.5*(1 + torch.erf(x/math.sqrt(2)))
    z = norm(x, block.norm1)
    y = x + by_einsum(block.attention, z, z, hidden)
    first, last = block.mlp[0], block.mlp[3]
    y = y + gelu(norm(y, block.norm2) @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert first.weight.shape == (32, 8)
    leaves = [x, *block.parameters()]
    assert all(close(a, b) for a, b in zip(derivatives(block(x, **options), leaves), derivatives(y, leaves)))


def test_gradcheck_and_gradgradcheck_through_a_block():
    torch.manual_seed(0)
    block = TransformerBlock(4, 2, 4).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    f = lambda x: block(x, is_causal=True)
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (x,), check_fwd_over_rev=True, check_batched_grad=True)


def test_heads_are_views_and_gradients_may_be_strided():
    seen = {}

    def spy(q, k, v):
        o = sdpa_custom(q, k, v)
        o.register_hook(lambda do: seen.update(do=do))
        seen.update(q=q, k=k, v=v)
        return o

    layer = MultiHeadAttention(12, 3, backend=spy).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    layer(x).sin().sum().backward()
    assert {name: t.is_contiguous() for name, t in seen.items()} == dict(q=False, k=False, v=False, do=False)
    assert all(t._is_view() and t.shape == (2, 3, 5, 4) and t.stride() == (60, 4, 12, 1) for t in (seen[name] for name in "qkv"))
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


@pytest.mark.parametrize("change", [lambda x: x.expand(3, 5, 12), lambda x: x.mT.contiguous().mT, lambda x: x[..., ::2, :], lambda x: x[:, :0]])
def test_inputs_of_any_layout(change):
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 3).double()
    x = change(torch.randn(1, 5, 12, dtype=torch.float64)).requires_grad_()
    z = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for a, b in zip(derivatives(layer(x), [x]), derivatives(layer(z), [z])):
        assert a.shape == b.shape and (a.numel() == 0 or close(a, b))


def test_no_keys_give_the_output_bias():
    layer = MultiHeadAttention(12, 3)
    y = layer(torch.randn(2, 5, 12), torch.randn(2, 0, 12))
    assert torch.equal(y, layer.out_proj.bias.expand(2, 5, 12))


def test_options_reach_the_attention_only_when_set():
    seen = []

    def note(q, k, v, **options):
        seen.append(options)
        return torch.zeros_like(q)

    layer, x = MultiHeadAttention(12, 6, n_kv_heads=2, dropout=0.25, backend=note), torch.zeros(1, 3, 12)
    mask = torch.ones(3, 3, dtype=torch.bool)
    layer(x)
    layer.eval()(x, is_causal=True)
    layer(x, attn_mask=mask)
    MultiHeadAttention(12, 6, backend=note)(x)
    assert seen == [dict(enable_gqa=True, dropout_p=0.25), dict(enable_gqa=True, is_causal=True), dict(enable_gqa=True, attn_mask=mask), {}]


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    block, x = TransformerBlock(12, 3, dropout=0.5), torch.randn(2, 5, 12)
    a, b = block(x), block(x)
    assert not torch.equal(a, b)
    block.eval()
    twin = TransformerBlock(12, 3)
    twin.load_state_dict(block.state_dict())
    assert torch.equal(block(x), block(x)) and torch.equal(block(x), twin(x))


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", F.scaled_dot_product_attention])
def test_every_attention_gives_the_same_layer(backend):
    torch.manual_seed(0)
    layer = MultiHeadAttention(12, 6, n_kv_heads=3, backend=backend).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x, is_causal=True)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = by_einsum(layer, x, x, hidden)
    assert close(y, expected)
    assert close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (y, expected)))


def test_per_example_gradients_and_ensembles_by_vmap():
    torch.manual_seed(0)
    block = TransformerBlock(8, 4, 8, n_kv_heads=2).double()
    params, x = dict(block.named_parameters()), torch.randn(3, 5, 8, dtype=torch.float64)
    loss = lambda params, x: torch.func.functional_call(block, params, (x,), dict(is_causal=True)).sin().sum()
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        assert all(close(mapped[name][i], g) for name, g in torch.func.grad(loss)(params, x[i]).items())

    models = [TransformerBlock(8, 4, 8, n_kv_heads=2).double() for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(models)
    out = torch.func.vmap(lambda p: torch.func.functional_call(block, p, (x,)))(stacked)
    assert all(close(o, m(x)) for o, m in zip(out, models))


def test_hessian_vector_products_agree_both_ways():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, 8).double()
    params = {name: p.detach() for name, p in block.named_parameters()}
    u = {name: torch.randn_like(p) for name, p in params.items()}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    grad = torch.func.grad(lambda params: torch.func.functional_call(block, params, (x,), dict(is_causal=True)).sin().sum())
    forward = torch.func.jvp(grad, (params,), (u,))[1]
    reverse = torch.func.vjp(grad, params)[1](u)[0]
    assert max(t.abs().max() for t in forward.values()) > 1e-2
    assert all(close(forward[name], reverse[name]) for name in params)


def test_autocast_runs_attention_in_bfloat16():
    seen = []

    def note(q, k, v, **options):
        seen.append((q.dtype, k.dtype, v.dtype))
        return sdpa_custom(q, k, v, **options)

    torch.manual_seed(0)
    block, x = TransformerBlock(16, 4, backend=note), torch.randn(2, 7, 16, requires_grad=True)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16): y = block(x, attn_mask=torch.zeros(7, 7))
    assert seen == [(torch.float32,)*3, (torch.bfloat16,)*3]
    assert 0 < rel_err(y, expected) < TOLERANCE[torch.bfloat16]
    g, e = (torch.autograd.grad(t.float().square().sum(), x)[0] for t in (y, expected))
    assert g.dtype == torch.float32 and rel_err(g, e) < TOLERANCE[torch.bfloat16]


def test_compiled_block_gives_the_same_value_and_gradient():
    torch.manual_seed(0)
    block, x = TransformerBlock(8, 2, 8).double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    y, expected = compiled(x, is_causal=True), block(x, is_causal=True)
    leaves = [x, *block.parameters()]
    assert close(y, expected)
    assert all(close(a, b) for a, b in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (y, expected))))


def test_layers_can_be_copied_and_pickled():
    block, x = TransformerBlock(8, 2), torch.randn(2, 5, 8)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize("call, got", [
    (lambda: MultiHeadAttention(64, 5), "d_model=64 and n_heads=5"),
    (lambda: MultiHeadAttention(64, 4, n_kv_heads=3), "n_heads=4 and n_kv_heads=3"),
    (lambda: MultiHeadAttention(64, 4, n_kv_heads=8), "n_heads=4 and n_kv_heads=8"),
    (lambda: MultiHeadAttention(0, 1), "d_model=0"),
    (lambda: MultiHeadAttention(64, 4.0), "n_heads=4.0"),
    (lambda: MultiHeadAttention(64, -4), "n_heads=-4"),
    (lambda: MultiHeadAttention(64, 4, head_dim=0), "head_dim=0"),
    (lambda: MultiHeadAttention(64, 4, dropout=1), "dropout=1"),
    (lambda: MultiHeadAttention(64, 4, dropout=float("nan")), "dropout=nan"),
    (lambda: MultiHeadAttention(64, 4, backend="flash"), "backend='flash'"),
    (lambda: MultiHeadAttention(64, 4, backend=None), "backend=None"),
    (lambda: TransformerBlock(64, 3), "d_model=64 and n_heads=3"),
    (lambda: TransformerBlock(64, 4, 0), "d_ff=0"),
    (lambda: TransformerBlock(64, 4)(torch.zeros(2, 5, 32)), "x of shape (2, 5, 32)"),
    (lambda: MultiHeadAttention(64, 4)(torch.zeros(64)), "x of shape (64,)"),
    (lambda: MultiHeadAttention(64, 4)(torch.zeros(2, 5, 64), torch.zeros(2, 5, 6)), "context of shape (2, 5, 6)"),
    (lambda: MultiHeadAttention(64, 4)(torch.zeros(2, 5, 64), is_causal=True, attn_mask=torch.zeros(5, 5)), "attn_mask together with is_causal"),
])
def test_refusals_are_one_sentence(call, got):
    with pytest.raises(ContractError) as e: call()
    message = str(e.value)
    assert message.startswith(f"got {got}") and "accepted" in message and message.endswith(".") and "\n" not in message
