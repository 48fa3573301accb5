"""Suites and means that kinds of pools outside of the tree can import."""
