"""The `sana-sprint` command: arguments in, files and printed lines out; everything it does is done by other folders."""
