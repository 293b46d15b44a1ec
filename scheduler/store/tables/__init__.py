"""The schema of the database as SQLAlchemy tables: types, constraints, indexes, and what each of them means.

Migrations make it, and never import this package; tests/integration/test_tables.py holds a migrated database against it.
Views and functions for SQL users stand in migrations/ alone.
"""

from scheduler.store.tables import cluster, doors, events, jobs

__all__ = ["cluster", "doors", "events", "jobs"]
