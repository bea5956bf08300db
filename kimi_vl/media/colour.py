"""Any of Pillow's modes and colour profiles → sRGB over white."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4_000_000  # real ones have a few kilobytes, those of printers up to two megabytes
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
WITH_ALPHA = ("LA", "RGBA")  # the band A of LAB is a colour
STRIP = 512  # rows, about
SRGB = ImageCms.createProfile("sRGB")


def to_srgb(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB: its colour profile honoured, its transparency over white."""
    colours = _through_profile(_eight_bits(picture), picture.info.get("icc_profile"))
    if colours.mode not in WITH_ALPHA:
        return colours.convert("RGB")
    seen = Image.new("RGB", colours.size, "white")
    seen.paste(colours, mask=colours.getchannel("A"))
    return seen


def reduced(picture: Image.Image, factor: int) -> Image.Image:
    """The picture so many times narrower and lower, for to_srgb; by strips, because a whole copy takes much memory."""
    small, rows = None, factor * max(1, STRIP // factor)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        deep = strip.mode in DEEP_GREY  # scaled by the whole picture's largest value, so not here
        part = (strip.convert("F") if deep else _eight_bits(strip)).reduce(factor)
        if small is None:
            small = Image.new(part.mode, (part.width, -(-picture.height // factor)))
        small.paste(part, (0, top // factor))
    assert small is not None
    if picture.mode in DEEP_GREY and picture.mode != "F":
        small = small.convert("I")
    if "icc_profile" in picture.info:
        small.info["icc_profile"] = picture.info["icc_profile"]
    return small


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A picture in 1, L, LA, RGB, RGBA, CMYK or LAB, transparency as an alpha channel."""
    transparent = picture.info.get("transparency") is not None
    match picture.mode:
        case "P":
            return picture.convert("RGBA" if transparent else "RGB")
        case "PA" | "La" | "RGBa":
            return picture.convert("RGBA")
        case "1" | "L" | "RGB" if transparent:
            return picture.convert("RGBA")
        case "1":
            return picture.convert("L")
        case mode if mode in DEEP_GREY:
            return _grey(picture)
        case "YCbCr" | "HSV" | "RGBX":
            return picture.convert("RGB")
    return picture


def _grey(picture: Image.Image) -> Image.Image:
    """Deep grey scaled to 8 bits: floats from 0 to 1, integers from 0 to 65535; beyond that, by the largest value."""
    stored = np.asarray(picture)
    values = np.nan_to_num(stored.astype(np.float32), copy=False, posinf=0, neginf=0)
    values *= 255 / max(1.0 if picture.mode == "F" else 65535.0, float(values.max(initial=0)))
    grey = Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(stored == key, 0, 255).astype(np.uint8)))
    return grey


def _through_profile(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours from the profile to sRGB, alpha as it was; a profile that is broken or of another mode is ignored."""
    alpha = picture.getchannel("A") if picture.mode in WITH_ALPHA else None
    if profile and len(profile) <= MAX_PROFILE_BYTES:
        base = picture.convert("L" if picture.mode == "LA" else "RGB") if alpha else picture
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
            seen = ImageCms.profileToProfile(base, source, SRGB, intent, "RGB", flags=flags)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            return picture
        assert seen is not None
        if alpha:
            seen.putalpha(alpha)
        return seen
    return picture
