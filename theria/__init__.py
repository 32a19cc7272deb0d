"Scaled dot-product attention, exactly differentiable to second order, in both modes."
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {"audit": "theria.attention.audit", "FlashAttention": "theria.attention.flash", "flash_attention": "theria.attention.flash",
         "sdpa_custom": "theria.attention.custom", **dict.fromkeys(("sdpa_vjp", "sdpa_jvp", "sdpa_hvp", "sdpa_double_backward"), "theria.attention.derivatives")}
__all__ = list(_HOME)

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors, which would take its being there to mean that every name exists
    from theria.attention.audit import audit as audit
    from theria.attention.custom import sdpa_custom as sdpa_custom
    from theria.attention.derivatives import sdpa_double_backward as sdpa_double_backward, sdpa_hvp as sdpa_hvp, sdpa_jvp as sdpa_jvp, sdpa_vjp as sdpa_vjp
    from theria.attention.flash import FlashAttention as FlashAttention, flash_attention as flash_attention
else:
    def __getattr__(name):
        "PyTorch is imported when something of theria is first used, not before: `theria --help` need not wait for it."
        if name not in _HOME: raise AttributeError(f"module 'theria' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)


def __dir__(): return [*globals(), *_HOME]
