"""What is declared: graphs by their inputs and outputs, families, clients. Nothing here acts."""
