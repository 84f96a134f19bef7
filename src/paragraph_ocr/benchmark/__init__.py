"""How fast it is: the published design and this package in one process, on the same work."""
