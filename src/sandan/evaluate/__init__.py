"""Base, SFT and PPO compared on prompts that none of them saw, and signs of over-optimisation."""
