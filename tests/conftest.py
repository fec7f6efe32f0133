"""Names the modules of fixtures that the tests share."""

pytest_plugins = ["tests.support.broker_fixtures", "tests.support.engine_fixtures"]
