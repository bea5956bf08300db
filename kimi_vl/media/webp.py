"""What Pillow leaves to be set for a WebP."""

from PIL import Image, WebPImagePlugin


def leave_blank_transparent(picture: Image.Image) -> None:
    """Of an animated WebP that is not loaded: what no frame covers becomes transparent, whatever the file says of it.

    Pillow drops the alpha of a file that claims to have none, and gives no other way to keep it.
    """
    if isinstance(picture, WebPImagePlugin.WebPImageFile) and picture.is_animated:
        picture._mode = picture.rawmode = "RGBA"
