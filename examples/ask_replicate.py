"""The same through Replicate: python examples/ask_replicate.py OWNER/kimi-vl:VERSION examples/requests/document.json"""

import json
import sys
from pathlib import Path

import replicate  # pip install replicate

model, file = sys.argv[1:]
output = list(replicate.run(model, input=json.loads(Path(file).read_text())["input"]))  # it comes as an iterator
print(output[0]["answer"])
