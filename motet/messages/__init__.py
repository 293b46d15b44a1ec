"""Every message of the HTTP API, declared once: the server writes what the client reads, and the other way round.

A module for each subject. A new field is written here, with its ``#:`` line, and where it is filled and used;
docs per field in the API's description come from those lines. Nothing but the standard library is imported.
"""
