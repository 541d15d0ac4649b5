"""Python's cyclic garbage collector, kept from pausing a process that knows millions of objects."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect what is new, then hide all that lives from the collector: its next passes look at what comes after.

    For a process whose long-lived objects are freed by their reference counts (the scheduler's are: what refers to each
    other there is taken apart when it goes). Called now and then a pass takes milliseconds; left alone, one over a
    million sessions takes seconds, in the middle of an event.
    """
    gc.collect()
    gc.freeze()
