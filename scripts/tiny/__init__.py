"""The tiny Kimi-VL: what it is shown and asked, how it is trained and examined."""
