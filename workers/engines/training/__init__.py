"""Training on a worker: heads on a frozen trunk, then the trunk itself. Everything here runs in steps that are short."""
