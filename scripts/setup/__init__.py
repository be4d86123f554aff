"""Sets up the virtual environment that `make` works in. Standard library only: nothing is installed yet when this runs."""
