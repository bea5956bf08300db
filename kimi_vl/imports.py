"""Imports of large packages, at their quickest."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports that make several hundred thousand objects, which all stay.

    Python's collector would look through them for garbage six times, half a second and more in all; they are kept out
    of its sight afterwards, too, so that a later collection does not hold up an answer.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
