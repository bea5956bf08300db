"""What can be wrong that is not our fault."""


class InvalidRequest(ValueError):
    """A request that cannot be served as sent.

    The message is one sentence for the person who sent it: what was wrong, the limit, what to do. It never repeats a
    path, a URL or the contents of a file.
    """


class Misconfigured(Exception):
    """The service cannot start as it was set up; the message tells the person who runs it what to do."""


class DeadlinePassed(Exception):
    """The time for a request is over before the model began; its answer is empty."""


def printable(text: str) -> str:
    """What a client sent, as a message may repeat it: what is no visible character stands as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
