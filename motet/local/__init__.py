"""A whole cluster on one machine without Docker: real Postgres and Valkey from wheels, and motet's own processes."""
