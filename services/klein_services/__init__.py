"""Services of klein-suite."""

import os

# gRPC reads this when it is imported. By default it writes a line for each failed TLS handshake, so that strangers
# could fill the log.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
