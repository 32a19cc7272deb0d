"The audit sees every known way in which an attention can be silently wrong, and accuses nobody else."
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria.attention.audit import EXACT, RAISES, WAYS, WRONG, Audit, Finding, audit, audit_matrix, load_attention
from theria.attention.contract import ContractError
from theria.attention.custom import sdpa_custom
from theria.meta.variants import VARIANTS


def plain(q, k, v, is_causal=False):
    s = q @ k.mT*q.shape[-1]**-0.5
    if is_causal: s = s.masked_fill(s.new_ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(s, -1) @ v


def outcomes(a, derivative): return {r.way: r.outcome for r in a.rows if r.derivative == derivative}
def row(a, derivative, way): return next(r for r in a.rows if (r.derivative, r.way) == (derivative, way))


class Fused(torch.autograd.Function):
    "Attention with a hand-written, differentiable and correct backward: the base of the planted faults."
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v): return plain(q, k, v)

    @staticmethod
    def setup_context(ctx, inputs, output): ctx.save_for_backward(*inputs)

    @staticmethod
    def grads(q, k, v, do):
        c = q.shape[-1]**-0.5
        p = torch.softmax(c*(q @ k.mT), -1)
        a = do @ v.mT
        ds = p*(a - (p*a).sum(-1, keepdim=True))
        return c*(ds @ k), c*(ds.mT @ q), p.mT @ do

    @staticmethod
    def backward(ctx, do): return Fused.grads(*ctx.saved_tensors, do)


def planted(change):
    "Attention whose backward is changed by `change(q, k, v, do) -> (dq, dk, dv)`."
    class Planted(Fused):
        @staticmethod
        def backward(ctx, do): return tuple(change(*ctx.saved_tensors, do))
    return lambda q, k, v: Planted.apply(q, k, v)


# ------------------------------------------------------------------ the honest ones

@pytest.mark.parametrize("kw", [dict(), dict(is_causal=True), dict(H=4, n_kv_heads=2), dict(Dv=3), dict(Lq=1, Lk=1), dict(Lq=9, Lk=3), dict(seed=7),
                                dict(dtype=torch.float32), dict(dtype=torch.bfloat16, is_causal=True), dict(dtype=torch.float16)], ids=str)
def test_sdpa_custom_is_safe(kw):
    a = audit(sdpa_custom, **kw)
    assert a.verdict == "safe", a
    assert [(r.derivative, r.way) for r in a.rows] == [(d, w) for d, ws in WAYS.items() for w in ws]


