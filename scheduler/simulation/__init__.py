"""A cluster on a virtual clock: the dispatcher's own policy, and devices that are only numbers."""
