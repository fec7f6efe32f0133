"""What a worker of a pool does otherwise than one of its own: a common queue, leases, requests that another worker runs."""
