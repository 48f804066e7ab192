"""The command `sandan`: which stages of a recipe have to run, and running them, side by side where they can."""
