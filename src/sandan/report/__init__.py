"""One report of a whole recipe: checks, figures, charts, a page and a table."""
