import inspect
import json
from pathlib import Path

import pytest
from cog_schema import ROOT, schema
from readme_tables import updated

from kimi_vl.media.videos import MAX_FRAMES
from kimi_vl.prompt.chat import DEFAULT_SYSTEM_PROMPT
from kimi_vl.request import MAX_FPS, MAX_IMAGE_TOKENS, MAX_NEW_TOKENS, Request
from kimi_vl.settings import Settings
from predict import Predictor

PREDICTOR = schema((ROOT / "predict.py").read_text())
INPUTS = PREDICTOR["components"]["schemas"]["Input"]["properties"]


def test_equals_what_cogs_own_generator_wrote(golden: Path) -> None:
    folder = golden / "cog_schema"
    assert schema((folder / "predict.py").read_text()) == json.loads((folder / "openapi_schema.json").read_text())


def test_every_input_is_optional_and_described() -> None:
    assert "required" not in PREDICTOR["components"]["schemas"]["Input"]
    assert INPUTS["video"]["nullable"] is True
    assert list(INPUTS) == list(inspect.signature(Predictor.predict).parameters)[1:]
    for name, options in INPUTS.items():
        assert options["description"].endswith("."), name


def test_predict_offers_what_a_request_takes() -> None:
    assert INPUTS["system_prompt"]["default"] == DEFAULT_SYSTEM_PROMPT
    assert INPUTS["max_new_tokens"]["maximum"] == MAX_NEW_TOKENS
    assert INPUTS["max_new_tokens"]["default"] == Request("").max_new_tokens
    assert INPUTS["video_frames"]["maximum"] == MAX_FRAMES
    assert INPUTS["video_fps"]["maximum"] == MAX_FPS
    assert INPUTS["max_image_tokens"]["maximum"] == MAX_IMAGE_TOKENS
    for name in ("pages", "video_frames", "video_fps", "max_image_tokens"):
        assert INPUTS[name]["default"] == getattr(Request(""), name)
    assert INPUTS["top_p"]["default"] == Request("").top_p


def test_clients_that_stream_are_told_so() -> None:
    assert PREDICTOR["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


@pytest.mark.parametrize("annotation", ["set", "list[bytes]"])
def test_a_type_without_a_schema_is_an_error(annotation: str) -> None:
    source = (ROOT / "predict.py").read_text().replace("stream: bool", f"stream: {annotation}")
    with pytest.raises(ValueError, match="no schema for the annotation"):
        schema(source)


def test_the_readmes_tables_are_those_of_the_code() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == updated(readme), "run scripts/readme_tables.py"
    for name in INPUTS:
        assert f"| `{name}` |" in readme
    for name in Settings.__dataclass_fields__:
        assert f"| `KIMI_VL_{name.upper()}` |" in readme
