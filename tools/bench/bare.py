"""The bare stack, the floor of the costs: Flask, a prepared request, an adapter, nothing else."""

import os

from flask import Flask, request
from requests import Request
from requests.adapters import HTTPAdapter

URL = os.environ["PROVIDER_URL"]
ADAPTER = HTTPAdapter(pool_maxsize=int(os.environ["THREADS"]))

app = Flask(__name__, static_folder=None)


@app.post("/notify")
def notify() -> dict[str, str]:
    """Forward the notification to the provider."""
    prepared = Request("POST", URL, json=request.get_json()).prepare()
    ADAPTER.send(prepared, timeout=5).content  # noqa: B018 returns the connection to the pool
    return {"message": "notification sent successfully"}
