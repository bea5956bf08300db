"""Kimi-VL on one GPU. Importing this package teaches transformers' Auto classes the official checkpoint layout."""

import sys

# `python -m kimi_vl` reads its arguments before it spends seconds on these imports, and then does this itself.
if sys.argv[0] != "-m" or "kimi_vl" not in sys.orig_argv:
    from kimi_vl.registration import register

    register()
