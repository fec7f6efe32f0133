"""One worker process: opens its parts, announces itself on the bus, feeds the watchdog, and closes."""
