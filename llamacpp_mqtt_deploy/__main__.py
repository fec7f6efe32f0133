"""`python -m llamacpp_mqtt_deploy` is the command line."""

from llamacpp_mqtt_deploy.cli import main

main()
