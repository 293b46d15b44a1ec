"""The engines installed here: entry points of the group ``motet.engines``, each loaded when first asked for."""

from __future__ import annotations

import contextlib
import threading
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from workers.engine import BatchEngine, CannotLoad, Engine, spreads
from workers.engines.function import FunctionEngine

GROUP = "motet.engines"


class InstalledEngines:
    """Finds engines by name. A class is instantiated once; a plain function is wrapped."""

    def __init__(self) -> None:
        self._points: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=GROUP)}
        self._found: dict[str, Engine | BatchEngine] = {}
        self._lock = threading.Lock()

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._points))

    def spreading(self) -> tuple[str, ...]:
        """Names of those that lay a model out over a group of GPUs. Imports all of them."""
        return tuple(name for name in self.names() if self._spreads(name))

    def _spreads(self, name: str) -> bool:
        try:
            return spreads(self.find(name))
        except CannotLoad:
            return False

    def preload(self) -> None:
        """Import what the encoder needs, if that is installed: some ten seconds, while there is nothing else to do."""
        with contextlib.suppress(ImportError):
            from workers.engines.trunk import preload

            preload()

    def find(self, name: str) -> Engine | BatchEngine:
        """Raises CannotLoad where no such engine is installed, or where importing it fails."""
        with self._lock:
            if name not in self._found:
                self._found[name] = self._load(name)
            return self._found[name]

    def _load(self, name: str) -> Engine | BatchEngine:
        if name not in self._points:
            raise CannotLoad(f"no engine {name!r} here; installed are {', '.join(self.names())}")
        point = self._points[name]
        try:
            found = point.load()
            if isinstance(found, type):
                return cast("Engine | BatchEngine", found())
        except Exception as error:
            raise CannotLoad(
                f"engine {name!r} ({point.value}) cannot be imported: {type(error).__name__}"
            ) from error
        if isinstance(found, Engine | BatchEngine):
            return found
        if callable(found):
            origin = f"{point.dist.name} {point.dist.version}" if point.dist else ""
            return FunctionEngine(found, engine=name, origin=f"{point.value} {origin}".strip())
        raise CannotLoad(f"engine {name!r} ({point.value}) is neither an engine nor a function")
