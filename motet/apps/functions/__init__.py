"""Functions that applications register: plain Python, entry points of the group ``motet.engines`` (pyproject.toml)."""
