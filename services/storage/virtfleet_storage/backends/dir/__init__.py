"""Pools that are a directory of a mounted file system."""
