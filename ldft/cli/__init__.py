"""The command line: composing the config, running what it says."""
