"""Untrusted picture files → RGB pictures, as a viewer shows them."""

import logging
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pillow_heif
from PIL import Image, ImageOps

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.colour import to_srgb
from kimi_vl.media.files import open_file

# Pillow's warnings would be shown to whoever reads the log of the request. (Once for all: filters are not per thread.)
warnings.filterwarnings("ignore", module=r"PIL\.|kimi_vl\.media\.")

# Only these decoders ever see a client's bytes; Pillow has many more.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
FORMATS_TO_SEND = "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or HEIC"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")

pillow_heif.register_heif_opener()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # a client would see in its log what Pillow thinks of a file


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may have at most."""

    max_bytes: int = 20_000_000
    max_pixels: int = 64_000_000


def ordinal(position: int) -> str:
    """Which picture, in words: 0 is the first."""
    return ORDINALS[position] if position < len(ORDINALS) else f"{position + 1}th"


def read_image(path: Path, position: int, limits: ImageLimits) -> Image.Image:
    """Reads and decodes a picture file; see decode_image.

    Raises:
        InvalidRequest: it is no readable file, or no picture within the limits.
    """
    name = f"The {ordinal(position)} picture"
    try:
        with open_file(path, name, "picture", limits.max_bytes) as file:
            data = file.read(limits.max_bytes + 1)
    except OSError:
        raise InvalidRequest(f"{name} cannot be read; send it again.") from None
    return decode_image(data, position, limits)


def decode_image(data: bytes, position: int, limits: ImageLimits) -> Image.Image:
    """Decodes a picture: upright, in sRGB, transparency over white, mode RGB; of an animation the first frame.

    Args:
        data: a whole file; its type is told from its content.
        position: which of the request's pictures it is, from 0, for messages.
        limits: checked before any pixel is decoded.
    Raises:
        InvalidRequest: the file is empty, too large, of another type, or damaged.
    """
    name = f"The {ordinal(position)} picture"
    if not data:
        raise InvalidRequest(f"{name} is empty; send a {FORMATS_TO_SEND} file.")
    if len(data) > limits.max_bytes:
        raise InvalidRequest(f"{name} is larger than {limits.max_bytes / 1e6:g} MB, the limit; send a smaller file.")
    damaged = InvalidRequest(f"{name} is damaged or incomplete; send it again.")
    megapixels = f"megapixels and the limit is {limits.max_pixels / 1e6:g}; send a smaller one."
    Image.MAX_IMAGE_PIXELS = limits.max_pixels  # Pillow refuses twice as much, before a GIF takes memory for it
    try:
        picture = _open(data)
        if picture is None:
            raise InvalidRequest(f"{name} is not a picture of a known type; send a {FORMATS_TO_SEND} file.")
        pixels = picture.width * picture.height
        if pixels > limits.max_pixels:
            raise InvalidRequest(f"{name} has {pixels / 1e6:.0f} {megapixels}")
        picture.load()
        return to_srgb(_upright(picture))
    except InvalidRequest:
        raise
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{name} has more than {2 * limits.max_pixels / 1e6:.0f} {megapixels}") from None
    except (MemoryError, RecursionError):
        raise damaged from None
    except Exception:  # decoders raise whatever they meet: OSError, ValueError, SyntaxError, struct.error, zlib.error …
        raise damaged from None


def _open(data: bytes) -> Image.Image | None:
    """Reads the header; None for an unknown type."""
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        return None


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; what cannot be read of it counts as upright."""
    if picture.format == "HEIF":  # already turned by its decoder
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:
        return picture
