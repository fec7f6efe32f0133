"""Names the modules of fixtures that the tests share."""

pytest_plugins = ["tests.support.engine_fixtures"]
