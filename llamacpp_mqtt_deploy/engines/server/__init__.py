"""The engine in another process, over HTTP."""
