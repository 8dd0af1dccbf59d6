"""Recipes (engines/*.yaml): which model runs how on which GPU; and `xshare build`, which carries them out."""
