"""What a user can set: the models, where values come from, and what contradicts what."""
