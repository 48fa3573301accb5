"""Parent of a node's guests and daemons; standard library only, nothing imports it."""

__version__ = "0.1.0"