def test_correct_function_without_jvp_is_conditional():
    a = audit(Fused.apply, oracle=plain)
    assert a.verdict == "conditional"
    assert set(outcomes(a, "grad").values()) == set(outcomes(a, "grad of grad").values()) == {EXACT}
    assert set(outcomes(a, "jvp").values()) == {RAISES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_not_accused(dtype):
    a = audit(plain, dtype=dtype, D=16, Lq=13, Lk=21)
    assert not [r for r in a.rows if r.outcome == WRONG], a


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_torch_sdpa_on_cpu_is_never_silent(kernel):
    def forced(q, k, v, is_causal=False):
        with sdpa_kernel(kernel): return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    a = audit(forced, is_causal=True)
    assert a.verdict == "conditional"
    flash = kernel == SDPBackend.FLASH_ATTENTION
    assert set(outcomes(a, "grad of grad").values()) == {RAISES if flash else EXACT}


# ------------------------------------------------------------------ the six variants

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_unsafe_in_every_dtype(name, dtype):
    a = audit(VARIANTS[name], dtype=dtype, derivatives=["grad", "grad of grad"])
    assert a.verdict == "unsafe" and a.rows[0].outcome == EXACT
    wrong_at_first_order = name in ("detach_attention_output", "no_grad_attention", "logits_detach")
    assert set(outcomes(a, "grad").values()) == {WRONG if wrong_at_first_order else EXACT}
    assert WRONG in outcomes(a, "grad of grad").values()


def test_once_differentiable_is_loud_in_one_way_only():
    a = audit(VARIANTS["once_differentiable_sim"])
    assert outcomes(a, "grad of grad") == {"autograd.grad": WRONG, "backward": RAISES, "backward(inputs)": WRONG, "backward, constant do": WRONG,
                                           "torch.func": WRONG}
    assert "carry a graph that does not lead to the inputs" in row(a, "grad of grad", "autograd.grad").message
    assert "once_differentiable" in row(a, "grad of grad", "backward").message


def test_raw_kernel_is_told_from_a_guard():
    a = audit(VARIANTS["raw_kernel"])
    for r in a.rows:
        if r.derivative == "grad of grad": assert r.outcome == WRONG and "requires_grad=False" in r.message and abs(r.error - 1) < 1e-12


def test_stats_detach_names_the_tensors_that_are_off():
    r = row(audit(VARIANTS["stats_detach"]), "grad of grad", "autograd.grad")
    assert r.message == "off: gq, gk" and .1 < r.error < 1


def test_no_grad_speaks_to_reverse_mode_only():
    a = audit(VARIANTS["no_grad_attention"])
    assert set(outcomes(a, "grad").values()) == {WRONG} and set(outcomes(a, "jvp").values()) == {EXACT}


# ------------------------------------------------------------------ planted faults

def test_one_lost_tensor_of_four():
    a = audit(planted(lambda q, k, v, do: Fused.grads(q, k, v, do.detach())))
    assert row(a, "grad of grad", "autograd.grad").message == "lost: ddo"
    assert set(outcomes(a, "grad").values()) == {EXACT}


def test_one_wrong_gradient_of_three():
    a = audit(planted(lambda q, k, v, do: [g*(1 + i % 2) for i, g in enumerate(Fused.grads(q, k, v, do))]))
    assert row(a, "grad", "backward").message == "off: dk"


@settings(max_examples=8, deadline=None)
@given(exponent=st.floats(-10, 0), which=st.integers(0, 2))
def test_small_errors_of_a_gradient_are_seen(exponent, which):
    eps = 10**exponent
    a = audit(planted(lambda q, k, v, do: [g*(1 + eps*(i == which)) for i, g in enumerate(Fused.grads(q, k, v, do))]), derivatives="grad", ways="autograd.grad")
    assert a.rows[1].outcome == WRONG and a.rows[1].message == f"off: d{'qkv'[which]}"
    assert abs(a.rows[1].error/eps - 1) < 1e-3


def test_silently_zero_tangent_of_a_custom_op():
    @torch.library.custom_op("theria_test::attention", mutates_args=())
    def op(q:torch.Tensor, k:torch.Tensor, v:torch.Tensor) -> torch.Tensor: return plain(q, k, v)
    op.register_autograd(lambda ctx, do: Fused.grads(*ctx.saved_tensors, do), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    a = audit(lambda q, k, v: op(q, k, v))
    assert row(a, "jvp", "torch.func").outcome == WRONG and row(a, "jvp", "torch.func").message == "lost: to"
    assert a.verdict == "unsafe" and set(outcomes(a, "grad").values()) >= {EXACT}


def test_right_at_one_length_only():
    compiled_for = lambda q, k, v: plain(q, k, v) if q.shape[-2] == 5 else plain(q, k[..., :7, :], v[..., :7, :])
    a = audit(compiled_for)
    assert a.verdict == "unsafe" and len(a.rows) == 1 and "only at Lq=10, Lk=14" in a.rows[0].message


def test_second_order_right_at_one_length_only():
    a = audit(planted(lambda q, k, v, do: Fused.grads(q, k, v, do if q.shape[-2] == 5 else do.detach())))
    assert row(a, "grad of grad", "backward").message == "only at Lq=10, Lk=14: lost: ddo"


def test_old_style_function_is_loud_under_torch_func():
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v): ctx.save_for_backward(q, k, v); return plain(q, k, v)
        @staticmethod
        def backward(ctx, do): return Fused.grads(*ctx.saved_tensors, do)
    a = audit(Old.apply, oracle=plain)
    assert a.verdict == "conditional" and outcomes(a, "grad of grad")["torch.func"] == RAISES
    assert {o for w, o in outcomes(a, "grad of grad").items() if w != "torch.func"} == {EXACT}


# ------------------------------------------------------------------ another function

@pytest.mark.parametrize("fn, kw, says", [
    (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, {}, "without the scale"),
    (lambda q, k, v: torch.softmax(q @ k.mT/q.shape[-1], -1) @ v, {}, "with the scale 1/D"),
    (lambda q, k, v: plain(q, k, v, True), {}, "with a causal triangle"),
    (lambda q, k, v, causal: plain(q, k, v), dict(is_causal=True), "without the causal triangle"),
    (lambda q, k, v: plain(q, k, v).cos(), {}, "off by"),
    (lambda q, k, v: plain(q, k, v)*torch.nan, {}, "NaN in o"),
    (lambda q, k, v: plain(q, k, v)[..., :1], {}, "returned the shape (2, 2, 5, 1)"),
    (lambda q, k, v: plain(q, k, v).numpy(), {}, "returned ndarray"),
    (lambda q, k, v: (), {}, "returned tuple"),
])
def test_a_wrong_value_is_not_blamed_on_derivatives(fn, kw, says):
    a = audit(fn, **kw)
    assert len(a.rows) == 1 and a.rows[0].outcome == WRONG and says in a.rows[0].message and says in a.summary
    assert a.verdict == "unsafe" and "another function" in a.summary


@pytest.mark.parametrize("inside, asked", [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.bfloat16, torch.float32)])
def test_a_lower_precision_inside_is_named(inside, asked):
    low = lambda q, k, v: plain(q.to(inside), k.to(inside), v.to(inside)).to(q.dtype)
    assert f"if it computes in {str(inside).removeprefix('torch.')} inside" in audit(low, dtype=asked).summary
    assert audit(low, dtype=inside, derivatives=["grad", "grad of grad"]).verdict == "safe"
    assert "rounding" not in audit(lambda q, k, v: 1.1*plain(q, k, v), dtype=asked).summary


