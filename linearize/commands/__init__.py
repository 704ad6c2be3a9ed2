"""What the command line's groups share, and the groups: one file each. `cli.py` puts them together."""
