"""A process that reads files for the service and does what it is told."""

import ctypes
import os
import time
from typing import Any

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import Channel, Message


def work(channel: Channel, request: Message) -> None:
    match request["do"]:
        case "sleep":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "spin in a step":
            channel.begin_step()
            time.sleep(0.1)  # does not count
            work(channel, {"do": "spin"})
        case "compute":
            channel.begin_step([request["picture"]])
            until = time.process_time() + request["for"]
            while time.process_time() < until:
                pass
            channel.send({})
        case "sleep when asked":
            channel.send({})
            channel.receive()
            time.sleep(60)
        case "crash":
            ctypes.string_at(0)
        case "eat":
            eaten: Any = bytearray(600 << 20)
            channel.send({"eaten": len(eaten)})
        case "raise":
            raise KeyError("/secret/path")
        case "refuse":
            raise InvalidRequest("It is too blue.")
        case "write":
            with open("/tmp/written", "w") as file:
                file.write("x" * 100_000)
            channel.send({})
        case "look around":
            print("noise of a library")
            os.write(1, b"more of it")
            channel.send({"environment": sorted(os.environ), "text": channel.files[0].read(100).decode()})
        case "draw":
            channel.send({})
            sizes = channel.receive()["sizes"]
            for place, (width, height) in enumerate(sizes):
                if request.get("break") == place:
                    raise InvalidRequest("The third one is broken.")
                channel.send({}, bytes([place]) * (3 * width * height))