def test_a_window_is_audited_against_a_window():
    keep = lambda q, k: (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs() <= 2
    def windowed(q, k, v):
        s = (q @ k.mT*q.shape[-1]**-.5).masked_fill(~keep(q, k), -torch.inf)
        return torch.where(keep(q, k).any(-1, keepdim=True), s.softmax(-1), 0.) @ v
    oracle = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=keep(q, k))  # PyTorch's fused kernel has no second derivative
    rows = dict(ways=["autograd.grad", "backward", "torch.func"], Lq=7)
    assert audit(windowed, oracle=oracle, **rows).verdict == "safe"
    assert audit(lambda *x: windowed(*x).detach() + plain(*x) - plain(*x).detach(), oracle=oracle, **rows).verdict == "unsafe"


def test_wrong_only_with_the_causal_triangle():
    class Stale(torch.autograd.Function): # the backward drops the graph where there is a triangle
        @staticmethod
        def forward(ctx, q, k, v, causal):
            ctx.save_for_backward(q, k, v)
            ctx.causal = causal
            return plain(q, k, v, causal)
        @staticmethod
        def backward(ctx, do):
            with torch.enable_grad():
                x = [t if not ctx.causal else t.detach() for t in ctx.saved_tensors]
                x = [t.requires_grad_() if t.is_leaf else t for t in x]
                return *torch.autograd.grad(plain(*x, ctx.causal), x, do, create_graph=not ctx.causal), None
    def attend(q, k, v, is_causal=False): return Stale.apply(q, k, v, is_causal)
    rows = dict(derivatives="grad of grad", ways=["autograd.grad", "backward"])
    assert [audit(attend, is_causal=c, **rows).verdict for c in (False, True)] == ["safe", "unsafe"]


def test_an_exit_is_a_finding():
    def leaves(q, k, v): raise SystemExit(3)
    assert audit(leaves).rows[0].outcome == RAISES


def test_overwriting_an_input_is_found_and_the_rest_still_measured():
    def greedy(q, k, v):
        o = plain(q, k, v)
        k.zero_()
        return o
    a = audit(greedy, derivatives="grad")
    assert a.rows[0].message == "overwrites its input k" and len(a.rows) == 5


# ------------------------------------------------------------------ conventions

@pytest.mark.parametrize("causal", [False, True])
def test_layout_tuple_and_keyword_of_others(causal):
    def theirs(q, k, v, softmax_scale=None, causal=False):
        return plain(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal).transpose(1, 2), "lse"
    assert audit(theirs, layout="blhd", is_causal=causal, derivatives="grad").verdict == "safe"
    assert audit(theirs, is_causal=causal).verdict != "safe"


def test_grouped_heads_reach_the_callable_as_such():
    seen = set()
    def grouped(q, k, v, enable_gqa=False):
        seen.add((q.shape[1], k.shape[1], enable_gqa))
        return plain(q, *(x.repeat_interleave(2, 1) for x in (k, v)))
    assert audit(grouped, H=4, n_kv_heads=2, derivatives="grad of grad").verdict == "safe"
    assert seen == {(4, 2, True)}


