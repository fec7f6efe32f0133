"""An amqtt broker (pure Python, MQTT 3.1.1 only) in a child process."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import eventually


class AmqttBroker:
    """Listens on `port`; takes anonymous clients."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> AmqttBroker:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.amqtt_broker", str(self.port)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._listens, 20.0)
        return self

    def stop(self) -> None:
        """It keeps nothing, so there is nothing to be saved."""
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "amqtt ended"
        try:
            socket.create_connection((self.host, self.port), 1).close()
        except OSError:
            return False
        return True


async def _serve(port: int) -> None:
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(_serve(int(sys.argv[1])))
