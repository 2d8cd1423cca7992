"""One row for each distinct prefix of a packed batch: what sequences begin with in common is computed once.

Attention is causal, so all that is computed of a token depends on the tokens up to it. Sequences that begin alike
(a system prompt, the frame of a chat template, the prompt of a pair) hold the same values there, in every layer, and
get back gradients whose sum is all that matters. The rows of a batch are therefore the nodes of its prefix tree:
norms, products and the rest run on them. In attention a sequence asks with the rows that it owns, which no sequence
before it has, and which are its last; only keys and values are spread, to every sequence that has them.

This is exact, up to the order of sums. It does not go together with dropout, whose masks differ from token to token.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from sap_fast.batch.rows import PrefixSharing, Rows
from sap_fast.ops.take_rows import RowIndex

# Of the tokens, that must be saved at least. A row through all matrices of a layer costs about seventy times what it
# costs to spread its key and value (bytes against FLOPs of Llama-2-7B on an H200, by arithmetic).
_WORTHWHILE = 1 / 16


def share_prefixes(rows: Rows) -> Rows:
    """Merge the rows of sequences that begin with the same tokens in the same columns.

    Args:
        rows: packed, on the host.

    Returns:
        The same batch on fewer rows; ``rows`` itself if too few would be saved.
    """
    ids, positions, bounds = (x.numpy() for x in (rows.input_ids, rows.position_ids, rows.cu_seqlens))
    sequences = [ids[a:b] for a, b in pairwise(bounds)]
    node = _nodes(sequences, [int(positions[a]) for a in bounds[:-1]])
    _, first, row = np.unique(node, return_index=True, return_inverse=True)
    if len(first) > (1 - _WORTHWHILE) * len(ids):
        return rows
    # Numbered by their first token, so that the rows of a sequence which no sequence before it has stand together.
    rank = np.empty_like(first)
    rank[first.argsort()] = np.arange(len(first))
    row, first = rank[row], np.sort(first)
    owned = np.searchsorted(first, bounds).astype(np.int32)
    return replace(
        rows,
        input_ids=torch.from_numpy(ids[first]),
        position_ids=torch.from_numpy(positions[first]),
        cu_seqlens=torch.from_numpy(owned),
        max_seqlen=int(np.diff(owned).max()),
        labelled=RowIndex.on_host(row[rows.labelled.rows.numpy()], len(first)),
        shared=PrefixSharing(RowIndex.on_host(row, len(first)), rows.cu_seqlens, rows.max_seqlen),
    )


def _nodes(sequences: Sequence[np.ndarray], starts: Sequence[int]) -> np.ndarray:
    """Number the node of the prefix tree that each token ends in, sequence after sequence, by any numbers.

    Sorted sequences share the most with their neighbours: each goes on where it leaves the one before it.
    """
    order = sorted(range(len(sequences)), key=lambda i: (starts[i], sequences[i].tolist()))
    nodes: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
    count = 0
    before = None
    for i in order:
        common = 0
        if before is not None and starts[i] == starts[before]:
            length = min(len(sequences[i]), len(sequences[before]))
            differs = sequences[i][:length] != sequences[before][:length]
            common = int(differs.argmax()) if differs.any() else length
        new = len(sequences[i]) - common
        nodes[i] = np.concatenate((nodes[before][:common] if before is not None else nodes[i], count + np.arange(new)))
        count += new
        before = i
    return np.concatenate(nodes)
