"""Placing: the records, the ledger of what waits and what is leased, the choice, and rebalancing. Pure."""
