"A broken attention that nobody has seen is named by what is broken in it, whichever way it was built."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theria.attention.audit import audit
from theria.attention.custom import sdpa_custom
from theria.meta.taxonomy import Suspect, diagnose, draw_point, explain, lineup

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
