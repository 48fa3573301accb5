"""The gRPC edge of the network service."""
