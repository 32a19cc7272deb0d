"Every arrangement of the backward kernels computes the same gradients: each awkward problem in the arrangements that its page leaves out."
import pytest
import torch

from theria.attention import reference
from theria.attention.backward import backward
from theria.attention.contract import TOLERANCE, rel_err
from theria.attention.forward import forward
from theria.attention.samples import CASES, for_reference, poisoned, sample, up

NAMES = list(CASES)
ARRANGEMENTS = dict(two=dict(form="two"), once=dict(form="once"), parts=dict(form="two", parts=(2, 3)), atomic=dict(form="atomic", bias_grad=False))


def compare(name, has_dL, options):
    s = sample(**CASES[name])
    dL = s.dL if has_dL else None
    o, L = forward(*s.args, **s.options)
    args, kw = for_reference(s)
    theirs = reference.backward(*args, *reference.forward(*args, **kw), up(s.do), up(dL), **kw)
    with poisoned(): ours = backward(*s.args, o, L, s.do, dL, **s.options, **options)
    for term, a, b in zip("QKVB", ours, theirs, strict=True):
        if a is not None: assert rel_err(a, b) <= TOLERANCE[s.do.dtype] or (a - b).norm() <= 1e-6*o.numel()**0.5, f"d{term} is off by {rel_err(a, b):.1e}" # a scalar bias changes nothing: a sum of zeros


@pytest.mark.parametrize("name, how", [(name, how) for n, name in enumerate(NAMES) for how in ("parts", "atomic") if n % 2 == (how == "parts") and name != "everything"])
def test_arrangement(name, how): compare(name, NAMES.index(name) % 2 == 1, ARRANGEMENTS[how])


@pytest.mark.parametrize("Lk", [1, 33])
@pytest.mark.parametrize("how", ["once", "atomic"])
def test_keys_that_are_not_there_add_nothing(how, Lk):
    "All scores are about -40: a tile's missing keys, whose score is 0, would have probabilities that half precision cannot hold."
    s = sample(torch.float16, B=1, Hq=2, Hkv=1, Lq=40, Lk=Lk, D=16, Dv=16)
    s = s._replace(args=(3.5 + s.args[0]/8, -3.5 + s.args[1]/8, *s.args[2:]))
    o, L = forward(*s.args, **s.options)
    assert L.max() < -30
    args, kw = for_reference(s)
    theirs = reference.backward(*args, *reference.forward(*args, **kw), up(s.do), up(s.dL), **kw)
    with poisoned(): ours = backward(*s.args, o, L, s.do, s.dL, **s.options, **ARRANGEMENTS[how])
    for term, a, b in zip("QKV", ours, theirs): assert a.isfinite().all() and rel_err(a, b) <= TOLERANCE[torch.float16], f"d{term} is off by {rel_err(a, b):.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("how", ARRANGEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_arrangement(name, how): compare(name, (NAMES.index(name) + list(ARRANGEMENTS).index(how)) % 2 == 0, ARRANGEMENTS[how])


@pytest.mark.gpu
@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (128, torch.float16), (64, torch.float32)], ids=["D64 bf16", "D128 fp16", "D64 fp32"])
@pytest.mark.parametrize("how", ["rule", "once", "parts", "atomic"])
@pytest.mark.parametrize("Lq, Lk, causal", [(1000, 1000, True), (5000, 64, False), (64, 5000, False)], ids=["square", "tall", "wide"])
def test_sizes_that_a_device_has_to_share(Lq, Lk, causal, D, how, dtype):
    s = sample(dtype, 1, 2, 2, Lq, Lk, D, D, is_causal=causal, scale=D**-.5)
    o, L = forward(*s.args, **s.options)
    exact, kw = for_reference(s)
    theirs = reference.backward(*exact, *reference.forward(*exact, **kw), up(s.do), None, **kw)
    for a, b in zip(backward(*s.args, o, L, s.do, **s.options, **ARRANGEMENTS.get(how, {})), theirs):
        if b is not None: assert rel_err(a, b) < TOLERANCE[dtype]
