"""How a script runs: the command line, the recipe file, the dry run."""
