"""The engine inside the worker's own process."""
