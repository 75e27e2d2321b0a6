"""What runs in the node: carried there by the seed, never imported by the command."""
