"""Step 3, the reward model: its trainer, its metrics (which measure its scale), and the gate before PPO."""
