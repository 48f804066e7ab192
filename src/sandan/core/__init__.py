"""The ground that every room stands on: files, a stage's folder, the chain's table, errors, signals, text, bootstrap intervals."""
