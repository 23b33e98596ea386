"""How a repo is laid out, and how its client drives the graphs: one file a client. A family names those it can use."""
