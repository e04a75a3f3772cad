"""Bringing new weights to running replicas, versioned and proved."""
