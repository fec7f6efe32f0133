"""HTTP over the client side of the bus."""
