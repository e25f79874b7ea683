"""The OpenAI-compatible front door: HTTP in, requests of the engine out. No scheduling happens here."""

from __future__ import annotations

from engine.server.app import create_app

__all__ = ["create_app"]