def test_module_keeps_its_gradients():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        def forward(self, q, k, v): return plain(q*self.one, k, v)
    m = Scaled()
    m.one.grad = torch.tensor(3., dtype=torch.float64)
    assert audit(m, derivatives="grad").verdict == "safe" and m.one.grad == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(mode):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with mode(): assert audit(plain, derivatives="grad of grad").verdict == "safe"
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_findings():
    assert audit(plain).rows == audit(plain).rows
    assert audit(VARIANTS["stats_detach"]).rows != audit(VARIANTS["stats_detach"], seed=9).rows


def test_interruption_is_not_a_finding():
    def interrupted(q, k, v): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): audit(interrupted)


def test_choosing_rows():
    a = audit(plain, derivatives=["grad of grad"], ways=["backward", "torch.func"])
    assert [(r.derivative, r.way) for r in a.rows] == [("value", "call"), ("grad of grad", "backward"), ("grad of grad", "torch.func")]


@pytest.mark.parametrize("kw, says", [(dict(B=0), "B=0"), (dict(Lq=2.5), "Lq=2.5"), (dict(D=True), "D=True"), (dict(H=3, n_kv_heads=2), "divisor"),
    (dict(dtype=torch.int32), "torch.int32"), (dict(layout="hbld"), "hbld"), (dict(derivatives="hessian"), "hessian"), (dict(ways="jacrev"), "jacrev"),
    (dict(ways=[]), "no row in common"), (dict(derivatives=[]), "no row in common"), (dict(derivatives="jvp", ways="backward"), "no row in common"), (dict(ways=3), "ways 3"),
    (dict(device="foo"), "device='foo'"), (dict(device="meta"), "device='meta'"), (dict(device=None), "device=None"), (dict(seed=-1), "seed=-1"), (dict(seed="x"), "seed='x'"),
    (dict(H=2**31), "below 2\\*\\*31"), (dict(dtype=[1]), "dtype=\\[1\\]"), (dict(oracle="reference"), "oracle='reference'"), (dict(is_causal="no"), "is_causal='no'"),
    (dict(oracle=lambda q, k, v: q.detach().numpy()), "correct the oracle"), (dict(oracle=lambda q, k, v: plain(q, k, v).detach()), None)])
def test_faulty_arguments(kw, says):
    if says is None: assert audit(plain, **kw).verdict == "unsafe"  # an oracle without derivatives is believed: it says that they are zero
    else:
        with pytest.raises(ContractError, match=says) as e: audit(plain, **kw)
        assert "\n" not in str(e.value) and str(e.value).endswith(".")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there():
    with pytest.raises(ContractError, match="use device='cpu'"): audit(plain, device="cuda")


# ------------------------------------------------------------------ attention from elsewhere

