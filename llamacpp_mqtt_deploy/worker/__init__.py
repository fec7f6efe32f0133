"""One request's life, from the delivered message to its terminal event."""
