"""The data of the applications: fetched from where it is published, pinned by digest, cached, never shipped."""
