"""A program that runs the amqtt broker for the demo: `python -m llamacpp_mqtt_deploy.demo.amqtt_server PORT`."""

from __future__ import annotations

import asyncio
import logging
import sys
import warnings


async def serve(port: int) -> None:
    """Serve MQTT 3.1.1 on the loopback interface, for anybody on this machine, until cancelled."""
    from amqtt.broker import Broker  # noqa: PLC0415 - after the warnings are set

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(serve(int(sys.argv[1])))
