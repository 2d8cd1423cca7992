"""Floating-point operations of one op's matrix products, from the shapes of what it is given.

The library's own ops bring their formulas with them (``define`` in ``sap_fast/ops/_library.py``). For PyTorch's ops its
own formulas are used (``torch.utils.flop_counter``), which count a causal attention's masked half as well.
"""

from collections.abc import Sequence
from typing import Any

from sap_fast.ops._library import flop_formula


def matrix_flops(op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Count the FLOPs of one call.

    Args:
        op: an ``OpOverload``, as a dispatch mode is given it.
    """
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # which imports Triton

    library, _, name = op._schema.name.partition("::")
    if library == "sap_fast":
        names = [argument.name for argument in op._schema.arguments]
        return flop_formula(name)(dict(zip(names, args, strict=False)) | kwargs)
    if name.startswith("_scaled_dot_product"):
        is_backward = name.endswith("backward")
        q, k, v = (x.shape for x in args[is_backward : 3 + is_backward])
        # Heads of queries that share one of keys each multiply with it; torch 2.11 refuses to count that.
        grouped = [(x[0], q[1], *x[2:]) for x in (k, v)]
        # Backward: the scores again, and four products more.
        return (5 if is_backward else 2) * sdpa_flop_count(q, *grouped) // 2
    formula = flop_registry.get(op._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
