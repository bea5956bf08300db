"""data: URIs → bytes."""

from base64 import b64decode

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.images import ordinal


def read_data_uri(uri: str, position: int, max_bytes: int) -> bytes:
    """The file in a data: URI with base64; its type is not looked at.

    Args:
        uri: whatever a client sent.
        position: which of the request's pictures it is, from 0, for messages.
        max_bytes: of a larger file only the beginning is decoded, with up to three bytes more than these.
    Raises:
        InvalidRequest: it is not in base64.
    """
    header, _, characters = uri.partition(",")
    enough = (max_bytes // 3 + 1) * 4  # base64 has four characters for three bytes
    try:
        if header.lower().endswith(";base64"):
            return b64decode(characters[:enough], validate=True)
    except ValueError:
        pass
    raise InvalidRequest(
        f"The {ordinal(position)} picture's data: URI is not in base64; send data:image/png;base64, and the file."
    )
