"""Explaining: what is known of a job and the cluster around it, the explanation in numbers, and in sentences. Pure."""
