"""The figures of virtfleet: `make bench`."""

import os

# Processes are spawned while connections are open; gRPC's fork handlers would meddle with the children. Read when it is
# first imported, which is after this package.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
