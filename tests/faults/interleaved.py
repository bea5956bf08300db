"""Many requests at once, each about pictures of its own, some of them cancelled at any moment."""

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from threading import Thread

from PIL import Image, ImageDraw

from kimi_vl.output.pacing import joined
from kimi_vl.output.thinking import Delta
from kimi_vl.request import Request
from kimi_vl.service import Service
from tests.cancels import Cancelled

AT_ONCE = 3
NUMBERS = (13, 27, 31, 46, 52, 68, 74, 85)  # no two of which begin alike


def pictures(folder: Path) -> list[Path]:
    """Small pictures of NUMBERS."""
    files = []
    for number in NUMBERS:
        picture = Image.new("RGB", (84, 56), "white")
        ImageDraw.Draw(picture).text((14, 8), str(number), fill="black", font_size=36)
        files.append(folder / f"{number}.png")
        picture.save(files[-1])
    return files


def requests(files: Sequence[Path], max_new_tokens: int) -> list[Request]:
    """One about each picture alone, and one about each with the next."""
    pairs = zip(files, [*files[1:], files[0]], strict=True)
    alone = [Request("What number is in the picture?", images=[file]) for file in files]
    both = [Request("What number is in picture 2?", images=pair) for pair in pairs]
    return [
        Request(each.prompt, images=each.images, temperature=0, max_new_tokens=max_new_tokens)
        for each in (*alone, *both)
    ]


class Client(Thread):
    """Asks once."""

    def __init__(self, service: Service, request: Request, expected: Delta) -> None:
        super().__init__()
        self.service, self.request, self.expected = service, request, expected
        self.outcome: Delta | BaseException | None = None

    def run(self) -> None:
        try:
            self._ask()
        except Cancelled:  # where that could not note it
            self.outcome = Cancelled()

    def _ask(self) -> None:
        try:
            with self.service.answer(self.request) as answer:
                self.outcome = joined(answer)
        except (Exception, Cancelled) as error:
            self.outcome = error

    def cancel(self) -> None:
        """As Cog does."""
        assert self.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(Cancelled))


def interleave(service: Service, asked: Sequence[Request], count: int) -> tuple[int, int]:
    """Asks so many times, and asserts that nobody gets another's answer.

    Returns:
        How many were answered, and how many cancelled.
    """
    expected = [joined(service.answer(request)) for request in asked]
    random, running, clients = Random(1), list[Client](), list[Client]()
    for _ in range(count):
        place = random.randrange(len(asked))
        client = Client(service, asked[place], expected[place])
        client.start()
        running.append(client)
        clients.append(client)
        if random.random() < 0.35:
            time.sleep(random.random() * 0.1)
            random.choice(running).cancel()
        if len(running) == AT_ONCE:
            running.pop(0).join(60)
    for client in running:
        client.join(60)
    cancelled = [client for client in clients if isinstance(client.outcome, Cancelled)]
    for client in clients:
        assert isinstance(client.outcome, Cancelled) or client.outcome == client.expected
    return count - len(cancelled), len(cancelled)
