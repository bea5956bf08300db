"""A cancellation as Cog sends it: an exception that comes up in the thread of a prediction, wherever that is."""

import ctypes
import threading
import time
from collections.abc import Callable


class Cancelled(BaseException):
    pass


def cancel_while_reading(work: Callable[[], object], reading: threading.Event) -> None:
    """Cancels some work once the event is set, and asserts that the work ends by that within a second."""
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(work())
        except Cancelled as cancelled:
            outcome.append(cancelled)

    asking = threading.Thread(target=ask)
    asking.start()
    assert reading.wait(30)
    assert asking.ident is not None
    cancelled_at = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(asking.ident), ctypes.py_object(Cancelled))
    asking.join(30)
    assert time.monotonic() - cancelled_at < 1, "while the reading goes on"
    assert isinstance(outcome[0], Cancelled)
