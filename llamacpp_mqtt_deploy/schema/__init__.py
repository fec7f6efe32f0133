"""The protocol's messages as models, for the JSON Schema, the documentation and the tests; the worker does not use it."""
