"""Talk to the models of a recipe side by side, in the browser or the terminal; votes go into the judgement log."""
