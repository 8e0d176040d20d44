"""Editing: write single facts into a kernel, and change the rest as little as can be.

``edit_kernel`` is ROME for one key and MEMIT for many: a closed form, no training.
"""

from optax_cl.editing._edit_kernel import edit_kernel as edit_kernel

__all__ = ["edit_kernel"]
