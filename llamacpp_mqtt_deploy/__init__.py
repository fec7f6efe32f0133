"""llamacpp_mqtt_deploy puts a local language model on an MQTT bus; importing it loads nothing but this version."""

__version__ = "0.1.0"

__all__ = ["__version__"]
