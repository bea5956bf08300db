"""Sends a request to the server and prints its answer: python examples/ask.py examples/requests/document.json"""

import json
import sys
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

request = Request(
    "http://localhost:5000/predictions", Path(sys.argv[1]).read_bytes(), {"Content-Type": "application/json"}
)
try:
    prediction = json.load(urlopen(request))
except HTTPError as error:  # such as 409, when another prediction runs: send it again
    sys.exit(f"{error}: {error.read().decode()}")
except URLError as error:
    sys.exit(f"no server answers at {request.full_url}: {error.reason}")
if prediction["status"] != "succeeded":
    sys.exit(prediction["error"])
print(prediction["output"][0]["answer"])
