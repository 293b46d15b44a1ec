"""Every SQL statement of motet, by what it serves: registry and aliases, jobs, leadership, leases, outcomes, sealing, results, endings.

Functions take an open `Connection` where they are part of a larger transaction, and a `Database` where they
are one. All clocks are the database's.
"""
