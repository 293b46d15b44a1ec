"""The HTTP API: what stands between clients and Postgres (docs/http.md)."""

from scheduler.api.app import create_app, serve

__all__ = ["create_app", "serve"]
