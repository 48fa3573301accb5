"""The gRPC edge of the compute service: each method calls one use case and answers."""
