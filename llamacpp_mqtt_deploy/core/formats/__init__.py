"""The APIs that the gateway speaks: their bodies to requests on the bus, the events of the bus to their answers. Pure."""
