"The operators: attention, its derivatives, and the audit. Imports nothing of theria outside this folder."
from theria.attention.flash import flash_attn_forward
from theria.attention.reference import attention

__all__ = ["attention", "flash_attn_forward"]
