"""Picture files → RGB pictures, in a process of its own (see confined.py)."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import pillow_heif
from PIL import AvifImagePlugin, Image, TiffImagePlugin

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.colour import reduced, to_srgb
from kimi_vl.media.confined import MEMORY, Channel, Message, Size
from kimi_vl.media.webp import leave_blank_transparent

# Only these decoders ever see a client's bytes; Pillow has many more.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
FORMATS_TO_SEND = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
LARGE = 16_000_000  # pixels; a picture with more is made smaller before anything else is done with it
TOGETHER = 24_000_000  # pixels of the pictures that are decoded at the same time, unless it is one
THREADS = 4
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
ORIENTATION = 0x0112  # of EXIF
TURNS = {  # what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

pillow_heif.register_heif_opener()
AvifImagePlugin.DEFAULT_MAX_THREADS = THREADS  # else one for each core, whose stacks would count as memory
Image.init()  # while the process waits


def work(channel: Channel, request: Message) -> None:
    """Answers the size of each file's picture as it is stored, then sends them in the sizes that are wanted."""
    names = request["names"]
    channel.begin_step()
    pictures = [
        open_picture(file, name, request["max_pixels"]) for file, name in zip(channel.files, names, strict=True)
    ]
    stored = [picture.size for picture in pictures]
    channel.send({"sizes": stored})
    wanted = [(width, height) for width, height in channel.receive()["sizes"]]

    def draw(position: int) -> tuple[bool, bytes]:
        seen, turned = decode(pictures[position], names[position], wanted[position])
        pictures[position].close()
        size = wanted[position][::-1] if turned else wanted[position]
        scaled = seen if seen.size == size else seen.resize(size, Image.Resampling.BICUBIC)
        return turned, scaled.tobytes()

    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches(stored):
            channel.begin_step([stored[position] for position in batch])
            for turned, pixels in pool.map(draw, batch):
                channel.send({"turned": turned}, pixels)


def batches(sizes: Sequence[Size]) -> Iterator[list[int]]:
    """Positions of the pictures that are decoded at the same time: one, or some with few pixels together."""
    batch, pixels = [0], sizes[0][0] * sizes[0][1]
    for position, (width, height) in enumerate(sizes[1:], start=1):
        pixels += width * height
        if pixels > TOGETHER:
            yield batch
            batch, pixels = [], width * height
        batch.append(position)
    yield batch


def open_picture(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """Reads a picture's header; its type is told from its content.

    Args:
        file: with the whole picture.
        name: what it is, as a message begins: "The first picture".
        max_pixels: more are refused.
    Raises:
        InvalidRequest: the file is empty or of another type, or the picture is too large.
    """
    if not os.fstat(file.fileno()).st_size:
        raise InvalidRequest(f"{name} is empty; send a {FORMATS_TO_SEND} file.")
    megapixels = f"megapixels and the limit is {max_pixels / 1e6:g}; send a smaller one."
    Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice as much, before a GIF takes memory for it
    try:
        picture = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{name} has more than {2 * max_pixels / 1e6:.0f} {megapixels}") from None
    except Image.UnidentifiedImageError:
        raise InvalidRequest(f"{name} is not a picture of a known type; send a {FORMATS_TO_SEND} file.") from None
    except Exception as error:  # decoders raise whatever they meet: OSError, ValueError, SyntaxError, struct.error …
        raise _refusal(error, name) from None
    leave_blank_transparent(picture)
    pixels = picture.width * picture.height
    if pixels > max_pixels:
        raise InvalidRequest(f"{name} has {pixels / 1e6:.0f} {megapixels}")
    return picture


def decode(picture: Image.Image, name: str, wanted: Size) -> tuple[Image.Image, bool]:
    """What a viewer shows: upright, in sRGB, transparency over white, mode RGB; of an animation the first frame.

    Args:
        picture: as opened; when this returns it may be closed.
        name: as for open_picture.
        wanted: the size that it will be scaled to, as it is stored.
    Returns:
        The picture, a large one in half its width and height or still less, but at least twice what is wanted where it
        has that, and whether it lay on its side.
    Raises:
        InvalidRequest: the file is damaged, or takes too much memory.
    """
    large = picture.width * picture.height > LARGE
    factor = max(2, min(picture.width // wanted[0], picture.height // wanted[1]) // 2)
    try:
        if large and picture.format == "JPEG":  # which can be decoded smaller
            picture.draft(None, (picture.width // factor, picture.height // factor))
        _scale_transparent_colour(picture)
        picture.load()
        turn = _turn(picture)
        picture = _of_sixteen_bits(picture)
        if picture.width * picture.height > LARGE:
            whole, picture = picture, reduced(picture, factor)
            whole.close()
        seen = to_srgb(picture)
        upright = seen if turn is None else seen.transpose(turn)
    except Exception as error:
        raise _refusal(error, name, large) from None
    return upright, upright.size != seen.size


def _refusal(error: Exception, name: str, large: bool = False) -> InvalidRequest:
    if large or isinstance(error, MemoryError):  # not every decoder says that memory was what it lacked
        reason = f"takes more than {MEMORY >> 20} MB of memory to read"
        return InvalidRequest(f"{name} is damaged or {reason}; send a smaller one.")
    return InvalidRequest(f"{name} is damaged or incomplete; send it again.")


def _scale_transparent_colour(picture: Image.Image) -> None:
    """Of a PNG that is not loaded: Pillow gives the levels of its pixels 8 bits, and leaves this colour as it is."""
    colour = picture.info.get("transparency")
    if picture.format != "PNG" or colour is None:
        return
    match picture.tile[0].args:  # type: ignore[attr-defined]
        case "L;2":
            picture.info["transparency"] = colour * 85
        case "L;4":
            picture.info["transparency"] = colour * 17
        case "RGB;16B":
            picture.info["transparency"] = tuple(level >> 8 for level in colour)


def _of_sixteen_bits(picture: Image.Image) -> Image.Image:
    """A loaded picture; a TIFF's deep grey from 0, black, to 65535, which Pillow leaves as it is in the file."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.mode == "I;16":
        if picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            return picture.point(lambda level: level * -1 + 65535)
        if picture.tag_v2[BITS] == (12,):
            return picture.point(lambda level: level * (65535 / 4095))
    return picture


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What its EXIF orientation asks for; what cannot be read of it counts as upright."""
    if picture.format == "HEIF":  # already turned by its decoder
        return None
    try:
        return TURNS.get(picture.getexif()[ORIENTATION])
    except Exception:
        return None
