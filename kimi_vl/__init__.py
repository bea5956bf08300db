"""Kimi-VL on one GPU. Importing this package teaches transformers' Auto classes the official checkpoint layout."""

import sys

from kimi_vl.imports import uncollected

# `python -m kimi_vl` reads its arguments before it spends seconds on these imports, and then does this itself; the
# processes that read documents and videos (`python -m kimi_vl.media.confined`) never need them.
if sys.argv[0] != "-m" or not any(argument.split(".")[0] == "kimi_vl" for argument in sys.orig_argv):
    with uncollected():
        from kimi_vl.registration import register

        register()
