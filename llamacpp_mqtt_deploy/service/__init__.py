"""One worker process: opens its parts, comes onto the bus, watches over itself, and closes."""
