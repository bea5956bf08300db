from base64 import b64encode

import pytest

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.data_uri import read_data_uri


@pytest.mark.parametrize("header", ["data:image/png;base64,", "DATA:;Base64,", "data:image/png;charset=x;base64,"])
@pytest.mark.parametrize("data", [b"", b"a", b"\x89PNG" * 10])
def test_gives_the_file(header: str, data: bytes) -> None:
    assert read_data_uri(header + b64encode(data).decode(), "", 1000) == data


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 99, 100, 101, 102])
def test_of_a_file_too_large_little_more_than_the_limit_is_decoded(limit: int) -> None:
    data = read_data_uri("data:;base64," + b64encode(bytes(1000)).decode(), "", limit)
    assert limit < len(data) <= limit + 3


@pytest.mark.parametrize(
    "uri", ["data:", "data:,x", "data:text/plain,x", "data:;base64,ab", "data:;base64,ab\ncd", "data:;base64,é"]
)
def test_what_is_not_base64_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_data_uri(uri, "The first document", 1000)
    told = str(refusal.value)
    assert told == "The first document's data: URI is not in base64; send data:;base64, and the file in base64."
    assert read_data_uri("data:;base64,YQ==", "", 1000) == b"a", "what it tells to send is taken"
