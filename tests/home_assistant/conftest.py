"""These tests run in a real Home Assistant, which the project's own environment does not have (it pins other versions of shared
packages and needs a newer Python): `make test-homeassistant` sets one up. Elsewhere they are not collected; tests/custom_integration
is their short form.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("homeassistant") is None:
    collect_ignore_glob = ["*.py"]
else:
    # Before the plugin's own folder of custom components takes the name.
    import custom_components.llamacpp_mqtt  # noqa: F401
    from tests.home_assistant.fixtures import (  # noqa: F401
        access_list,
        auto_enable_custom_integrations,
        broker,
        connected,
        home,
        scripted,
        sockets,
        start_worker,
    )
