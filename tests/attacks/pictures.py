"""Picture files that no camera makes."""

import struct
import zlib
from collections.abc import Sequence

from PIL import Image

from tests.attacks.server import encoded

MANY = 100_000


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *extra: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG of compressed rows, with more chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def with_chunks(file: bytes, *extra: bytes, last: bool = False) -> bytes:
    """A PNG file with more chunks, after its header or before its end."""
    place = len(file) - 12 if last else 33
    return file[:place] + b"".join(extra) + file[place:]


def swollen(megabytes: int) -> bytes:
    """zlib's stream of so many megabytes of zeros, but for its checksum."""
    packer = zlib.compressobj(9)
    begin = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return begin + again * (megabytes - 1) + packer.flush()


def animated_png(file: bytes) -> bytes:
    """A PNG with many more frames."""
    width, height = struct.unpack(">II", file[16:24])
    control = struct.pack(">IIIIHHBB", width, height, 0, 0, 1, 10, 0, 0)
    one = struct.pack(">IIIIHHBB", 1, 1, 0, 0, 1, 10, 0, 0)
    frames, data = [], zlib.compress(bytes(4))
    for index in range(1, MANY):
        frames.append(chunk(b"fcTL", struct.pack(">I", 2 * index - 1) + one))
        frames.append(chunk(b"fdAT", struct.pack(">I", 2 * index) + data))
    head = chunk(b"acTL", struct.pack(">II", MANY, 0)), chunk(b"fcTL", struct.pack(">I", 0) + control)
    return with_chunks(with_chunks(file, *head), *frames, last=True)


def animated_gif(file: bytes) -> bytes:
    """A GIF with many more frames."""
    frame = (
        b"\x21\xf9\x04\x00\x01\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    )
    return file.rstrip(b"\x3b") + frame * (MANY - 1) + b"\x3b"


def animated_webp(width: int, height: int, frames: int = MANY) -> bytes:
    """An animated WebP of many frames of one point each."""
    point = encoded(Image.new("RGB", (1, 1), "red"), "WEBP", lossless=True)[12:]
    content = struct.pack("<I", 0)[:3] * 2 + bytes(6) + struct.pack("<I", 10)[:3] + b"\x00" + point
    frame = b"ANMF" + struct.pack("<I", len(content)) + content
    canvas = b"\x02\x00\x00\x00" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(entries: Sequence[tuple[int, int, int, int]], further: int = 0, data: bytes = b"") -> bytes:
    """A TIFF of one directory.

    Args:
        entries: tag, type, count and value, or where it is.
        further: where the next directory is.
        data: after the directory.
    """
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\x00\x08\x00\x00\x00" + directory + struct.pack("<I", further) + data


def tiff_of(width: int, height: int, further: int = 0, *more: tuple[int, int, int, int], data: bytes = b"") -> bytes:
    """A TIFF of grey points, all from where the file begins."""
    about = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    about += [(273, 4, 1, 0), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, min(width * height, 2**32 - 1))]
    return tiff(sorted([*about, *more]), further, data)


def many_scans(width: int, height: int) -> bytes:
    """A progressive JPEG whose last scan comes thousands of times."""
    file = encoded(Image.new("L", (width, height), 200), "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    scan = file[last:-2]
    return file[:last] + scan * (5_000_000 // len(scan)) + b"\xff\xd9"


def segments(file: bytes, segment: bytes, count: int) -> bytes:
    """A JPEG with a segment, many times, at its beginning."""
    return file[:2] + segment * count + file[2:]


def claiming(file: bytes, width: int, height: int) -> bytes:
    """An AVIF or HEIC that says in its properties that it has another size."""
    place = file.index(b"ispe") + 8
    return file[:place] + struct.pack(">II", width, height) + file[place + 8 :]