SIBLING = "SCALE = lambda D: D**-0.5\n"
OUTSIDE = '''
import torch
from dataclasses import dataclass
from sibling_of_the_audited_file import SCALE

@dataclass
class Config: temperature: float = 1.

class Raw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        p = torch.softmax(SCALE(q.shape[-1])*(q @ k.transpose(-1, -2)), -1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v
    @staticmethod
    def backward(ctx, do):
        q, k, v, p = (x.detach().clone() for x in ctx.saved_tensors)
        do = do.detach()
        a = do @ v.transpose(-1, -2)
        ds = SCALE(q.shape[-1])*p*(a - (p*a).sum(-1, keepdim=True))
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do

class Namespace:
    attention = staticmethod(Raw.apply)

def attention(q, k, v): return Raw.apply(q, k, v)
number = 3
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path/"sibling_of_the_audited_file.py").write_text(SIBLING)
    (tmp_path/"somebody_s_attention.py").write_text(OUTSIDE)
    return tmp_path


@pytest.mark.parametrize("name", ["attention", "Namespace.attention"])
def test_file_outside_the_package(outside, name):
    a = audit(load_attention(f"{outside}/somebody_s_attention.py:{name}"))
    assert a.verdict == "unsafe" and a.rows[0].outcome == EXACT
    assert {o for w, o in outcomes(a, "grad of grad").items() if w != "torch.func"} == {WRONG}
    assert outcomes(a, "grad of grad")["torch.func"] == RAISES


def test_module_in_the_current_folder(outside, monkeypatch):
    monkeypatch.chdir(outside)
    assert load_attention("somebody_s_attention:attention").__name__ == "attention"


def test_a_file_that_exits_or_fails_or_lacks_the_name(outside):
    (outside/"leaves.py").write_text("import sys\nsys.exit(3)\n")
    (outside/"fails.py").write_text("def f(:\n")
    for text, says in {"leaves.py:f": "SystemExit: 3", "fails.py:f": "SyntaxError", "missing.py:f": "there is no file", "somebody_s_attention.py:atention": "has no atention",
                       "somebody_s_attention.py:number": "of type int", "somebody_s_attention.py:Raw": "is a class", "somebody_s_attention.py": "name both",
                       "somebody_s_attention.py:": "name both"}.items():
        with pytest.raises(ContractError, match=says) as e: load_attention(f"{outside}/{text}")
        assert "\n" not in str(e.value)


def test_a_loaded_file_does_not_shadow_modules(outside):
    code = f"from theria.attention.audit import load_attention as f; f('{outside}/somebody_s_attention.py:attention'); import json; print(json.dumps(1))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


# ------------------------------------------------------------------ reading it

def test_json_round_trip():
    for a in (audit(VARIANTS["stats_detach"]), audit(lambda q, k, v: plain(q, k, v)*torch.nan)):
        d = json.loads(json.dumps(a.to_dict(), allow_nan=False))
        assert d["verdict"] == "unsafe" and d["rows"][0]["outcome"] == a.rows[0].outcome
        assert Audit.from_dict(d).to_dict() == d


def test_tables_show_every_row_with_mark_and_word():
    a = audit(VARIANTS["once_differentiable_sim"], name="a|b <c> [d]")
    console = Console(width=220, record=True, file=open("/dev/null", "w"))
    console.print(a)
    text, markdown = console.export_text(), a._repr_markdown_()
    for out in (text, markdown):
        for mark in ("● exact", "✕ wrong, silently", "▲ raises"): assert mark in out
        assert "unsafe" in out and "lost: gq, gk, gv, ddo" in out
    assert "[d]" in text
    body = [l for l in markdown.splitlines() if l.startswith("|")]
    assert len(body) == len(a.rows) + 2 and {l.replace("\\|", "").count("|") for l in body} == {7}


def test_matrix_draws_every_cell():
    audits = {"ours": audit(sdpa_custom), "raw": audit(VARIANTS["raw_kernel"]), "other": audit(lambda q, k, v: plain(2*q, k, v))}
    fig = audit_matrix(audits)
    ax = fig.axes[0]
    squares = sum(len(c.get_offsets()) for c in ax.collections)
    assert squares == 2*(sum(len(a.rows) for a in audits.values()) + 3)  # a square and a mark for each row, and the key
    words = {t.get_text() for t in ax.texts}
    assert {"ours", "raw", "other", "safe", "unsafe", "100", "exact", "raises", "grad of grad", "torch.func"} <= words


def test_a_nan_is_drawn_and_is_never_exact():
    a = audit(planted(lambda q, k, v, do: [g*torch.nan for g in Fused.grads(q, k, v, do)]), derivatives="grad")
    assert {r.message for r in a.rows[1:]} == {"NaN in dq, dk, dv"} and a.verdict == "unsafe"
    assert "NaN" in {t.get_text() for t in audit_matrix({"nan": a}).axes[0].texts}


def test_finding_is_plain_data():
    assert Finding("grad", "backward", EXACT, 1e-16, 1e-12) == Finding(derivative="grad", way="backward", outcome=EXACT, error=1e-16, tolerance=1e-12, message=None)


# ------------------------------------------------------------------ on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], ids=str)
def test_fused_kernels_on_a_gpu_are_loud(kernel):
    def forced(q, k, v, is_causal=False):
        with sdpa_kernel(kernel): return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    a = audit(forced, dtype=torch.bfloat16, device="cuda", Lq=64, Lk=64, D=64)
    assert a.rows[0].outcome == EXACT and a.verdict == "conditional", a
    assert set(outcomes(a, "grad of grad").values()) == {RAISES}


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_a_gpu_are_unsafe(name):
    assert audit(VARIANTS[name], dtype=torch.bfloat16, device="cuda", D=64).verdict == "unsafe"
