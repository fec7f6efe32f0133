"""HTTP over the client side of the bus: what programs that know no MQTT speak to."""
