"""What every virtfleet server process shares; no resource of its own."""

import os

# Servers run tools as children. gRPC's fork handlers assume that a child goes on using gRPC; in one that is about to
# run another
# program they abort it now and then. Read by gRPC when it is first imported, which is after this package.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
