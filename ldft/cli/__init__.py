"""The command line: compose the config and run it."""
