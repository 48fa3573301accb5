"""The gRPC edge: each method calls one use case and answers."""
