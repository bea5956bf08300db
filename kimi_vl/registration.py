"""What `import kimi_vl` does."""

from functools import cache

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kimi_vl.model.checkpoint import register_tensor_names
from kimi_vl.model.configuration import KimiVLConfig
from kimi_vl.model.modeling import KimiVLForConditionalGeneration
from kimi_vl.prompt.processor import KimiVLProcessor
from kimi_vl.prompt.tokenizer import TikTokenTokenizer


@cache
def register() -> None:
    """Makes transformers' Auto classes know Kimi-VL."""
    AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig)
    AutoModelForImageTextToText.register(KimiVLConfig, KimiVLForConditionalGeneration)
    AutoProcessor.register(KimiVLConfig, KimiVLProcessor)
    AutoTokenizer.register(KimiVLConfig, TikTokenTokenizer)
    register_tensor_names()
