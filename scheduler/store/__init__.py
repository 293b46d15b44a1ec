"""Every SQL statement of motet, a file for each subject: opening, landing, jobs, demand, leases, payload rows, outcomes, …

Functions take an open `Connection` where they are part of a larger transaction, and a `Database` where they
are one. All clocks are the database's.
"""
