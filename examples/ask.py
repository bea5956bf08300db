"""Sends a request to the server and prints its answer: python examples/ask.py examples/requests/document.json"""

import json
import sys
from pathlib import Path
from urllib.request import Request, urlopen

request = Request(
    "http://localhost:5000/predictions", Path(sys.argv[1]).read_bytes(), {"Content-Type": "application/json"}
)
prediction = json.load(urlopen(request))
if prediction["status"] != "succeeded":
    sys.exit(prediction["error"])
print(prediction["output"][0]["answer"])
