"""The naive stack: Flask and `requests.post`, which opens a connection for each message."""

import os

import requests
from flask import Flask, request

URL = os.environ["PROVIDER_URL"]

app = Flask(__name__)


@app.post("/notify")
def notify() -> dict[str, str]:
    """Forward the notification to the provider."""
    requests.post(URL, json=request.get_json(), timeout=5).raise_for_status()
    return {"message": "notification sent successfully"}
