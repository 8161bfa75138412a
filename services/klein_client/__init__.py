"""Client of the suite: typed, synchronous and asynchronous, without torch."""
