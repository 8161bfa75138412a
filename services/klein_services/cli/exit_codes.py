"""What the command line's process ends with. Imports nothing: an interrupted start needs it."""

FAILED = 1
MISUSED = 2
INTERRUPTED = 130
