"A broken attention that nobody has seen is named by what is broken in it, whichever way it was built."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.audit import audit
from theria.attention.custom import sdpa_custom
from theria.meta.taxonomy import Suspect, diagnose, draw_point, explain, lineup
from theria.meta.variants import VARIANTS

QUICK = audit(torch.nn.functional.scaled_dot_product_attention, derivatives=("grad", "grad of grad"), ways="autograd.grad") # its verdict is not what is tested here


def kernel(*cuts):
    "A fused attention as an author would write it, with some tensors lost to autograd on the way."
    lost = lambda name, x: x.detach() if name in cuts else x

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            s = torch.einsum("bhid,bhjd->bhij", q, k)/q.shape[-1]**.5
            o = torch.softmax(s, -1) @ v
            ctx.save_for_backward(q, k, v)
            return o

        @staticmethod
        def backward(ctx, do):
            q, k, v = ctx.saved_tensors
            s = torch.einsum("bhid,bhjd->bhij", q, k)/q.shape[-1]**.5
            o, L = lost("o", torch.softmax(s, -1) @ v), lost("L", s.logsumexp(-1))
            q, k, v, do = (lost(n, x) for n, x in zip(("q", "k", "v", "do"), (q, k, v, do)))
            p = lost("p", (torch.einsum("bhid,bhjd->bhij", q, k)/q.shape[-1]**.5 - L[..., None]).exp())
            delta, dp = lost("delta", torch.einsum("bhid,bhid->bhi", do, o)), lost("dp", torch.einsum("bhid,bhjd->bhij", do, v))
            ds = lost("ds", p*(dp - delta[..., None]))/q.shape[-1]**.5
            return torch.einsum("bhij,bhjd->bhid", ds, k), torch.einsum("bhij,bhid->bhjd", ds, q), torch.einsum("bhij,bhid->bhjd", p, do)
    return Fused.apply


@pytest.fixture(scope="module")
def prints(): return lineup(draw_point())


def distance(a, b): return max(((x - y).norm()/torch.maximum(x.norm(), y.norm()).clamp_min(1e-300)).item() for x, y in ((a.first, b.first), (a.second, b.second)))


@settings(max_examples=12)
@given(st.sets(st.sampled_from(["q", "k", "v", "do", "L", "o", "p", "delta", "dp", "ds"]), min_size=1, max_size=2))
def test_every_lost_tensor_is_named(cuts):
    from theria.meta.taxonomy import cut_backward, take_print
    found, point = diagnose(kernel(*cuts), found=QUICK), draw_point()
    assert found.first == "exact" and found.second != "exact" and found.suspect is not None and found.distance < 1e-9
    same = take_print(lambda q, k, v, do: cut_backward(q, k, v, do, set(found.suspect.cuts)), point) # the name may be that of an equivalent cut
    true = take_print(lambda q, k, v, do: cut_backward(q, k, v, do, cuts), point)
    assert found.suspect.where == "backward" and distance(same, true) < 1e-9 and len(found.suspect.cuts) <= len(cuts)


@pytest.mark.parametrize("cuts,says", [(("delta",), "rowsum(do∘o)"), (("L",), "the saved logsumexp"), (("o",), "the saved output"), (("do",), "the incoming gradient"), (("dp",), "do·vᵀ"), (("L", "o"), "the saved logsumexp and the saved output")])
def test_the_words_are_those_of_the_formula(cuts, says):
    assert f"It treats {says} as " in diagnose(kernel(*cuts), found=QUICK).says


def test_an_uncut_kernel_and_the_reference_are_acquitted():
    for f in (kernel(), lambda q, k, v: sdpa_custom(q, k, v, backend="reference")):
        d = diagnose(f, found=QUICK)
        assert (d.first, d.second, d.suspect) == ("exact", "exact", Suspect("", ()))


@pytest.mark.parametrize("broken", [lambda q, k, v: kernel()(q, k, v) + (q - q.detach())*(k - k.detach()).sum(), lambda q, k, v: kernel()(q, k, v) + .01*(q - q.detach()).pow(2)],
                         ids=["a term between q and k", "a curvature in q"])
