"""The clients, one a file: the config files that make each load the graphs. A family names those that it can use."""
