"""data: URIs → bytes."""

from base64 import b64decode

from kimi_vl.errors import InvalidRequest


def read_data_uri(uri: str, name: str, max_bytes: int) -> bytes:
    """The file in a data: URI with base64; its type is not looked at.

    Args:
        uri: whatever a client sent.
        name: what it is to the person who sent it, as a message begins: "The first picture".
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
    raise InvalidRequest(f"{name}'s data: URI is not in base64; send data:;base64, and the file in base64.")
