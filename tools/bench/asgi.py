"""A popular alternative: FastAPI, with one httpx client for the app's lifetime."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request
from pydantic import BaseModel

URL = os.environ["PROVIDER_URL"]


class Notification(BaseModel):
    """The body of a request."""

    to: str
    title: str
    message: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the client before the first request, and close it after the last."""
    async with httpx.AsyncClient(timeout=5) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/notify")
async def notify(notification: Notification, request: Request) -> dict[str, str]:
    """Forward the notification to the provider."""
    response = await request.app.state.client.post(URL, json=notification.model_dump())
    response.raise_for_status()
    return {"message": "notification sent successfully"}
