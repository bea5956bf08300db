from dataclasses import fields

import pytest

from kimi_vl.errors import Misconfigured
from kimi_vl.settings import Settings


def test_reads_the_variables_that_are_set() -> None:
    environment = {"KIMI_VL_MAX_IMAGES": "3", "KIMI_VL_MODEL": "tiny", "PATH": "/bin"}
    assert Settings.from_environment(environment) == Settings(model="tiny", max_images=3)
    assert Settings.from_environment({"KIMI_VL_WEIGHTS_DIR": "/models"}).weights_dir == "/models"


def test_an_empty_variable_is_not_set() -> None:
    empty = {f"KIMI_VL_{field.name.upper()}": "" for field in fields(Settings)}
    assert Settings.from_environment(empty) == Settings()
    with pytest.raises(Misconfigured, match="KIMI_VL_MODLE is not a setting"):
        Settings.from_environment({"KIMI_VL_MODLE": ""})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KIMI_VL_MAX_IMAGES", "many", "KIMI_VL_MAX_IMAGES must be a whole number"),
        ("KIMI_VL_MAX_IMAGES", "-1", "KIMI_VL_MAX_IMAGES must be a whole number"),
        ("KIMI_VL_MAX_MEDIA_SECONDS", "9999999999", "KIMI_VL_MAX_MEDIA_SECONDS may be at most 1,000,000,000, not 9999"),
        ("KIMI_VL_MAX_PICTURES", "3", "KIMI_VL_MAX_PICTURES is not a setting; there are KIMI_VL_MODEL"),
    ],
)
def test_a_mistake_stops_the_start(variable: str, value: str, message: str) -> None:
    with pytest.raises(Misconfigured, match=message):
        Settings.from_environment({variable: value})


def test_urls_are_allowed_by_1_alone() -> None:
    assert Settings().allow_urls is False
    for text, allowed in (("1", True), ("0", False)):
        assert Settings.from_environment({"KIMI_VL_ALLOW_URLS": text}).allow_urls is allowed
    with pytest.raises(Misconfigured, match="KIMI_VL_ALLOW_URLS must be 0 or 1, not 'yes'"):
        Settings.from_environment({"KIMI_VL_ALLOW_URLS": "yes"})
