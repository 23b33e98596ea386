"""What is published beside the graphs: config files, the card and its table of dtypes; the gate in front of the Hub."""
