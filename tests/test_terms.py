"""float32 products from bfloat16 terms: every pass of a few problems with terms cut ahead, through the interpreter, which makes the same terms as a GPU does."""
import os

import pytest
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")

from theria.attention import reference, terms
from theria.attention.backward import backward
from theria.attention.contract import rel_err
from theria.attention.forward import forward
from theria.attention.samples import for_reference, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = dict(causal=dict(B=1, Hkv=1, Lq=40, Lk=50, D=24, Dv=40, is_causal=True), dropout=dict(B=1, Hq=1, Hkv=1, Lq=40, Lk=50, p=.2), masked=dict(B=1, Hq=1, Hkv=1, Lq=30, Lk=70, mask="bool"))
BITS = {"bf16x3 ahead": (1e-6, 1e-5), "bf16x3": (1e-6, 1e-5), "ieee": (0., 1e-6)} # how far from float64: at least, so that a test sees which one ran, and at most

FORMS = [("two", (1, 1)), ("two", (2, 2)), ("once", None), ("atomic", None)]


@pytest.fixture(params=BITS)
def products(request, monkeypatch):
    for setting in terms.PRECISIONS: monkeypatch.setitem(terms.PRECISIONS, setting, request.param)
    return BITS[request.param]


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, products):
    low, high = products
    s = sample(**CASES[name], device=DEVICE)
    args, kw = for_reference(s)
    o, L = forward(*s.args, **s.options)
    exact = reference.forward(*args, **kw)
    assert low < rel_err(o, exact[0]) <= high and rel_err(L, exact[1]) <= 1e-6
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = reference.backward(*args[:4], *exact, do.double(), **kw)
    for form, parts in FORMS:
        if "ahead" in terms.PRECISIONS["high"] and form != "two": continue # who asks for these forms gets terms that are cut in the kernel
        for n, ours in zip("qkv", backward(*s.args, o, L, do, **s.options, form=form, parts=parts)): assert low < rel_err(ours, getattr(truth, n)) <= high, (n, form)


@pytest.mark.parametrize("strides", ["transposed", "wide", "broadcast"])
def test_terms_of_tensors_that_lie_in_any_way(strides):
    x = torch.randn(2, 3, 70, 40, device=DEVICE)
    x = dict(transposed=x.transpose(1, 2).contiguous().transpose(1, 2), wide=torch.randn(2, 3, 70, 99, device=DEVICE)[..., 7:47], broadcast=x[:, :1].expand(2, 3, 70, 40))[strides]
    y = terms.cut_ahead(x, 64).view(2, 3, 70, 2, 64)
    first, second = terms.terms(x, 2)
    assert torch.equal(y[..., 0, :40], first) and torch.equal(y[..., 1, :40], second) and (y[..., 40:] == 0).all()


def test_no_terms_of_nothing():
    assert terms.cut_ahead(torch.zeros(2, 3, 0, 40, device=DEVICE), 64).shape == (2, 3, 0, 128)
