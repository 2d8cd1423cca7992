"""Bounds how far off an op's results may be, for its contract, the tests of its kernels and the smoke.

What is right is derived in float64. An error is the largest difference of two elements; a yardstick's is that of the
op's formula in PyTorch in the same dtype. Which of the bounds is an op's own business its ``cases.py`` says.
"""

import torch

# In float64, of the largest element.
EXACT = 1e-12
# What an error may be where the yardstick's is nil by luck, in eps times the largest element. Both
# dtypes are computed in float32. There an element takes several roundings of half an eps, in an
# order that is the kernel's own business. Beside a bfloat16 eps those are nothing; what remains is
# one rounding of the result and one of a stored intermediate (the residual stream, W x).
ROUNDINGS = {torch.float32: 4.0, torch.bfloat16: 1.0}
# How many times the yardstick's an error may be, beside that.
TIMES = 2.0
# The same where operands are rounded to bfloat16 on their way to a tensor core (``OpCases.multiplies``): attention's P
# and dS, as in the formula in that dtype. It takes delta from the rounded o besides, as every flash attention does, and
# the error of a row's delta reaches its dq whole: twice what the formula makes, on the most peaked of the cases
# ("Known" in its README).
TIMES_OF_PRODUCTS = 4.0
# The same at the widths of a model, since cuBLAS adds 4096 terms one after another in one shape's product and in parts
# in another's: on an H200 lora_linear was off by 2.6 times what the formula was. A term left out is off by 100 times as
# much.
TIMES_AT_WIDTH = 4.0
# In eps times the largest element: by how much two results may differ that add the same terms in another order.
REORDERED = 4.0
# Of the norm of a result at the widths of a model: rounding errors of single elements average out in it. What remains
# is one or two bfloat16 roundings, each a ninth of it, or in float32 that of sums over ten thousand terms.
OF_NORM = {torch.bfloat16: 2**-6, torch.float32: 1e-5}
# ... and of its largest element any one may be off by twice as much: a missing column is a small part of a norm.
OF_LARGEST = {torch.bfloat16: 2**-5}
# Of the largest element, where no yardstick is computed: what a wrong term exceeds.
ROUGH = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def allowed(yardstick: float, largest: float, dtype: torch.dtype, times: float = TIMES) -> float:
    """Return how large an error may be.

    Args:
        yardstick: the error of the same formula.
        largest: the largest element of the right result.
        dtype: of storage.
    """
    return times * yardstick + ROUNDINGS[dtype] * torch.finfo(dtype).eps * largest
