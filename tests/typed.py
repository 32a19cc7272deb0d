"A user's program as mypy sees it: types that must come out, and calls that must be refused. `make test` has mypy read it; nothing runs it."
from typing import Any, assert_type

import torch
from torch import Tensor

import theria
from theria.attention.audit import Audit
from theria.attention.derivatives import DoubleBackward, Hvp, Jvp, Vjp
from theria.layers import MultiHeadAttention

q = k = v = do = torch.randn(1, 2, 8, 4)

assert_type(theria.sdpa_custom(q, k, v), Tensor)
assert_type(theria.sdpa_custom(q, k, v, None, 0.1, True, scale=0.5, enable_gqa=True, stats="frozen", backend="reference"), Tensor)
assert_type(theria.sdpa_custom(query=q, key=k, value=v, attn_mask=q[0, 0] > 0, return_lse=True), tuple[Tensor, Tensor])
assert_type(theria.sdpa_vjp(q, k, v, do), Vjp)
assert_type(theria.sdpa_jvp(q, k, v, tq=q), Jvp)
assert_type(theria.sdpa_hvp(q, k, v, do, q, k, v), Hvp)
assert_type(theria.sdpa_double_backward(q, k, v, do, q, k, v), DoubleBackward)
assert_type(theria.sdpa_vjp(q, k, v, do).dq, Tensor)
assert_type(theria.sdpa_vjp(q, k, v, do).dmask, Tensor | None)
assert_type(theria.flash_attention(q, k, v, is_causal=True), Tensor)
assert_type(theria.FlashAttention(4)(q, k, v), Any)  # as PyTorch has it for every module
assert_type(MultiHeadAttention(8, 2)(q), Any)

found = theria.audit(theria.sdpa_custom)
assert_type(found, Audit)
assert_type(found.verdict, str)
assert_type(found.to_dict(), dict)

# An ignore that is not needed is an error of mypy's, so each of these must be one too.
theria.sdpa_custom(q, k)  # type: ignore[call-overload]
theria.sdpa_custom(q, k, v, is_causal="yes")  # type: ignore[call-overload]
theria.sdpa_custom(q, k, v, backed="reference")  # type: ignore[call-overload]
theria.sdpa_custom(q, k, v, None, 0.0, False, 0.5)  # type: ignore[call-overload]
theria.sdpa_vjp(q, k, v)  # type: ignore[call-arg]
theria.sdpa_attention(q, k, v)  # type: ignore[attr-defined]
