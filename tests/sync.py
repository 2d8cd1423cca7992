"""Nothing may wait for a GPU: a block in which whatever does raises."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forbidden_syncs() -> Iterator[None]:
    """Raise at every wait for the device inside the block; what was allowed before is allowed again after it.

    Setting the mode warns that it is a prototype. Where warnings are errors it is set all the same, so that setting it
    belongs inside the ``try``: an error mode that stays on would fail every later test of the process.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
