"Scaled dot-product attention, exactly differentiable to second order, in both modes."
__version__ = "0.1.0"

from importlib import import_module

_HOME = {"audit": "theria.attention.audit", "FlashAttention": "theria.attention.flash", "flash_attention": "theria.attention.flash",
         "sdpa_custom": "theria.attention.custom"}
__all__ = list(_HOME)


def __getattr__(name):
    "PyTorch is imported when something of theria is first used, not before: `theria --help` need not wait for it."
    if name not in _HOME: raise AttributeError(f"module 'theria' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__(): return [*globals(), *_HOME]