def test_what_is_no_cut_gets_no_name(broken): # both are right in value and gradient
    d = diagnose(broken, found=QUICK)
    assert (d.suspect, d.first, d.second) == (None, "exact", "wrong") and "no cut of two quantities explains" in d.says


def test_explain_speaks_of_what_an_audit_found():
    f = kernel("delta")
    assert "rowsum(do∘o)" in explain(f, audit(f, derivatives=("grad", "grad of grad")))
    assert explain(kernel(), QUICK) == ""


# Patients that are broken in ways of their own, as their authors might have written them.

def softmax_attention(q, k, v): return torch.softmax(q @ k.mT*q.shape[-1]**-.5, -1) @ v


def with_backward(gradients):
    "Attention whose backward pass is a function of q, k, v and do."
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return softmax_attention(q, k, v)

        @staticmethod
        def backward(ctx, do): return gradients(*ctx.saved_tensors, do)
    return Fused.apply


def beside_autograd(lost):
    "A backward that calls a kernel for one of its gradients."
    def gradients(q, k, v, do):
        p = torch.softmax(q @ k.mT*q.shape[-1]**-.5, -1)
        dp = do @ v.mT
        ds = p*(dp - (p*dp).sum(-1, keepdim=True))*q.shape[-1]**-.5
        grads = dict(dq=ds @ k, dk=ds.mT @ q, dv=p.mT @ do)
        return tuple(g.detach() if n in lost else g for n, g in grads.items())
    return with_backward(gradients)


@pytest.mark.parametrize("lost,words", [(("dv",), "its gradient of the values"), (("dq",), "its gradient of the queries"), (("dk", "dv"), "its gradient of the keys and its gradient of the values")])
def test_a_gradient_that_a_kernel_computes_is_named(lost, words):
    d = diagnose(beside_autograd(lost), found=QUICK)
    assert d.suspect == Suspect("backward", lost) and (d.first, d.second) == ("exact", "wrong") and f"It treats {words} as" in d.says


class Poisoned(torch.autograd.Function):
    "Zero, with a gradient of NaN."
    @staticmethod
    def forward(ctx, x): return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, g): return g*torch.nan


@pytest.mark.parametrize("more,first", [(lambda q: (q - q.detach()).abs().pow(1.5), "exact"), (Poisoned.apply, "wrong")], ids=["infinite in the second", "nan in both"])
def test_a_derivative_that_is_not_finite_is_no_cut_and_not_right(more, first):
    d = diagnose(lambda q, k, v: softmax_attention(q, k, v) + more(q), found=QUICK)
    assert d.suspect is None and (d.first, d.second) == (first, "wrong") and "it is not finite" in d.says


def test_one_head_that_is_wrong_is_enough_and_gets_no_false_name():
    def heads(q, k, v): return torch.cat([softmax_attention(q[:, :1], k[:, :1], v[:, :1]), beside_autograd(("dq", "dk", "dv"))(q[:, 1:], k[:, 1:], v[:, 1:])], 1)
    d = diagnose(heads)
    assert (d.verdict, d.first, d.second, d.manner, d.suspect) == ("unsafe", "exact", "wrong", "depends", None) and "no cut of two quantities explains" in d.says


def test_another_function_is_said_to_be_one():
    for f in (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, lambda q, k, v: torch.softmax((q @ k.mT*q.shape[-1]**-.5).masked_fill(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1), -torch.inf), -1) @ v):
        d = diagnose(f)
        assert (d.verdict, d.suspect) == ("unsafe", None) and "Its value is not that of attention" in d.says and "cut" not in d.says


