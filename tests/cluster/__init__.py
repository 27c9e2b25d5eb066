"""Clusters of several nodes on this machine; they run before the shared one exists."""
