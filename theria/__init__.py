"Scaled dot-product attention, exactly differentiable to second order, in both modes."
__version__ = "0.1.0"

from theria.attention.custom import sdpa_custom

__all__ = ["sdpa_custom"]