def test_a_print_that_is_exact_does_not_hide_what_the_audit_found_elsewhere():
    class Forward(torch.autograd.Function):
        "Right in reverse mode, twice; its forward mode has forgotten the keys."
        @staticmethod
        def forward(q, k, v): return softmax_attention(q, k, v)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, do):
            with torch.enable_grad():
                x = [t if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
                return torch.autograd.grad(softmax_attention(*x), x, do, create_graph=True)

        @staticmethod
        def jvp(ctx, tq, tk, tv): return torch.func.jvp(lambda q, v: softmax_attention(q, ctx.saved_tensors[1], v), (ctx.saved_tensors[0], ctx.saved_tensors[2]), (tq, tv))[1]

    def long(q, k, v): return (softmax_attention if k.shape[-2] <= draw_point()[1].shape[-2] else beside_autograd(("dq", "dk", "dv")))(q, k, v)
    for f, names in ((Forward.apply, "jvp"), (long, "grad of grad")):
        a = audit(f)
        d = diagnose(f, found=a)
        assert a.verdict == d.verdict == "unsafe" and (d.first, d.second) == ("exact", "exact"), names
        assert "where its print was taken, and not everywhere: silently wrong: " in d.says and names in d.says


def test_what_only_looks_broken_is_acquitted():
    from torch.utils.checkpoint import checkpoint
    def shifted(q, k, v): # the maximum is a constant, and rightly so: the softmax does not depend on it
        s = q @ k.mT*q.shape[-1]**-.5
        e = (s - s.amax(-1, keepdim=True).detach()).exp()
        return e @ v/e.sum(-1, keepdim=True)
    again = lambda q, k, v: checkpoint(softmax_attention, q, k, v, use_reentrant=False)
    for f in (shifted, again):
        d = diagnose(f)
        assert (d.first, d.second, d.suspect) == ("exact", "exact", Suspect("", ())) and d.verdict != "unsafe"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_by_the_audit_alone(dtype):
    d = diagnose(beside_autograd(("dq", "dk", "dv")), dtype=dtype)
    assert (d.verdict, d.first, d.second, d.manner, d.suspect) == ("unsafe", "exact", "wrong", "depends", None) and "only the audit speaks" in d.says


def keeps_probabilities(lost):
    "A backward pass that makes δ from the probabilities, with some tensors lost to autograd."
    def gradients(q, k, v, do):
        c = lambda name, x: x.detach() if name in lost else x
        s, dp = q @ k.mT*q.shape[-1]**-.5, do @ v.mT
        p = (s - c("L", s.logsumexp(-1, keepdim=True))).exp()
        ds = c("p_ds", p)*(dp - (c("p_ds", p)*dp).sum(-1, keepdim=True))*q.shape[-1]**-.5
        return ds @ k, ds.mT @ q, c("p_dv", p).mT @ do
    return with_backward(gradients)


@pytest.mark.parametrize("lost,says", [(("L",), "the saved logsumexp as a constant in its backward, where δ is rowsum(p∘dp)"), (("p_dv",), "the probabilities in the gradient of the values as constants in its backward"),
                                       (("p_ds", "p_dv"), "its probabilities as constants in its backward, where δ is made of them")])
def test_backward_passes_that_keep_probabilities(lost, says):
    d = diagnose(keeps_probabilities(lost), found=QUICK)
    assert f"It treats {says}" in d.says and d.distance < 1e-9 and d.first == "exact"


def fast_path(q, k, v): return (VARIANTS["raw_kernel"] if torch._C._functorch.is_functorch_wrapped_tensor(q) else softmax_attention)(q, k, v)


def test_what_is_wrong_under_transforms_only_is_found_there():
    d = diagnose(fast_path)
    assert (d.verdict, d.first, d.second, d.called) == ("unsafe", "exact", "lost", "torch.func") and d.suspect == Suspect("backward", ("grads",))
    assert d.says.startswith("It is right by autograd. By torch.func it treats its gradients as constants in its backward") and d.says.endswith("Nothing says so.")


def test_a_print_that_cannot_be_taken_under_transforms_is_said(monkeypatch):
    def refuses(*a): raise RuntimeError("no rule for this")
    monkeypatch.setattr("theria.meta.taxonomy.by_transform", lambda attention: refuses)
    d = diagnose(fast_path)
    assert d.verdict == "unsafe" and "not everywhere: silently wrong" in d.says and d.says.endswith("no print can be taken (no rule for this).")
