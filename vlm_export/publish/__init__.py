"""What is published beside the graphs (config files, card), and the gate in front of the Hub."""
