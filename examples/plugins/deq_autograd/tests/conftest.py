pytest_plugins = ["deqcore.testing.plugin"]
