"""The engine that the worker starts and watches itself."""
