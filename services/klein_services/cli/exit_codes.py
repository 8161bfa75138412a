"""Exit codes of the command line. Imports nothing: an interrupted start needs them."""

FAILED = 1
MISUSED = 2
INTERRUPTED = 130
